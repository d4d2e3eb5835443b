"""The stages by name, and how settings reach their configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from duovsr.errors import UsageError
from duovsr.train.base import BaseTrainConfig, train_base
from duovsr.train.data import PoolConfig, build_pool
from duovsr.train.one_step import OneStepTrainConfig, train_one_step
from duovsr.train.refine import RefineTrainConfig, train_refine
from duovsr.train.runs import export
from duovsr.train.vae import VAETrainConfig, train_vae

# In the order of a whole training. `pool` takes folders of sources as data, the others pools.
CONFIGS: dict[str, Any] = {
    "pool": PoolConfig(),
    "vae": VAETrainConfig(),
    "base": BaseTrainConfig(),
    "onestep": OneStepTrainConfig(),
    "refine": RefineTrainConfig(),
    "export": None,
}
_TRAINERS: dict[str, Callable[..., None]] = {
    "vae": train_vae,
    "base": train_base,
    "onestep": train_one_step,
    "refine": train_refine,
}


def resolve(stage: str, settings: list[str]) -> Any:
    """The configuration of a stage with `settings` such as `loop.steps=100`. Raises UsageError."""
    if stage not in CONFIGS:
        raise UsageError(f"unknown stage: `{stage}`", hint=f"use one of: {', '.join(CONFIGS)}")
    config = CONFIGS[stage]
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"not a setting: `{setting}`", hint="write `--set key=value`")
        config = _with_setting(config, key.split("."), value, setting)
    return config


def run_stage(stage: str, data: list[Path], init: Path | None, out: Path, config: Any) -> None:
    """Run a stage with its resolved configuration. The same call again resumes a training run; a pool is made anew."""
    if stage != "export" and not data:
        raise UsageError(f"stage `{stage}` needs data", hint="add `--data FOLDER`")
    if stage not in ("pool", "vae") and init is None:
        raise UsageError(f"stage `{stage}` needs a run to start from", hint="add `--init RUN`")
    if stage == "pool":
        build_pool(data, out, config)
    elif stage == "export":
        assert init is not None
        export(init, out)
    else:
        _TRAINERS[stage](data, init, out, config)


def _with_setting(config: Any, path: list[str], value: str, setting: str) -> Any:
    name, *rest = path
    if not is_dataclass(config) or isinstance(config, type) or name not in {field.name for field in fields(config)}:
        raise UsageError(f"unknown setting: `{setting}`", hint="see the stage's configuration with `--dry-run`")
    current = getattr(config, name)
    if rest:
        return replace(config, **{name: _with_setting(current, rest, value, setting)})
    return replace(config, **{name: _parse(value, current, setting)})


def _parse(value: str, current: Any, setting: str) -> Any:
    """`value` in the type of the value that it replaces."""
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(current, tuple):
            parts = value.split(",")
            if len(parts) != len(current):
                raise ValueError
            return tuple(type(old)(new) for old, new in zip(current, parts, strict=True))
        return int(value) if current is None else type(current)(value)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"unsupported value: `{setting}`", hint=f"its default is `{current}`") from error

"""The stages by name: their settings, what they need, and running one or a whole recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duovsr.errors import UsageError
from duovsr.options import PRESETS, TinyVAEConfig
from duovsr.train.base import train_base
from duovsr.train.cache import cache_latents
from duovsr.train.data import LATENTS, PAIRS, LatentPool, PairPool, Pool
from duovsr.train.distributed import joined, wait_for_all
from duovsr.train.journal import note_settings
from duovsr.train.loop import Run
from duovsr.train.options import (
    RECIPES,
    BaseConfig,
    CFGConfig,
    DPOConfig,
    DualConfig,
    ExportConfig,
    LatentsConfig,
    PrefsConfig,
    ProgressiveConfig,
    RefineConfig,
    StageConfig,
    TuneConfig,
    VAEConfig,
)
from duovsr.train.pool import PoolConfig, build_pool
from duovsr.train.rankers import make_rankers
from duovsr.train.refine import train_refine
from duovsr.train.roles import Inputs
from duovsr.train.runs import FINAL, export, load_weights
from duovsr.train.stage1 import train_cfg, train_progressive
from duovsr.train.stage2 import train_dual
from duovsr.train.stage3 import build_pairs, train_dpo
from duovsr.train.vae import train_vae
from duovsr.weights import weights_folder

_TRAINERS: dict[str, tuple[StageConfig, Callable[..., None]]] = {
    "vae": (VAEConfig(), train_vae),
    "latents": (LatentsConfig(), cache_latents),
    "base": (BaseConfig(), train_base),
    "cfg": (CFGConfig(), train_cfg),
    "progressive": (ProgressiveConfig(), train_progressive),
    "dual": (DualConfig(), train_dual),
    "prefs": (PrefsConfig(), build_pairs),
    "dpo": (DPOConfig(), train_dpo),
    "refine": (RefineConfig(), train_refine),
}
_TINY_VAE_ONLY = ("vae", "refine", "tune")
STAGES = ("pool", *_TRAINERS, "export", "recipe", "tune")


@dataclass(frozen=True)
class Job:
    """A `duovsr train` command: what to do with which inputs, where."""

    stage: str
    out: Path
    preset: str = "tiny"
    data: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    init: Path | None = None
    name: str | None = None  # of a recipe


def resolve(job: Job, settings: list[str]) -> Any:
    """The stage's configuration with `settings` such as `steps=100`; of a recipe, {stage: configuration} with settings
    such as `dual.steps=100`, or `dual=off` to leave a stage out. Raises UsageError."""
    if job.stage not in STAGES:
        raise UsageError(f"unknown stage: `{job.stage}`", hint=f"use one of: {', '.join(STAGES)}")
    if job.preset not in PRESETS:
        raise UsageError(f"unknown preset: `{job.preset}`", hint=f"use one of: {', '.join(PRESETS)}")
    if job.stage in _TINY_VAE_ONLY and not isinstance(PRESETS[job.preset].vae, TinyVAEConfig):
        raise UsageError(
            f"stage `{job.stage}` trains TinyVAE, which preset `{job.preset}` does not have", hint="use `--preset tiny`"
        )
    if job.stage == "recipe":
        if job.name not in RECIPES:
            raise UsageError(f"unknown recipe: `{job.name}`", hint=f"use one of: {', '.join(RECIPES)}")
        config: Any = dict(RECIPES[job.name].stages)
    elif job.stage in _TRAINERS:
        config = _TRAINERS[job.stage][0]
    else:
        config = {"pool": PoolConfig(), "tune": TuneConfig(), "export": ExportConfig()}[job.stage]
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"not a setting: `{setting}`", hint="write `--set key=value`")
        config = _with_setting(config, key.split("."), value, setting)
    return config


def run_job(job: Job, config: Any) -> None:
    """Run a stage or a recipe with its resolved configuration; the same again resumes."""
    if job.stage == "pool":
        _need_data(job)
        build_pool(list(job.data), job.out, config)
    elif job.stage == "export":
        if job.init is None:
            raise UsageError("stage `export` needs a run", hint="add `--init RUN`")
        export(job.init, job.out, job.preset, config)
    elif job.stage == "recipe":
        _run_recipe(job, config)
    elif job.stage == "tune":
        _tune(job, config)
    else:
        _run_stage(job, config)


def _run_stage(job: Job, config: StageConfig) -> None:
    _need_data(job)
    if config.threads:
        torch.set_num_threads(config.threads)
    data = _open(job.data)
    held_out = _open(job.held_out) if job.held_out else None
    if held_out is not None and not isinstance(held_out, Pool):
        raise UsageError("validation needs a pool of frames", hint="make one with `--set validation=true`")
    init = None if job.init is None else load_weights(job.init)
    inputs = Inputs(PRESETS[job.preset], data, held_out, init, job.init or Path())
    if held_out is not None:
        held_out.require(config.crop, config.frames)
    with joined(config.device) as world:
        if world.first:
            note_settings(job.out, job.stage, job.preset, config, _named(job))
        if world.first or job.stage not in ("latents", "prefs"):  # which are no job of many
            _TRAINERS[job.stage][1](Run(job.out, config, world), config, inputs)
        wait_for_all(world)


def _run_recipe(job: Job, configs: dict[str, StageConfig]) -> None:
    """Each stage in `out/STAGE`, from the stage before; finished ones are passed over."""
    assert job.name is not None
    if isinstance(prefs := configs.get("prefs"), PrefsConfig):
        make_rankers(prefs.rankers, torch.device("cpu"))  # before hours of training, not after
    elif "dpo" in configs:
        raise UsageError("stage `dpo` needs the pairs of `prefs`", hint="add `--set dpo=off`")
    init = job.init
    for stage, config in configs.items():
        out = job.out / stage
        data = (job.out / "prefs",) if stage == "dpo" else job.data
        each = replace(job, stage=stage, out=out, data=data, init=init, preset=RECIPES[job.name].preset)
        if (out / (PAIRS if stage == "prefs" else FINAL)).exists():
            note_settings(out, stage, each.preset, config, _named(each))  # refuses what was made with others
        else:
            _run_stage(each, config)
        init = init if stage == "prefs" else out


def _tune(job: Job, config: TuneConfig) -> None:
    """A pool of somebody's clips, a short refinement of a trained model on it, and the model folder `out/model`."""
    _need_data(job)
    init = job.init or weights_folder() / job.preset
    pool = job.out / "pool"
    if not (pool / "scale.npy").exists():
        sampled = PoolConfig(samples=config.samples, side=config.side, seed=config.seed, stills=config.stills)
        build_pool(list(job.data), pool, sampled)
    run = job.out / "refine"
    _run_stage(replace(job, stage="refine", data=(pool,), init=init, out=run), config)
    export(run, job.out / "model", job.preset, ExportConfig())


def _need_data(job: Job) -> None:
    if not job.data:
        raise UsageError(f"stage `{job.stage}` needs data", hint="add `--data FOLDER`")


def _open(folders: tuple[Path, ...]) -> Pool | LatentPool | PairPool:
    """What the folders hold: windows, cached latents or preference pairs."""
    first = folders[0]
    if (first / LATENTS).exists() or (first / PAIRS).exists():
        if len(folders) > 1:
            raise UsageError(f"only one folder like `{first}` at a time")
        return LatentPool(first) if (first / LATENTS).exists() else PairPool(first)
    return Pool(list(folders))


def _named(job: Job) -> dict[str, object]:
    return {"data": list(map(str, job.data)), "held_out": list(map(str, job.held_out)), "init": str(job.init)}


def _with_setting(config: Any, path: list[str], value: str, setting: str) -> Any:
    name, *rest = path
    if isinstance(config, dict) and name in config:
        if not rest and value == "off":
            return {stage: each for stage, each in config.items() if stage != name}
        if rest:
            return {**config, name: _with_setting(config[name], rest, value, setting)}
    if not is_dataclass(config) or isinstance(config, type) or name not in {field.name for field in fields(config)}:
        raise UsageError(f"unknown setting: `{setting}`", hint="see the stage's configuration with `--dry-run`")
    current = getattr(config, name)
    if is_dataclass(current) and not rest:
        raise UsageError(f"not a single value: `{setting}`", hint=f"set a part of it, `{name}.PART=VALUE`")
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
            if all(isinstance(old, str) for old in current):
                return tuple(parts)
            if len(parts) != len(current):
                raise ValueError
            return tuple(type(old)(new) for old, new in zip(current, parts, strict=True))
        return type(current)(value)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"unsupported value: `{setting}`", hint=f"its default is `{current}`") from error

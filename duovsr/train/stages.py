"""The stages by name: their settings, what they need, and running one or a whole recipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from duovsr.errors import UsageError
from duovsr.model.one_step import new_autoencoder
from duovsr.options import PRESETS, Preset, TinyVAEConfig
from duovsr.repository import CONFIG as MODEL_RECORD
from duovsr.repository import EMBEDDED, weights_folder
from duovsr.train.base import train_base
from duovsr.train.cache import cache_latents
from duovsr.train.data import LATENTS, PAIRS, PAIRS_RECORD, LatentPool, PairPool, Pool
from duovsr.train.distributed import first_alone, joined
from duovsr.train.encode_prompt import PromptConfig, encode_prompt
from duovsr.train.journal import SETTINGS, note_settings, refuse_others, sole_owner
from duovsr.train.loop import Run, micro_batch
from duovsr.train.options import (
    BaseConfig,
    CFGConfig,
    DPOConfig,
    DualConfig,
    ExportConfig,
    LatentsConfig,
    PoolConfig,
    PrefsConfig,
    ProgressiveConfig,
    RefineConfig,
    StageConfig,
    TuneConfig,
    VAEConfig,
)
from duovsr.train.pool import RECORD as POOL_RECORD
from duovsr.train.pool import build_pool
from duovsr.train.rankers import make_rankers
from duovsr.train.recipes import RECIPES
from duovsr.train.refine import train_refine
from duovsr.train.roles import DiffusionModel, Inputs, fill
from duovsr.train.runs import FINAL, export, load_weights, pick
from duovsr.train.settings import with_settings
from duovsr.train.sources import find_sources
from duovsr.train.stage1 import train_cfg, train_progressive
from duovsr.train.stage2 import train_dual
from duovsr.train.stage3 import build_pairs, train_dpo
from duovsr.train.vae import train_vae

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
_ONE_PROCESS = ("pool", "export", "tune", "encode-prompt")
_WITHOUT_DATA = {"export": "a run", "encode-prompt": "a Wan2.1 folder"}  # from `--init` alone
_FIRST_RANK_ONLY = ("latents", "prefs")
STAGES = ("pool", *_TRAINERS, "export", "recipe", "tune", "encode-prompt")

_FLAGS = {"preset": "--preset", "data": "--data", "held_out": "--validation", "init": "--init", "name": "NAME"}
_UNUSED = {  # flags that a stage makes no use of; those not listed, of NAME
    "pool": {"preset", "held_out", "init", "name"},
    "latents": {"held_out", "name"},
    "prefs": {"held_out", "name"},
    "export": {"data", "held_out", "name"},
    "recipe": {"preset"},
    "encode-prompt": {"preset", "data", "held_out", "name"},
}


@dataclass(frozen=True)
class Job:
    """A `duovsr train` command: what to do with which inputs, where."""

    stage: str
    out: Path
    preset: str | None = None  # None: the recipe's, or tiny
    data: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    init: Path | None = None
    name: str | None = None  # of a recipe

    @property
    def preset_name(self) -> str:
        if self.stage == "recipe" and self.name in RECIPES:
            return RECIPES[self.name].preset
        return self.preset or EMBEDDED


def resolve(job: Job, settings: list[str]) -> Any:
    """The stage's configuration with `settings` such as `steps=100`; of a recipe, {stage: configuration} with settings
    such as `dual.steps=100`, or `dual=off` to leave a stage out. Raises UsageError, also for what the stage makes no
    use of."""
    if job.stage not in STAGES:
        raise UsageError(f"unknown stage: `{job.stage}`", hint=f"use one of: {', '.join(STAGES)}")
    if job.stage == "recipe" and job.name not in RECIPES:
        raise UsageError(f"unknown recipe: `{job.name}`", hint=f"use one of: {', '.join(RECIPES)}")
    if job.preset is not None and job.preset not in PRESETS:
        raise UsageError(f"unknown preset: `{job.preset}`", hint=f"use one of: {', '.join(PRESETS)}")
    for flag in sorted(_UNUSED.get(job.stage, {"name"})):
        if getattr(job, flag) and not (flag == "preset" and job.stage == "recipe" and job.preset == job.preset_name):
            named = f"recipe `{job.name}`" if job.stage == "recipe" else f"stage `{job.stage}`"
            raise UsageError(f"{named} makes no use of {_FLAGS[flag]}", hint="leave it out")
    preset = PRESETS[job.preset_name]
    has_one = isinstance(preset.vae, TinyVAEConfig) or (job.stage == "vae" and preset.tiny_vae is not None)
    if job.stage in _TINY_VAE_ONLY and not has_one:
        raise UsageError(
            f"stage `{job.stage}` trains TinyVAE, which preset `{job.preset_name}` does not have",
            hint="use `--preset tiny`",
        )
    if job.name is not None:
        config: Any = dict(RECIPES[job.name].stages)
    elif job.stage in _TRAINERS:
        config = _TRAINERS[job.stage][0]
    else:
        config = {
            "pool": PoolConfig(),
            "tune": TuneConfig(),
            "export": ExportConfig(),
            "encode-prompt": PromptConfig(),
        }[job.stage]
    return with_settings(config, settings)


def run_job(job: Job, config: Any) -> None:
    """Run a stage or a recipe with its resolved configuration; the same again resumes.

    Raises UsageError where `job.out` has what other commands or settings made.
    """
    if job.stage in _ONE_PROCESS and _processes() > 1:
        raise UsageError(f"stage `{job.stage}` is not for many processes", hint="run it without torchrun")
    if job.stage in _WITHOUT_DATA and job.init is None:
        raise UsageError(f"stage `{job.stage}` needs {_WITHOUT_DATA[job.stage]}", hint="add `--init FOLDER`")
    if job.stage not in _WITHOUT_DATA and not job.data:
        raise UsageError(f"stage `{job.stage}` needs data", hint="add `--data FOLDER`")
    marks = {"pool": POOL_RECORD, "export": MODEL_RECORD, "recipe": None, "tune": None, "encode-prompt": None}
    refuse_others(job.out, marks.get(job.stage, SETTINGS))
    if job.stage == "pool":
        with sole_owner(job.out):
            build_pool(list(job.data), job.out, config)
    elif job.stage == "encode-prompt":
        assert job.init is not None
        encode_prompt(job.init, job.out, PRESETS["1.3b"].transformer, config)
    elif job.stage == "export":
        assert job.init is not None
        _check_weights(job.init, PRESETS[job.preset_name])
        export(job.init, job.out, job.preset_name, config)
    elif job.stage == "recipe":
        _run_recipe(job, config)
    elif job.stage == "tune":
        _tune(job, config)
    else:
        _run_stage(job, config)


def _run_stage(job: Job, config: StageConfig) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    data = _open(job.data)
    held_out = _held_out(job, config, data.sources)
    init = None if job.init is None else load_weights(job.init)
    inputs = Inputs(PRESETS[job.preset_name], data, held_out, init, job.init or Path())
    train = _TRAINERS[job.stage][1]
    with joined(config.device) as world, ExitStack() as owned:
        if world.first:
            owned.enter_context(sole_owner(job.out))
            note_settings(job.out, job.stage, job.preset_name, config, _named(job))
        run = Run(job.out, config, world)
        if job.stage not in _FIRST_RANK_ONLY:
            train(run, config, inputs)
            return
        with first_alone(world) as first:
            if first:
                train(run, config, inputs)


def _run_recipe(job: Job, configs: dict[str, StageConfig]) -> None:
    """Each stage in `out/STAGE`, from the stage before; finished ones are passed over."""
    _foresee(job, configs)
    if isinstance(prefs := configs.get("prefs"), PrefsConfig):
        make_rankers(prefs.rankers, torch.device("cpu"))  # before hours of training, not after
    elif "dpo" in configs:
        raise UsageError("stage `dpo` needs the pairs of `prefs`", hint="add `--set dpo=off`")
    init = job.init
    for stage, config in configs.items():
        out = job.out / stage
        data = (job.out / "prefs",) if stage == "dpo" else job.data
        each = replace(job, stage=stage, out=out, data=data, init=init, preset=job.preset_name)
        if (out / (PAIRS_RECORD if stage == "prefs" else FINAL)).exists():
            note_settings(out, stage, job.preset_name, config, _named(each))  # refuses what was made with others
        else:
            _run_stage(each, config)
        init = init if stage == "prefs" else out


def _foresee(job: Job, configs: dict[str, StageConfig]) -> None:
    """Refuses what some stage of a recipe would: before hours of training, not after."""
    pool = _open(job.data)
    has: set[str] = {"vae", "model"} if job.init else set()
    for stage, config in configs.items():
        if stage != "prefs":  # which takes one clip at a time
            micro_batch(config, _processes())
        _held_out(job, config, pool.sources)
        if isinstance(pool, Pool) and stage != "dpo":
            pool.require(config.crop, config.frames)
        elif isinstance(pool, PairPool) or stage in ("vae", "prefs", "refine"):
            raise UsageError(
                f"stage `{stage}` trains on frames, not on what `{job.data[0]}` holds",
                hint=f"give a pool, or add `--set {stage}=off`",
            )
        for needed, maker in (("vae", "vae"), ("model", "base")):
            if needed not in has and stage not in ("vae", maker):
                way = "--set vae=off" if job.init else "--init FOLDER"  # or its model is of another autoencoder
                raise UsageError(
                    f"stage `{stage}` has no `{needed}` to start from", hint=f"keep `{maker}`, or add `{way}`"
                )
        has = {"vae"} if stage == "vae" else {"vae", "model"}


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _tune(job: Job, config: TuneConfig) -> None:
    """A pool of somebody's clips, a short refinement of a trained model on it, and the model folder `out/model`."""
    init, preset = job.init or weights_folder() / job.preset_name, PRESETS[job.preset_name]
    _check_weights(init, preset)  # all that can be refused is, before the pool takes its time
    split = bool(job.held_out)
    found = (source for source in find_sources(list(job.data)) if not (split and source.validation))
    _held_out(job, config, frozenset(source.identity for source in found))
    pool, run = job.out / "pool", job.out / "refine"
    with joined(config.device), sole_owner(pool):  # the first refuses a device that is not there
        build_pool(list(job.data), pool, config.windows(), split=split)
    _run_stage(replace(job, stage="refine", data=(pool,), init=init, out=run), config)
    export(run, job.out / "model", job.preset_name, ExportConfig())


def _check_weights(init: Path, preset: Preset) -> None:
    """Raises InputError where `init` has not the weights of a model of the preset."""
    weights = load_weights(init)
    with torch.device("meta"):  # names and shapes are all that counts here
        modules = {"vae": new_autoencoder(preset.vae), "model": DiffusionModel(preset)}
    for name, module in modules.items():
        fill(module, pick(weights, name, init), preset, assign=True)


def _held_out(job: Job, config: StageConfig, sources: frozenset[str]) -> Pool | None:
    """The pool to validate on. Raises UsageError where it, or a source of it, is trained on, as `sources` are."""
    if not job.held_out:
        return None
    hint = "make a pool of held-out sources: `duovsr train pool --set validation=true`"
    pool = _open(job.held_out)
    if not isinstance(pool, Pool):
        raise UsageError(f"validation needs a pool of frames: `{job.held_out[0]}`", hint=hint)
    both = {str(folder.resolve()) for folder in job.data} & {str(folder.resolve()) for folder in job.held_out}
    both |= sources & pool.sources
    if both:
        raise UsageError(f"`{min(both)}` is both trained and validated on", hint=hint)
    pool.require(config.crop, config.frames)
    return pool


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

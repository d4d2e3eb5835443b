"""What stages start from and hand on: the weights of finished runs, of exported models and of Wan2.1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from duovsr.errors import InputError, TrainError, UsageError
from duovsr.model.tiny_vae import complete
from duovsr.options import PRESETS
from duovsr.repository import FILES, TINY_VAE
from duovsr.train.checkpoint import told_of
from duovsr.train.distributed import World
from duovsr.train.options import ExportConfig
from duovsr.weights import (
    atomic_file,
    find_wan,
    read_checkpoint,
    read_safetensors,
    read_transformer,
    read_wan,
    save_model,
)

FINAL, BEST = "final.pt", "best.pt"
_TRANSFORMER, _VAE, _PROMPT = FILES
Weights = dict[str, dict[str, Tensor]]


def load_weights(source: Path) -> Weights:
    """`vae`, `model` (transformer and prompt) and what else a stage left, of a finished run, one of its files
    (`RUN/best.pt`), an exported model folder, or a folder with Wan2.1's checkpoints and a prompt.

    Raises InputError where the run has not finished, or a file is missing.
    """
    weights = _read(source)
    for name in ("vae", "tiny_vae"):
        complete(weights.get(name, {}))
    return weights


def _read(source: Path) -> Weights:
    if (source / _TRANSFORMER).is_file():
        files = {"transformer": _TRANSFORMER, "prompt": _PROMPT}
        model = {f"{part}.{k}": v for part, file in files.items() for k, v in _float(source / file).items()}
        light = {"tiny_vae": _float(source / TINY_VAE)} if (source / TINY_VAE).is_file() else {}
        return {"vae": _float(source / _VAE), "model": model, **light}
    if source.is_dir() and find_wan(source, "transformer") is not None:
        return _wan_weights(source)
    path = source / FINAL if source.is_dir() else source
    states = read_checkpoint(path) if path.is_file() else {}
    weights = {name: state for name, state in states.items() if isinstance(state, dict)}
    if not weights:
        raise InputError(f"not a finished training run: `{source}`", hint="run its stage to the end first")
    return weights


def _wan_weights(folder: Path) -> Weights:
    """What training starts from: a text-to-video model, widened, and its text encoder's states of the two prompts."""
    hint = (
        "make it with `duovsr train encode-prompt`: the text encoder's states of the prompts as tensors `positive` and"
        " `null`, zero-padded to (text_length, text_dim), (512, 4096) for Wan2.1"
    )
    if not (folder / _PROMPT).is_file():
        raise InputError(f"no `{_PROMPT}` in Wan2.1's folder: `{folder}`", hint=hint)
    prompt = _float(folder / _PROMPT)
    if set(prompt) != {"positive", "null"}:
        raise InputError(f"not the two prompts: `{folder / _PROMPT}` has {', '.join(prompt) or 'nothing'}", hint=hint)
    parts = {"transformer": read_transformer(folder), "prompt": prompt}
    model = {f"{part}.{k}": v.float() for part, state in parts.items() for k, v in state.items()}
    return {"vae": {k: v.float() for k, v in read_wan(folder, "vae").items()}, "model": model}


def pick(weights: Weights, name: str, source: Path) -> dict[str, Tensor]:
    if name not in weights:
        raise InputError(f"run `{source}` has no `{name}`: it has {', '.join(weights)}", hint="see the order of stages")
    return weights[name]


def save_atomically(weights: Mapping[str, Mapping[str, Tensor]], path: Path, world: World) -> None:
    """The first rank writes; no reader ever sees half a file. Raises TrainError where a weight is not finite, and
    DuovsrError where the disk does not take it."""
    if not world.first:
        return
    for name, state in weights.items():
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise TrainError(
                f"weights of `{name}` are not finite: nothing was written to `{path}`",
                hint="lower the learning rate, or go on from an older checkpoint",
            )
    with told_of(path), atomic_file(path) as partial:
        torch.save(dict(weights), partial)


def blend(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Network interpolation: so much of the second one's weights."""
    return {key: torch.lerp(value.float(), second[key].float(), share) for key, value in first.items()}


def _blended(name: str, source: Path, config: ExportConfig) -> dict[str, Tensor]:
    state = pick(load_weights(source), name, source)
    if not config.blend or config.only not in ("both", name):
        return state
    other = pick(load_weights(Path(config.blend)), name, Path(config.blend))
    if {k: v.shape for k, v in other.items()} != {k: v.shape for k, v in state.items()}:
        raise InputError(f"runs of different models: `{source}` and `{config.blend}`")
    return blend(state, other, config.share)


def export(source: Path, out: Path, preset: str, config: ExportConfig) -> None:
    """Write the `model` and `vae` of a finished run, and a TinyVAE for its latents if there is one, as model repository
    `out`, in place of one that was there."""
    light = load_weights(Path(config.tiny_vae) if config.tiny_vae else source).get("tiny_vae")
    if config.tiny_vae and (light is None or PRESETS[preset].tiny_vae is None):
        raise UsageError(f"not a TinyVAE for preset `{preset}`: `{config.tiny_vae}`", hint="make it with stage `vae`")
    model, vae = (_blended(name, source, config) for name in ("model", "vae"))
    transformer = {k.removeprefix("transformer."): v for k, v in model.items() if k.startswith("transformer.")}
    prompt = {k.removeprefix("prompt."): v for k, v in model.items() if k.startswith("prompt.")}
    parts = dict(zip(FILES, (transformer, vae, prompt), strict=True))
    save_model(out, preset, parts if light is None else {**parts, TINY_VAE: light})


def _float(path: Path) -> dict[str, Tensor]:
    return {key: value.float() for key, value in read_safetensors(path).items()}

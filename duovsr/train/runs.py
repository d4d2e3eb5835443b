"""What stages hand on to each other and to inference: the weights of finished runs and of exported models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from duovsr.errors import InputError
from duovsr.train.distributed import World
from duovsr.weights import FILES, read_safetensors, save_model

FINAL, BEST = "final.pt", "best.pt"
_TRANSFORMER, _VAE, _PROMPT = FILES
Weights = dict[str, dict[str, Tensor]]


def load_weights(source: Path) -> Weights:
    """`vae`, `model` (transformer and prompt) and what else a stage left, of a finished run, one of its files
    (`RUN/best.pt`), or an exported model folder.

    Raises InputError where the run has not finished.
    """
    if (source / _TRANSFORMER).is_file():
        files = {"transformer": _TRANSFORMER, "prompt": _PROMPT}
        model = {f"{part}.{k}": v for part, file in files.items() for k, v in _float(source / file).items()}
        return {"vae": _float(source / _VAE), "model": model}
    path = source / FINAL if source.is_dir() else source
    if not path.is_file():
        raise InputError(f"not a finished training run: `{source}`", hint="run its stage to the end first")
    weights: Weights = torch.load(path, weights_only=True, map_location="cpu")
    return weights


def pick(weights: Weights, name: str, source: Path) -> dict[str, Tensor]:
    if name not in weights:
        raise InputError(f"run `{source}` has no `{name}`: it has {', '.join(weights)}", hint="see the order of stages")
    return weights[name]


def save_atomically(weights: Mapping[str, Mapping[str, Tensor]], path: Path, world: World) -> None:
    """The first rank writes; no reader ever sees half a file."""
    if not world.first:
        return
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        torch.save(dict(weights), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def export(source: Path, out: Path) -> None:
    """Write the `model` and `vae` of a finished run as model folder `out`, and its sha256 in the manifest beside it."""
    weights = load_weights(source)
    model, vae = pick(weights, "model", source), pick(weights, "vae", source)
    transformer = {k.removeprefix("transformer."): v for k, v in model.items() if k.startswith("transformer.")}
    prompt = {k.removeprefix("prompt."): v for k, v in model.items() if k.startswith("prompt.")}
    save_model(out.parent, out.name, dict(zip(FILES, (transformer, vae, prompt), strict=True)))


def _float(path: Path) -> dict[str, Tensor]:
    return {key: value.float() for key, value in read_safetensors(path).items()}

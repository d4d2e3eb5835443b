"""What stages hand on to each other and to inference: the weights of finished runs and of exported models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from duovsr.errors import InputError
from duovsr.weights import FILES, read_safetensors, save_model

FINAL = "final.pt"
_TRANSFORMER, _VAE, _PROMPT = FILES


def load_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """State dict `name` (`vae`, or `model`: transformer and prompt) of a finished run or of an exported model folder.

    Raises InputError where the run has not finished or lacks the module.
    """
    if (folder / _TRANSFORMER).is_file():
        if name == "vae":
            return {key: value.float() for key, value in read_safetensors(folder / _VAE).items()}
        parts = {"transformer": _TRANSFORMER, "prompt": _PROMPT}
        return {
            f"{part}.{key}": value.float()
            for part, file in parts.items()
            for key, value in read_safetensors(folder / file).items()
        }
    path = folder / FINAL
    if not path.is_file():
        raise InputError(f"not a finished training run: `{folder}`", hint="run its stage to the end first")
    final: dict[str, dict[str, Tensor]] = torch.load(path, weights_only=True)
    if name not in final:
        raise InputError(f"run `{folder}` has no `{name}`: it has {', '.join(final)}", hint="see the order of stages")
    return final[name]


def export(run: Path, out: Path) -> None:
    """Write the `model` and `vae` of a finished run as model folder `out`, and its sha256 in the manifest beside it."""
    model, vae = load_weights(run, "model"), load_weights(run, "vae")
    transformer = {k.removeprefix("transformer."): v for k, v in model.items() if k.startswith("transformer.")}
    prompt = {k.removeprefix("prompt."): v for k, v in model.items() if k.startswith("prompt.")}
    save_model(out.parent, out.name, dict(zip(FILES, (transformer, vae, prompt), strict=True)))

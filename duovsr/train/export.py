"""From a finished run to the files that inference loads."""

from __future__ import annotations

from pathlib import Path

from duovsr.train.loop import load_final
from duovsr.weights import FILES, save_model


def export(run: Path, out: Path) -> None:
    """Write the `model` and `vae` of a finished run as model folder `out`, and its sha256 in the manifest beside it."""
    model, vae = load_final(run, "model"), load_final(run, "vae")
    transformer = {k.removeprefix("transformer."): v for k, v in model.items() if k.startswith("transformer.")}
    prompt = {k.removeprefix("prompt."): v for k, v in model.items() if k.startswith("prompt.")}
    save_model(out.parent, out.name, dict(zip(FILES, (transformer, vae, prompt), strict=True)))

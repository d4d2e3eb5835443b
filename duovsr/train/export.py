"""From a finished run to the files that inference loads."""

from __future__ import annotations

from pathlib import Path

from duovsr.train.loop import load_final
from duovsr.weights import FILES, save_model


def export(run: Path, weights: Path, name: str) -> None:
    """Write a refined run's `student` and `vae` (EMA) as model `name` below `weights`."""
    student, vae = load_final(run, "student"), load_final(run, "vae")
    transformer = {k.removeprefix("transformer."): v for k, v in student.items() if k.startswith("transformer.")}
    prompt = {k.removeprefix("prompt."): v for k, v in student.items() if k.startswith("prompt.")}
    save_model(weights, name, dict(zip(FILES, (transformer, vae, prompt), strict=True)))

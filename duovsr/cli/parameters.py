"""What several commands take."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from duovsr.errors import UsageError

Model = Annotated[str, typer.Option(help="A preset, a folder, or owner/name@revision: see `duovsr models`.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16; int8, fp8: the transformer's weights.")]
Vae = Annotated[str | None, typer.Option(help="wan or tiny. Default: the model's own autoencoder.")]
Json = Annotated[bool, typer.Option("--json", help="Print a report as JSON to stdout.")]


def parse_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` in pixels. Raises UsageError."""
    sides = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text.lower())
    if sides is None:
        raise UsageError(f"unsupported size: `{text}`", hint="use `--size WIDTHxHEIGHT`, such as 1280x720")
    return int(sides[1]), int(sides[2])

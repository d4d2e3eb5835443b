"""A process that upscales a clip with a random model, to be killed: python -m tests.job_worker SRC DST."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from duovsr import UpscaleOptions, Upscaler
from duovsr.options import Progress
from tests.conftest import random_model


def say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(source: str, destination: str, codec: str) -> None:
    torch.set_num_threads(1)

    def count(progress: Progress) -> None:
        say(progress.done)

    options = UpscaleOptions(scale=2, codec=codec)
    report = Upscaler(random_model()).upscale_file(Path(source), Path(destination), options, count)
    say(f"reused {report.reused}")


if __name__ == "__main__":
    main(*sys.argv[1:])

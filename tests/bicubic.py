"""The trivial model, bicubic upscaling, for tests of what happens around a model.

As a process: python -m tests.bicubic MEMORY SRC DST upscales one file and prints its usual and its peak memory;
python -m tests.bicubic FUZZ FOLDER COUNT alters the clips of a folder and upscales what comes out.
"""

from __future__ import annotations

import random
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

from duovsr import UpscaleOptions, Upscaler
from duovsr.engine.bench import peak_rss
from duovsr.errors import DuovsrError
from duovsr.model.one_step import OneStepModel
from tests.conftest import SMALL

IDENTITY = UpscaleOptions(scale=1, color="none", codec="h264", encoder_options=(("preset", "ultrafast"),))
LONGEST = 30  # seconds that an altered clip may take


class Networks(torch.nn.Linear):
    """What is counted when memory is planned."""

    blocks = torch.nn.ModuleList()


class Bicubic:
    """What the engine needs of a model: the resized LQ is its output."""

    preset, device, dtype, precision = SMALL, torch.device("cpu"), torch.float32, "float32"
    transformer = vae = Networks(1, 1)
    attention = "none"

    def fingerprint(self) -> str:
        return "bicubic"

    def restore(self, lq: Tensor, state: None, **_: Any) -> tuple[Tensor, None]:
        return lq, None


def bicubic() -> Upscaler:
    return Upscaler(cast(OneStepModel, Bicubic()))


def fuzz(folder: Path, count: int) -> None:
    """Each clip of `folder`, with random bytes altered, `count` times: a result or a one-line refusal, in time."""
    upscaler = bicubic()
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for seed in range(count):
            chance = random.Random(f"{path.name} {seed}")
            altered = bytearray(data)
            for _ in range(chance.choice((1, 3, 10, 100))):
                altered[chance.randrange(len(altered))] = chance.randrange(256)
            with tempfile.TemporaryDirectory() as scratch:
                source = Path(scratch) / path.name
                source.write_bytes(altered)
                signal.alarm(LONGEST)  # kills the process, whose last line tells the seed
                say(f"{path.name} {seed} ")
                say(outcome(upscaler, source, Path(scratch) / "out.mkv") + "\n")
                signal.alarm(0)


def outcome(upscaler: Upscaler, source: Path, target: Path) -> str:
    try:
        report = upscaler.upscale_file(source, target, IDENTITY)
    except DuovsrError as error:
        line = f"refused: {error}"
    else:
        return f"{report.frames} frames, {len(report.notices)} notices"
    assert "\n" not in line
    assert not target.exists()
    return line


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def usual_memory(work: Callable[[], object]) -> int:
    """The median, in bytes, of what this process holds while it works: the peak also depends on how threads meet."""
    seen, done = list[int](), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            seen.append(int(Path("/proc/self/statm").read_text().split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return int(median(seen)) * resource.getpagesize()


def main(task: str, first: str, second: str) -> None:
    torch.set_num_threads(1)
    if task == "FUZZ":
        fuzz(Path(first), int(second))
    else:
        usual = usual_memory(lambda: bicubic().upscale_file(first, second, IDENTITY))
        say(f"{usual} {peak_rss()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

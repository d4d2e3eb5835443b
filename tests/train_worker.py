"""Processes of a training job on the tests' small preset.

`python -m tests.train_worker STAGE OUT DATA INIT KEY=VALUE ...`, `-` for no INIT; DIE=STEP:RANK:MARKER[,...] in the
environment kills that rank with SIGKILL before the step, once; STOP=MARKER asks the first rank to end in step 3, once;
DIE_WRITING=MARKER kills a checkpoint's first writer before it is pointed to. `python -m tests.train_worker state FOLDER
DUMP` makes a checkpoint, or loads the one that is there, and writes what is in it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.utils._pytree import tree_map_only

from duovsr.options import PRESETS
from duovsr.train.checkpoint import Checkpoints, State
from duovsr.train.distributed import full, joined, place
from duovsr.train.draws import Draws
from duovsr.train.loop import Run
from duovsr.train.roles import DiffusionModel
from duovsr.train.stages import Job, resolve, run_job
from tests.conftest import SMALL


def die_once(marker: Path, of: signal.Signals = signal.SIGKILL) -> None:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), of)


def die_at(deaths: list[tuple[int, int, Path]], of: signal.Signals = signal.SIGKILL) -> None:
    original = Run.micro_batches

    def micro_batches(self: Run, at: int, part: int = 0) -> Iterator[Draws]:
        for step, rank, marker in deaths:
            if (at, self.world.rank) == (step, rank):
                die_once(marker, of)
        return original(self, at, part)

    Run.micro_batches = micro_batches  # type: ignore[method-assign]


def die_writing(marker: Path) -> None:
    original = Checkpoints.save

    def save(self: Checkpoints, state: State, step: int) -> None:
        original(self, state, step)
        if self.latest() is not None:
            while not list(self.folder.glob(f"step_*{step}")):
                time.sleep(0.001)
            die_once(marker)

    Checkpoints.save = save  # type: ignore[method-assign]


def checkpoint(folder: Path, dump: Path) -> None:
    """A model and its optimiser after one update, on any number of processes."""
    with joined("cpu") as world:
        checkpoints = Checkpoints(folder, 3, world)
        there = checkpoints.latest() is not None
        torch.manual_seed(int(there))  # what is loaded is not what is there anyway
        model = place(DiffusionModel(SMALL), world)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        x, sigma = torch.linspace(-1, 1, 16 * 32).view(1, 16, 2, 4, 4), torch.full((1,), 0.5)
        model(x, x, sigma).square().sum().backward()
        optimizer.step()
        modules, optimizers = get_state_dict(model, [optimizer])
        state = {"modules": modules, "optimizers": optimizers}
        if there:
            checkpoints.load(state)
        else:
            checkpoints.save(state, 1)
            checkpoints.wait()
        whole = tree_map_only(torch.Tensor, full, state)
        if world.first:
            torch.save(whole, dump)


def main() -> None:
    torch.set_num_threads(1)
    stage, *rest = sys.argv[1:]
    if stage == "state":
        checkpoint(Path(rest[0]), Path(rest[1]))
        return
    out, data, init, *settings = rest
    PRESETS["tiny"] = SMALL
    if deaths := os.environ.get("DIE"):
        parts = (death.split(":") for death in deaths.split(","))
        die_at([(int(step), int(rank), Path(marker)) for step, rank, marker in parts])
    if marker := os.environ.get("STOP"):
        die_at([(3, 0, Path(marker))], signal.SIGTERM)
    if marker := os.environ.get("DIE_WRITING"):
        die_writing(Path(marker))
    job = Job(stage, Path(out), data=(Path(data),), init=None if init == "-" else Path(init))
    run_job(job, resolve(job, settings))


if __name__ == "__main__":
    main()

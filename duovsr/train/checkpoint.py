"""Checkpoints of a run: torch.distributed.checkpoint, written in the background, picked up only when whole.

`checkpoints/latest` names the newest finished one and is replaced atomically after the write has ended, so that a
checkpoint cut short by a crash is never read. Saved by any number of processes, loaded by any other.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from duovsr.errors import DuovsrError, InputError
from duovsr.train.distributed import World
from duovsr.weights import atomic_file

State = Mapping[str, Any]

# A job of one process is on purpose; said from a thread, so that only a filter of the whole process stops it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class Checkpoints:
    """The last `keep` checkpoints under `folder`. Every rank calls every method."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep = folder, keep
        self._first, self._joined = world.first, world.mesh is not None
        self._pending: tuple[Path, Future[Any]] | None = None
        # The background write's own group: two threads must not speak on one.
        self._group = dist.new_group(backend="gloo") if self._joined else None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error other ranks may be gone, and would be waited for.
        if kind is None or not self._joined:
            self.wait()

    def latest(self) -> Path | None:
        pointer = self.folder / "latest"
        return self.folder / pointer.read_text().strip() if pointer.exists() else None

    def save(self, state: State, step: int) -> None:
        """Copy `state` and write it in the background."""
        self.wait()
        path = self.folder / f"step_{step:08d}"
        if self._first and path.exists():
            shutil.rmtree(path)  # what a crash left there
        if self._joined:
            dist.barrier()
        future = async_save(dict(state), checkpoint_id=path, process_group=self._group, no_dist=not self._joined)
        assert isinstance(future, Future)  # as it is for the writer that runs in a thread
        self._pending = path, future

    def wait(self) -> None:
        """Finish the write under way and point to it. Raises DuovsrError where it failed."""
        if self._pending is None:
            return
        path, future = self._pending
        self._pending = None
        with told_of(path):
            future.result()
        if self._joined:
            dist.barrier()
        self._point_to(path)

    def publish(self) -> None:
        """Point to the write under way if it has ended: at once, not at the next save, for a crash may come between."""
        if self._pending is None:
            return
        path, future = self._pending
        if future.done() and future.exception() is None:  # whole on every rank: the first writes its metadata last
            self._point_to(path)

    def _point_to(self, path: Path) -> None:
        """Name `path` the newest and drop the oldest."""
        if not self._first or path == self.latest():
            return
        with atomic_file(self.folder / "latest") as partial:
            partial.write_text(path.name)
        finished = sorted(p for p in self.folder.glob("step_*") if p.name <= path.name)
        for old in finished[: -self.keep]:
            shutil.rmtree(old)

    def load(self, state: dict[str, Any]) -> bool:
        """Fill `state` in place from the newest checkpoint; False if there is none."""
        path = self.latest()
        if path is None:
            return False
        try:
            load(state, checkpoint_id=path, no_dist=not self._joined)
        except (CheckpointException, OSError, ValueError, RuntimeError) as error:
            names = ", ".join(p.name for p in sorted(self.folder.glob("step_*")))
            raise InputError(
                f"damaged checkpoint, or one of another model: `{path}`",
                hint=f"write another of {names} into `{self.folder / 'latest'}`, or start anew",
            ) from error
        return True


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """torch's writers have errors of their own for a full disk and the like. Raises DuovsrError in their place."""
    try:
        yield
    except (CheckpointException, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DuovsrError(
            f"cannot write `{path}`: {reason}",
            hint="free some space; the same command goes on from the last checkpoint",
        ) from error

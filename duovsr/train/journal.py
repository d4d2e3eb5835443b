"""What a run leaves to read: settings, versions, metrics (JSONL, and TensorBoard events where it is installed)."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout

from duovsr.errors import InputError, UsageError
from duovsr.repository import CONFIG
from duovsr.train.options import StageConfig
from duovsr.train.pool import RECORD as POOL_RECORD
from duovsr.weights import atomic_file

SETTINGS, METRICS, _LOCK = "settings.json", "metrics.jsonl", "lock"
_MARKS = {SETTINGS: "a run", POOL_RECORD: "a pool", CONFIG: "a model"}
_FREE = ("threads", "log_every", "save_every", "keep", "device")  # may change from one start to the next


class Journal:
    """Writes the metrics of a run from step `start` on; lines of steps that will be repeated are dropped."""

    def __init__(self, folder: Path, start: int, active: bool) -> None:
        self._path, self._active, self._began = folder / METRICS, active, time.monotonic()
        self._events: Any = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_from(start)
        self._file = self._path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._events = SummaryWriter(str(folder), purge_step=start)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def log(self, step: int, values: dict[str, float]) -> None:
        if not self._active:
            return
        self._file.write(
            json.dumps({"step": step, "seconds": round(time.monotonic() - self._began, 1), **values}) + "\n"
        )
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def _drop_from(self, start: int) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) < start]
        with atomic_file(self._path) as partial:
            partial.write_text("".join(kept))


def _step_of(line: str) -> float:
    """No step at all comes before a line that is cut off, or damaged."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process: two that write one run spoil it. Raises UsageError where another holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)  # the system frees it when its holder dies, however it dies
    except Timeout:
        hint = "wait for it, or choose another `--out`"
        raise UsageError(f"another process is writing to `{folder}`", hint=hint) from None
    try:
        yield
    finally:
        lock.release()


def refuse_others(folder: Path, own: str | None) -> None:
    """Raises UsageError where `folder` holds what another command made. `own`: the file that marks one's own."""
    for mark, what in _MARKS.items():
        if mark != own and (folder / mark).exists():
            raise UsageError(f"`{folder}` holds {what}: `{mark}`", hint="choose another `--out`")


def note_settings(folder: Path, stage: str, preset: str, config: StageConfig, inputs: dict[str, object]) -> None:
    """Write a new run's settings and versions; refuse to resume a run that had others. Raises UsageError,
    and InputError where they cannot be read."""
    path = folder / SETTINGS
    described = json.loads(
        json.dumps(
            {
                "stage": stage,
                "preset": preset,
                "settings": asdict(config),
                "inputs": inputs,
                "versions": {
                    "duovsr": version("duovsr"),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
            },
            default=str,
        )
    )
    if not path.exists() or {each.name for each in folder.iterdir()} <= {SETTINGS, _LOCK}:  # nothing done yet
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(described, indent=1) + "\n")
        return
    try:
        noted = json.loads(path.read_text())
        different = _different(noted, described)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"damaged settings of a run: `{path}`", hint="choose another `--out`") from error
    if different:
        raise UsageError(
            f"run `{folder}` was started with other settings: {', '.join(different)}",
            hint="resume with the same command, or choose another `--out`",
        )


def _different(noted: dict[str, Any], described: dict[str, Any]) -> list[str]:
    """What a resumed run may not change, and did."""
    settings, inputs = described["settings"], described["inputs"]
    different = [name for name in ("stage", "preset") if noted[name] != described[name]]
    different += [k for k in inputs if noted["inputs"].get(k) != inputs[k]]
    different += [k for k in settings if k not in _FREE and noted["settings"].get(k, settings[k]) != settings[k]]
    return different

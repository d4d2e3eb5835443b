"""What a run leaves to read: settings, versions, metrics (JSONL, and TensorBoard events where it is installed)."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from duovsr.errors import UsageError
from duovsr.train.options import StageConfig

SETTINGS, METRICS = "settings.json", "metrics.jsonl"
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
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < start]
        partial = self._path.with_suffix(".part")
        partial.write_text("".join(kept))
        os.replace(partial, self._path)


def note_settings(folder: Path, stage: str, preset: str, config: StageConfig, inputs: dict[str, object]) -> None:
    """Write a new run's settings and versions; refuse to resume a run that had others. Raises UsageError."""
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
    if not path.exists() or not (folder / "checkpoints" / "latest").exists():  # nothing done yet
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(described, indent=1) + "\n")
        return
    noted = json.loads(path.read_text())
    different = [name for name in ("stage", "preset") if noted[name] != described[name]]
    settings = described["settings"]
    different += [k for k in described["inputs"] if noted["inputs"].get(k) != described["inputs"][k]]
    different += [k for k in settings if k not in _FREE and noted["settings"].get(k, settings[k]) != settings[k]]
    if different:
        raise UsageError(
            f"run `{folder}` was started with other settings: {', '.join(different)}",
            hint="resume with the same command, or choose another `--out`",
        )

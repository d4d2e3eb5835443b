"""Who computes attention: which implementations a GPU has, and which of them is fastest for a class of shapes.

That is measured once, the first time a class occurs, and kept for the device and the versions in a file of the user's
cache folder. The file only saves time: where it cannot be read or written, each process measures anew.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from duovsr.errors import UsageError
from duovsr.kernels.dispatch import triton_failure

BACKENDS = ("triton", "cudnn", "sdpa", "xformers")  # ours; torch's by cuDNN; torch's by its own choice; xformers'
_WARM_UP, _TIMED = 2, 5


def failure(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot be used on `device`; None: it can. torch's own is everywhere."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return "needs CUDA"
    if backend == "triton":
        return triton_failure(device.index or 0)
    if backend == "cudnn":
        return None if torch.backends.cudnn.is_available() else "torch has no cuDNN"
    return None if find_spec("xformers") is not None else "not installed"


def misfit(backend: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `backend` cannot compute such attention; None: it can."""
    half = dtype in (torch.bfloat16, torch.float16)
    if backend == "triton":  # float32 products of three parts, of wide heads, are more than the registers hold
        fits = head_dim in (16, 32, 64, 128) and (half or (dtype == torch.float32 and head_dim <= 64))
    else:
        fits = backend == "sdpa" or (half and head_dim % 8 == 0 and head_dim <= 128)
    return None if fits else f"heads of {head_dim} in {str(dtype).removeprefix('torch.')}"


def require(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raises UsageError for a backend that does not exist, is not available, or cannot compute such attention."""
    if backend == "auto":
        return
    if backend not in BACKENDS:
        raise UsageError(f"unknown attention: `{backend}`", hint=f"use auto, {', '.join(BACKENDS)}")
    reason = failure(backend, device) or misfit(backend, dtype, head_dim)
    if reason is not None:
        raise UsageError(f"attention `{backend}` is not available: {reason}", hint="see `duovsr doctor`, or use `auto`")


def usable(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    return [name for name in BACKENDS if (failure(name, device) or misfit(name, dtype, head_dim)) is None]


def describe(device: torch.device) -> dict[str, Any]:
    """Each backend, available or why not; and what `auto` takes: by class of shapes where it was measured."""
    found: dict[str, Any] = {name: failure(name, device) or "available" for name in BACKENDS}
    if device.type != "cuda":
        return {**found, "auto": "sdpa"}
    measured = Remembered.of(device).choices()
    times = {
        shape: ", ".join(f"{name} {ms:.2f} ms" for name, ms in sorted(kept["milliseconds"].items(), key=lambda x: x[1]))
        for shape, kept in measured.items()
    }
    return {**found, "auto": times or "measured at the first use of a shape"}


def fastest(
    shape: str,
    candidates: Mapping[str, Callable[[], object]],
    remembered: Remembered,
    timer: Callable[[Callable[[], object]], float],
) -> str:
    """The candidate that takes the least time for the class `shape`: as remembered, or as `timer` measures now."""
    known = remembered.choices().get(shape, {}).get("backend")
    if known in candidates:
        return known
    milliseconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, compute in candidates.items():
        try:
            milliseconds[name] = timer(compute)
        except torch.OutOfMemoryError:
            raise  # the plan's to answer
        except RuntimeError as error:  # a library without kernels for this GPU says so when it is called
            failures[name] = (str(error).splitlines() or ["?"])[0]
    if not milliseconds:
        raise RuntimeError(f"no attention for {shape}: {failures}")
    chosen = min(milliseconds, key=lambda name: milliseconds[name])
    remembered.add(shape, {"backend": chosen, "milliseconds": milliseconds, "failures": failures})
    return chosen


@dataclass(frozen=True)
class Remembered:
    """What was measured on one machine, a device with its versions."""

    file: Path
    machine: str

    @classmethod
    def of(cls, device: torch.device) -> Remembered:
        return cls(_cache_folder() / "attention.json", f"{torch.cuda.get_device_name(device)}, {versions()}")

    def choices(self) -> dict[str, Any]:
        """By class of shapes: the backend, milliseconds by backend, and who failed how."""
        return self._read().get(self.machine, {})

    def add(self, shape: str, choice: dict[str, Any]) -> None:
        everything = self._read()
        everything.setdefault(self.machine, {})[shape] = choice
        with suppress(OSError):  # a read-only or full disk: it is measured again another time
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, suffix=".partial", delete=False) as partial:
                json.dump(everything, partial, indent=1)
            os.replace(partial.name, self.file)

    def _read(self) -> dict[str, Any]:
        try:
            read = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        places = read.items() if isinstance(read, dict) else ()
        return {machine: choices for machine, choices in places if isinstance(choices, dict)}


@cache
def versions() -> str:
    """Of all that computes attention, and of this package, whose kernels change with it."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("duovsr", "triton", "xformers"))
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {packages}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cuda_milliseconds(compute: Callable[[], object]) -> float:
    """The median of a few runs after a warm-up, in which kernels are compiled."""
    for _ in range(_WARM_UP):
        compute()
    times = []
    for _ in range(_TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        compute()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duovsr"

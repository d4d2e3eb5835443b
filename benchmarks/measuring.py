"""What the benchmarks share: what they run on, times and their spread, the hardware's own speeds, results files."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from duovsr.engine.bench import describe_machine, peak_rss
from duovsr.engine.memory import synchronize
from duovsr.kernels.backends import versions

RESULTS = Path(__file__).parent / "results"


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, driver and versions, for results files."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **describe_machine(device),
        "driver": _driver() if device.type == "cuda" else None,
        "versions": versions(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, stdout=subprocess.PIPE, text=True, check=False).stdout.split("\n")[0]


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def milliseconds(
    compute: Callable[[], object],
    device: torch.device,
    repeat: int = 15,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median and spread after a warm-up, which compiles: by events on a GPU, else by `clock`."""
    for _ in range(warm_up):
        compute()
    if device.type != "cuda":
        times = []
        for _ in range(repeat):
            began = clock()
            compute()
            times.append(1000 * (clock() - began))
        return summary(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for start, end in events:
        start.record()
        compute()
        end.record()
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) for start, end in events])


@dataclass(frozen=True)
class Peaks:
    """What a device was measured to do, a second: one matrix product, and copies. The host's memory is page-locked."""

    dtype: str
    flops: float
    bytes: float  # read and written
    bytes_to_device: float
    bytes_to_host: float


def measure_peaks(device: torch.device, dtype: torch.dtype, small: bool) -> Peaks:
    """By one large matrix product of random values, and by copies; on a CPU the latter are all the same."""
    side, count = (256, 2**20) if small else (8192, 2**30)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.ones(count // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    part = target[: count // 4]

    def a_second(amount: float, compute: Callable[[], object]) -> float:
        return amount / milliseconds(compute, device, repeat=10)["median"] * 1000

    return Peaks(
        dtype=str(dtype).removeprefix("torch."),
        flops=a_second(2 * side**3, lambda: a @ b),
        bytes=a_second(2 * count, lambda: target.copy_(source)),
        bytes_to_device=a_second(count // 4, lambda: part.copy_(host, non_blocking=True)),
        bytes_to_host=a_second(count // 4, lambda: host.copy_(part, non_blocking=True)),
    )


class PeakMemory:
    """The most that a GPU's tensors took at once since this was made; of a CPU, that the process ever held."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_host_bytes()


def peak_host_bytes() -> int:
    """The most host memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a child starts at its parent's size on Linux; VmHWM does not
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return peak_rss()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """All of it or nothing: who is stopped while writing leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)

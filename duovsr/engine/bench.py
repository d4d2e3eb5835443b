"""`duovsr bench`: load time, the share of each stage, speed and peak memory, on a clip or on synthetic frames."""

from __future__ import annotations

import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duovsr.engine.plan import Plan
from duovsr.engine.upscaler import StageTimes, Upscaler
from duovsr.options import UpscaleOptions

_SYNTHETIC_SIZE = (320, 180)
_SYNTHETIC_FRAMES = 33


def run_bench(
    clip: Path | None, options: UpscaleOptions, *, model: str, device: str, dtype: str, repeat: int
) -> dict[str, Any]:
    """Medians over `repeat` runs after one warm-up. With a clip: from file to file, in a temporary folder."""
    began = time.perf_counter()
    upscaler = Upscaler.from_preset(model, device=device, dtype=dtype)
    load = time.perf_counter() - began
    run = partial(_run_file, upscaler, clip, options) if clip else partial(_run_synthetic, upscaler, options)
    runs = [run() for _ in range(repeat + 1)]
    fps = [run["fps"] for run in runs[1:]]
    return {
        "clip": str(clip) if clip else f"synthetic {_SYNTHETIC_SIZE[0]}x{_SYNTHETIC_SIZE[1]}",
        "target_size": runs[0]["target_size"],
        "load_seconds": load,
        "first_run_fps": runs[0]["fps"],
        "fps": statistics.median(fps),
        "fps_spread": [min(fps), max(fps)],
        "stage_seconds": {name: statistics.median(r["stages"][name] for r in runs[1:]) for name in runs[0]["stages"]},
        "peak_rss_gib": peak_rss() / 2**30,
        "peak_device_gib": _peak_device_memory(upscaler.model.device),
        "machine": describe_machine(upscaler.model.device),
        "dtype": str(upscaler.model.dtype).removeprefix("torch."),
    }


def peak_rss() -> int:
    """The most host memory that this process has held, in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def seconds_per_frame(upscaler: Upscaler, plan: Plan, options: UpscaleOptions) -> float:
    """Measured on one steady chunk of the plan; decoding and encoding run beside it and are not in it."""
    times: list[float] = []
    frames = _moving_noise(*plan.source_size, 2 * plan.chunk + 1)
    last = time.perf_counter()
    for _ in upscaler.stream(frames, options):
        times.append(time.perf_counter() - last)
        last = time.perf_counter()
    return sum(times[plan.chunk + 1 :]) / plan.chunk


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for result files."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _run_synthetic(upscaler: Upscaler, options: UpscaleOptions) -> dict[str, Any]:
    plan, stages = upscaler.plan(*_SYNTHETIC_SIZE, options), StageTimes()
    frames = _moving_noise(*_SYNTHETIC_SIZE, _SYNTHETIC_FRAMES)
    began = time.perf_counter()
    outputs = sum(1 for _ in upscaler.restore(frames, plan, options, stages, []))
    fps = outputs / (time.perf_counter() - began)
    return {"fps": fps, "target_size": plan.target_size, "stages": asdict(stages)}


def _run_file(upscaler: Upscaler, clip: Path, options: UpscaleOptions) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = upscaler.upscale_file(clip, Path(folder) / "out.mkv", options)
    stages = asdict(report.stages)
    return {"fps": report.frames / report.seconds, "target_size": report.plan.target_size, "stages": stages}


def _moving_noise(width: int, height: int, count: int) -> Iterator[np.ndarray]:
    """Smooth texture drifting by a pixel a frame."""
    canvas = np.random.default_rng(0).integers(0, 256, (height // 4 + 2, (width + count) // 4 + 2, 3), np.uint8)
    canvas = canvas.repeat(4, axis=0).repeat(4, axis=1)
    for n in range(count):
        yield np.ascontiguousarray(canvas[:height, n : n + width])


def _peak_device_memory(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (FileNotFoundError, StopIteration):
        return platform.processor()

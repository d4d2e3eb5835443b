"""`duovsr bench`: load time, the share of each stage, speed and peak memory, on a clip or on synthetic frames; and the
paper's workload by a model of random weights, which are as fast as others."""

from __future__ import annotations

import platform
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from duovsr.engine.plan import TEMPORAL_FACTOR, Plan
from duovsr.engine.precision import choose_device
from duovsr.engine.stages import StageTimes
from duovsr.engine.upscaler import Upscaler
from duovsr.errors import UsageError
from duovsr.model.layers import channels_last
from duovsr.model.one_step import OneStepModel, new_autoencoder
from duovsr.model.prompt import Prompt
from duovsr.model.transformer import Transformer
from duovsr.options import PRESETS, Preset, UpscaleOptions

_SYNTHETIC_SIZE = (320, 180)
_SYNTHETIC_FRAMES = 33
_PHASES = ("encode", "transformer", "decode")


def run_bench(
    clip: Path | None,
    options: UpscaleOptions,
    *,
    model: str,
    device: str,
    dtype: str,
    repeat: int,
    vae: str | None,
) -> dict[str, Any]:
    """The run of median speed among `repeat` after one warm-up. With a clip: from file to file, in a temporary folder.

    `stage_share` adds up to 1 with `other`: all that is no stage, such as putting the file together.
    """
    began = time.perf_counter()
    upscaler = Upscaler.from_preset(model, device=device, dtype=dtype, vae=vae)
    load = time.perf_counter() - began
    run = partial(_run_file, upscaler, clip, options) if clip else partial(_run_synthetic, upscaler, options)
    first, *runs = [run() for _ in range(repeat + 1)]
    runs.sort(key=attrgetter("fps"))
    median = runs[len(runs) // 2]
    return {
        "clip": str(clip) if clip else f"synthetic {_SYNTHETIC_SIZE[0]}x{_SYNTHETIC_SIZE[1]}",
        "target_size": first.plan.target_size,
        "load_seconds": load,
        "first_run_fps": first.fps,
        "fps": median.fps,
        "fps_spread": [runs[0].fps, runs[-1].fps],
        "seconds": median.seconds,
        "stage_seconds": median.stages,
        "stage_share": median.shares,
        "peak_rss_gib": peak_rss() / 2**30,
        "peak_device_gib": _peak_device_memory(upscaler.model.device),
        "machine": describe_machine(upscaler.model.device),
        "dtype": upscaler.model.precision,
    }


@dataclass(frozen=True)
class _Measured:
    """A run over a clip."""

    plan: Plan
    frames: int
    seconds: float
    stages: dict[str, float]

    @property
    def fps(self) -> float:
        return self.frames / self.seconds

    @property
    def shares(self) -> dict[str, float]:
        shares = {stage: seconds / self.seconds for stage, seconds in self.stages.items()}
        return {**shares, "other": 1 - sum(shares.values())}


def run_workload(
    model: str,
    size: tuple[int, int],
    frames: int,
    *,
    device: str,
    dtype: str,
    window: int | None,
    repeat: int,
    vae: str | None,
) -> dict[str, Any]:
    """One clip of `frames` frames, restored to `size` (width, height) in one call by a model of random weights.

    The run of median speed among `repeat` after one warm-up. `tflop` is counted from the code, by phase. Raises
    UsageError for an unknown preset and for a number of frames that is not 4k + 1.
    """
    if model not in PRESETS:
        raise UsageError(f"unknown preset: `{model}`", hint=f"random weights are made for {', '.join(PRESETS)}")
    if frames < 1 or frames % TEMPORAL_FACTOR != 1:
        raise UsageError(f"unsupported number of frames: `{frames}`", hint="use 4k + 1 frames: 5, 9, ... 21")
    chosen, preset = choose_device(device), PRESETS[model].with_vae(vae)
    upscaler = Upscaler.loaded(partial(random_model, preset, chosen), dtype, chosen, window)
    options = UpscaleOptions(
        size=size, chunk=max(frames - 1, TEMPORAL_FACTOR), overlap=None if preset.transformer.streams else 0
    )
    width, height = (-(-side // 4) for side in size)
    plan = upscaler.plan(width, height, options)
    notices: list[str] = []
    runs = [_run(upscaler, plan, options, frames, notices) for _ in range(repeat + 1)][1:]
    runs.sort(key=attrgetter("seconds"))
    median = runs[len(runs) // 2]
    seconds = {stage: median.stages[stage] for stage in (*_PHASES, "color", "copies")}
    seconds["copies"] += median.stages["resize"]
    tflop = {phase: flops / 1e12 for phase, flops in count_flops(upscaler.model, plan, options, frames).items()}
    return {
        "workload": f"{model}, random weights, {frames} frames of {size[0]}x{size[1]}",
        "plan": plan.to_json(),
        "seconds": {**seconds, "total": median.seconds},
        "seconds_spread": [runs[0].seconds, runs[-1].seconds],
        "share": median.shares,
        "tflop": tflop,
        "tflop_per_second": {phase: tflop[phase] / seconds[phase] for phase in tflop},
        "notices": notices,
        "planned_gib": plan.memory_bytes / 2**30,
        "peak_rss_gib": peak_rss() / 2**30,
        "peak_device_gib": _peak_device_memory(chosen),
        "machine": describe_machine(chosen),
        "dtype": plan.dtype,
    }


def random_model(preset: Preset, device: torch.device, dtype: torch.dtype) -> OneStepModel:
    """A model of random weights that keep the size of signals."""
    with torch.device("meta"):
        parts = Transformer(preset.transformer), new_autoencoder(preset.vae), Prompt(preset.transformer)
    for part in parts:
        part.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        for name, tensor in part.state_dict().items():
            if tensor.dim() > 1 and tensor[0].numel() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            else:
                tensor.fill_(0 if name.endswith("bias") else 1)
    transformer, vae, prompt = parts
    return OneStepModel(preset, transformer, channels_last(vae), prompt.tokens(1), digest="random")


def count_flops(model: OneStepModel, plan: Plan, options: UpscaleOptions, frames: int) -> dict[str, int]:
    """By phase, of a scene's first call, on the meta device: 2 a multiplication and addition."""
    counted: dict[str, int] = defaultdict(int)

    @contextmanager
    def watch(phase: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as flops:
            yield
        counted[phase] += flops.get_total_flops()

    meta = random_model(model.preset, torch.device("meta"), model.dtype)
    lq = torch.empty(1, 3, frames, plan.target_size[1], plan.target_size[0], device="meta")
    states = (None,) * len(plan.tiles)
    plan = replace(plan, offload=False)  # a matter of where the weights are, and these are nowhere
    Upscaler(meta).restore_lq(lq, 0, states, plan, options, watch)
    return dict(counted)


def peak_rss() -> int:
    """The most host memory that this process has held, in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def seconds_per_frame(upscaler: Upscaler, plan: Plan, options: UpscaleOptions) -> float:
    """Measured on one steady chunk of the plan; decoding and encoding run beside it and are not in it."""
    frames = _moving_noise(*plan.source_size, 2 * plan.chunk + (plan.overlap or 0) + 1)
    run = upscaler.begin(plan, replace(options, scene_cuts=False), StageTimes(), [])
    states, seconds = None, 0.0
    for chunk in upscaler.chunks(frames, run):
        began = time.perf_counter()
        _, states = upscaler.finish(upscaler.launch(chunk, states, run), states, run)
        seconds = time.perf_counter() - began
    return seconds / plan.chunk


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


def _run_synthetic(upscaler: Upscaler, options: UpscaleOptions) -> _Measured:
    return _run(upscaler, upscaler.plan(*_SYNTHETIC_SIZE, options), options, _SYNTHETIC_FRAMES, [])


def _run(upscaler: Upscaler, plan: Plan, options: UpscaleOptions, frames: int, notices: list[str]) -> _Measured:
    """From frames to frames."""
    stages, began = StageTimes(), time.perf_counter()
    for _ in upscaler.restore(_moving_noise(*plan.source_size, frames), plan, options, stages, notices):
        pass
    return _Measured(plan, frames, time.perf_counter() - began, asdict(stages))


def _run_file(upscaler: Upscaler, clip: Path, options: UpscaleOptions) -> _Measured:
    with tempfile.TemporaryDirectory() as folder:
        report = upscaler.upscale_file(clip, Path(folder) / "out.mkv", options)
    return _Measured(report.plan, report.frames, report.seconds, asdict(report.stages))


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

"""Clips of frames in host memory, restored to frames in host memory: in all, by stages as the engine measures them,
and beside their floor.

The floor is the counted work at what the device was measured to do: encoding, transformer and decoding are bound by
arithmetic (the matrix product of `Peaks`), resizing, colour and copies by the bytes that they must read and write.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import PeakMemory, Peaks, summary

from duovsr.engine.bench import count_flops, random_model
from duovsr.engine.plan import TEMPORAL_FACTOR, Plan
from duovsr.engine.stages import StageTimes
from duovsr.engine.upscaler import Upscaler
from duovsr.kernels.backends import Remembered
from duovsr.options import PRESETS, Preset, TinyVAEConfig, UpscaleOptions, WanVAEConfig

PHASES = ("encode", "transformer", "decode")


@dataclass(frozen=True)
class Workload:
    """A clip of uint8 frames of a quarter of `size` (width, height), restored to `size` by random weights: in one call
    of the model, or in the calls of a long clip (`whole` False)."""

    name: str
    preset: Preset
    size: tuple[int, int]
    frames: int
    window: int | None = None  # output pixels a side
    tile: int | None = None
    attention: str = "auto"
    whole: bool = True

    def options(self) -> UpscaleOptions:
        streams = self.preset.transformer.streams
        chunk, overlap = (max(self.frames - 1, TEMPORAL_FACTOR), None if streams else 0) if self.whole else (None, None)
        return UpscaleOptions(size=self.size, chunk=chunk, overlap=overlap, tile=self.tile, scene_cuts=False)

    def source(self) -> list[np.ndarray]:
        width, height = (-(-side // 4) for side in self.size)
        return list(np.random.default_rng(0).integers(0, 256, (self.frames, height, width, 3), np.uint8))

    def upscaler(self, device: torch.device, dtype: str) -> Upscaler:
        make = partial(random_model, self.preset, device)
        return Upscaler.loaded(make, dtype, device, self.window, self.attention)


def preset_of(name: str, vae: str | None = None, small: bool = False) -> Preset:
    """A preset, or its like with widths for a test."""
    preset = PRESETS[name].with_vae(vae)
    if not small:
        return preset
    narrow = replace(preset.transformer, dim=32, ffn_dim=32, heads=2, layers=2, text_dim=16, text_length=4)
    widths = TinyVAEConfig(encoder_width=8, width_8=8, width_4=8)
    return replace(
        preset, transformer=narrow, vae=WanVAEConfig(dim=4) if isinstance(preset.vae, WanVAEConfig) else widths
    )


def measure(
    workload: Workload, device: torch.device, dtype: str, peaks: Peaks, repeat: int, deadline: float
) -> dict[str, Any]:
    """A row. After a warm-up, `repeat` runs, or fewer where `deadline` (of time.monotonic) passes before."""
    upscaler, options, source = workload.upscaler(device, dtype), workload.options(), workload.source()
    plan = upscaler.plan(source[0].shape[1], source[0].shape[0], options)
    notices: list[str] = []

    def run() -> dict[str, float]:
        stages, began = StageTimes(), time.perf_counter()
        count = sum(1 for _ in upscaler.restore(iter(source), plan, options, stages, notices))
        assert count == len(source)
        return {**asdict(stages), "total": time.perf_counter() - began}

    first, peak = run(), PeakMemory(device)
    runs = [run()]
    while len(runs) < repeat and time.monotonic() < deadline:
        runs.append(run())
    stages = {stage: summary([run[stage] for run in runs]) for stage in first}
    total = stages.pop("total")
    row = {
        "workload": f"{workload.name}, {workload.frames} frames of {workload.size[0]}x{workload.size[1]}",
        "weights": "random",
        "dtype": plan.dtype,
        "runs": len(runs),
        "seconds": total,
        "first_seconds": first["total"],
        "frames_per_second": len(source) / total["median"],
        "stages": stages,
        "peak_gib": peak.bytes() / 2**30,
        "planned_gib": plan.memory_bytes / 2**30,
        "plan": plan.to_json(),
        "attention": Remembered.of(device).choices() if device.type == "cuda" else {},
        "notices": notices,
    }
    if workload.whole:
        flops = count_flops(upscaler.model, plan, options, workload.frames)
        least = floors(plan, workload.frames, flops, peaks)
        row |= {
            "tflop": {phase: flops[phase] / 1e12 for phase in PHASES},
            "floor_seconds": {**least, "total": sum(least.values())},
            "times_floor": {stage: stages[stage]["median"] / floor for stage, floor in least.items()}
            | {"total": total["median"] / sum(least.values())},
        }
    return row


def floors(plan: Plan, frames: int, flops: dict[str, int], peaks: Peaks) -> dict[str, float]:
    """Seconds that each stage cannot do without. Frames are uint8 on the host and float32 on the device."""
    source, target = (3 * frames * width * height for width, height in (plan.source_size, plan.target_size))
    return {
        "copies": source / peaks.bytes_to_device + target / peaks.bytes_to_host,
        "resize": 4 * (source + target) / peaks.bytes,
        **{phase: flops[phase] / peaks.flops for phase in PHASES},
        "color": 3 * 4 * target / peaks.bytes,  # the LQ and the result are read, and one is written
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of `measure` in Markdown: seconds, and how many times the floor they are."""
    lines = [
        "| workload | seconds (range) | times the floor | peak memory (planned) | encode | transformer | decode |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds, times = row["seconds"], row.get("times_floor", {})
        cells = [
            row["workload"],
            f"{seconds['median']:.3f} ({seconds['least']:.3f} to {seconds['most']:.3f})",
            f"{times['total']:.2f}" if times else "",
            f"{row['peak_gib']:.1f} GiB ({row['planned_gib']:.1f})",
            *(f"{row['stages'][p]['median']:.3f}" + (f" ({times[p]:.2f}x)" if times else "") for p in PHASES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

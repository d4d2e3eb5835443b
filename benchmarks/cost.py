"""What more frames, more pixels, tiles and windows cost.

`python benchmarks/cost.py` measures `tiny` on the CPU, one thread, each row in a process of its own, whose peak memory
is noted; processor time stands beside wall time, because it depends less on what else the machine does. And it counts
`1.3b` on the meta device, nothing of which is measured: the work of its parts, the planned memory, and where windows
begin to need less than full attention. Only attention alone is timed there, on both sides of that place. Writes
`results/cost.json`.

`python benchmarks/cost.py --device cuda` measures `tiny` and `1.3b` on a GPU, without PyAV: `results/cost_cuda.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import RESULTS, PeakMemory, describe, milliseconds, summary, write_json
from torch.utils.flop_counter import FlopCounterMode
from workloads import PHASES, Workload, preset_of

from duovsr.engine.bench import count_flops, random_model
from duovsr.engine.chunks import cut_into_chunks
from duovsr.engine.memory import release_memory, spendable, weight_bytes
from duovsr.engine.plan import PAD_MULTIPLE, Plan, Precision, WeightBytes, plan_clip
from duovsr.engine.precision import choose_device, choose_dtype, with_window
from duovsr.engine.stages import StageTimes
from duovsr.engine.upscaler import Upscaler
from duovsr.kernels.attention import attention
from duovsr.model.one_step import OneStepModel
from duovsr.options import UpscaleOptions, WindowConfig

SIZES = {"540p": (960, 540), "720p": (1280, 720), "1080p": (1920, 1080), "1440p": (2560, 1440), "2160p": (3840, 2160)}
FRAMES = (21, 51, 101, 151, 201)
WINDOW = 512  # output pixels a side
CLIP = 21  # frames that `1.3b` restores at once
CARD = 24  # GB
Row = dict[str, Any]


def rows_of_tiny(small: bool) -> list[Row]:
    """What is measured: the series, and the clip."""
    if small:
        clips = [("frames", (64, 36), n, 0) for n in (5, 9)]
        clips += [("pixels", size, 5, 512) for size in ((64, 36), (560, 32))]
    else:
        clips = [("frames", (256, 144), n, 0) for n in FRAMES]
        clips += [("pixels", size, 5, tile) for size in SIZES.values() for tile in (0, 768)]
        clips += [("tiles", SIZES["1080p"], 5, tile) for tile in (1536, 1024, 512)]
    return [
        {"series": s, "model": "tiny", "size": size, "frames": n, "tile": tile, "window": None}
        for s, size, n, tile in clips
    ]


def rows_of_wan(small: bool) -> list[Row]:
    """The same of `1.3b`, for a GPU: by frames in clips of 21, by pixels with full attention and with windows."""
    if small:
        clips = [("frames", (64, 48), 9, None), ("pixels", (64, 48), 5, 32)]
    else:
        clips = [("frames", SIZES["540p"], n, None) for n in FRAMES]
        clips += [("pixels", SIZES[name], CLIP, w) for name in list(SIZES)[:4] for w in (None, WINDOW)]
    return [
        {"series": s, "model": "1.3b", "size": size, "frames": n, "tile": 0, "window": w} for s, size, n, w in clips
    ]


def measure(row: Row, device: torch.device, repeat: int, small: bool) -> Row:
    """Of a row, after a warm-up: seconds, and the peak of this process or of the GPU."""
    preset = preset_of(row["model"], small=small)
    workload = Workload("", preset, row["size"], row["frames"], row["window"], row["tile"], whole=False)
    if row["model"] == "tiny" and not small:
        upscaler = Upscaler.from_preset("tiny", device=device.type)
    else:
        upscaler = workload.upscaler(device, "auto")
    options, source = workload.options(), workload.source()
    plan = upscaler.plan(source[0].shape[1], source[0].shape[0], options)
    wall, processor, peak = [], [], PeakMemory(device)
    for _ in range(repeat + 1):
        began, used = time.perf_counter(), time.process_time()
        assert sum(1 for _ in upscaler.restore(iter(source), plan, options, StageTimes(), [])) == len(source)
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    return {
        **row,
        "tiles": len(plan.tiles),
        "tile_pixels": sum(tile.width * tile.height for tile in plan.tiles),
        "chunk": plan.chunk,
        "dtype": plan.dtype,
        "seconds": summary(wall[1:]),
        "processor_seconds": summary(processor[1:]),
        "peak_gib": peak.bytes() / 2**30,
        "planned_gib": plan.memory_bytes / 2**30,
    }


def measure_alone(row: Row, repeat: int, small: bool) -> Row:
    """In a process of its own, on the CPU."""
    command = [sys.executable, __file__, "--row", json.dumps(row), "--repeat", str(repeat)]
    done = subprocess.run([*command, *["--small"] * small], stdout=subprocess.PIPE, text=True, check=True)
    measured: Row = json.loads(done.stdout)
    return measured


def line(xs: list[float], ys: list[float]) -> Row:
    """The line of the least relative squares, and how far a point is from it at the most, as a part of the point."""
    design = torch.tensor([[1 / y, x / y] for x, y in zip(xs, ys, strict=True)], dtype=torch.float64)
    start, slope = torch.linalg.lstsq(design, torch.ones(len(ys), 1, dtype=torch.float64)).solution[:, 0].tolist()
    off = max(abs((start + slope * x) / y - 1) for x, y in zip(xs, ys, strict=True))
    return {"start": start, "slope": slope, "largest_deviation": off}


def lines(rows: list[Row], clock: str) -> Row:
    """Seconds by `clock` as lines: by frames, by pixels of the frame, by pixels of all tiles."""

    def fit(chosen: list[Row], x: Callable[[Row], float]) -> Row | None:
        return line([x(row) for row in chosen], [row[clock]["median"] for row in chosen]) if len(chosen) > 1 else None

    found: Row = {"clock": clock}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        pixels = [row for row in own if row["series"] == "pixels"]
        ways = dict.fromkeys((row["tile"], row["window"]) for row in pixels)
        found[model] = {
            "by_frames": fit([row for row in own if row["series"] == "frames"], lambda row: row["frames"]),
            "by_megapixels": {
                f"tile {tile}, window {window}": fit(
                    [row for row in pixels if (row["tile"], row["window"]) == (tile, window)], megapixels
                )
                for tile, window in ways
            },
            "by_megapixels_of_all_tiles": fit(
                [row for row in own if row["series"] != "frames"], lambda row: row["tile_pixels"] / 1e6
            ),
        }
    return found


def megapixels(row: Row) -> float:
    pixels: float = row["size"][0] * row["size"][1] / 1e6
    return pixels


def plan_for(model: OneStepModel, size: tuple[int, int], options: UpscaleOptions, free: int) -> Plan:
    weights = WeightBytes(weight_bytes(model.transformer), weight_bytes(model.vae))
    bfloat16 = Precision("bfloat16", 2, weights, spendable(free, weights.transformer + weights.vae))
    width, height = (-(-side // 4) for side in size)
    return plan_clip(width, height, options, model.preset, device="cuda", precisions=[bfloat16])


def count_wan(small: bool) -> Row:
    """TFLOP of a clip of 21 frames by parts, and planned memory: with enough memory, and on a card of `CARD` GB."""
    full = random_model(preset_of("1.3b", small=small), torch.device("meta"), torch.bfloat16)
    window, tile, clip = (32, 512, 5) if small else (WINDOW, 1024, CLIP)
    sizes = {"540p": (64, 48)} if small else SIZES
    ways = {"full": (full, 0), "window": (with_window(full, window), 0), "tiles": (full, tile)}
    rows = []
    for name, size in sizes.items():
        on_a_card = plan_for(full, size, UpscaleOptions(size=size), free=CARD * 10**9)
        for way, (model, side) in ways.items():
            options = UpscaleOptions(size=size, tile=side)
            plan = plan_for(model, size, options, free=2**50)
            flops = count_flops(model, plan, options, clip)
            row = {"name": name, "size": size, "way": way, "frames": clip, "planned_gib": plan.memory_bytes / 2**30}
            row |= {"tflop": {phase: flops[phase] / 1e12 for phase in PHASES}}
            rows.append({**row, f"planned_gib_{CARD}_gb": on_a_card.memory_bytes / 2**30})
            print(rows[-1], file=sys.stderr)
    return {"window": window, "tile": tile, "pixels": rows, "frames": count_frames(full, next(iter(sizes.values())))}


def count_frames(model: OneStepModel, size: tuple[int, int]) -> list[Row]:
    """TFLOP of the transformer by frames: clip after clip, as it is done, and as one clip of them all."""
    plan = plan_for(model, size, UpscaleOptions(size=size), free=2**50)

    def transformer(frames: int) -> float:
        latents = torch.empty(1, 16, (frames + 6) // 4, *(side // 8 for side in plan.padded_size[::-1]), device="meta")
        return flops_of(lambda: model.generate(latents, 0, (0, 0, 0))) / 1e12

    rows = []
    for frames in FRAMES:
        nothing = [np.empty(0)] * frames
        chunks = cut_into_chunks(nothing, plan.chunk, plan.overlap, fade=plan.fade, scene_cuts=False)
        lengths = [chunk.padded_length for chunk in chunks]
        a_clip = {length: transformer(length) for length in set(lengths)}
        rows.append(
            {"frames": frames, "calls": len(lengths), "tflop": sum(a_clip[length] for length in lengths)}
            | {"tflop_as_one_clip": transformer(frames)}
        )
    return rows


def flops_of(compute: Callable[[], object]) -> int:
    """2 a multiplication and addition, of matrix products, convolutions and attention."""
    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        compute()
    return flops.get_total_flops()


def crossover(device: torch.device, small: bool, repeat: int) -> Row:
    """Square frames, by their side in tokens: FLOPs and milliseconds (a CPU's are the processor's) of attention over
    whole frames and in windows."""
    length, heads = (4, 2) if small else (WINDOW // PAD_MULTIPLE, 3)
    latents = 6 if device.type == "cuda" else 2
    window = WindowConfig(length, length, past=None)

    def both(side: int, where: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        q, k, v = torch.randn(3, 1, latents, side, side, heads, 128, device=where, dtype=dtype)
        return {"full": lambda: attention(q, k, v), "window": lambda: attention(q, k, v, window)}

    def flops(side: int) -> dict[str, int]:
        ways = both(side, torch.device("meta"), torch.bfloat16)
        return {way: flops_of(compute) for way, compute in ways.items()}

    counted = next(side for side in range(length, 4 * length) if flops(side)["window"] < flops(side)["full"])
    dtype, rows = choose_dtype("auto", device), []
    for side in [length * n // 8 for n in (8, 10, 12, 14, 16)]:
        ways = both(side, device, dtype)
        times = {way: milliseconds(compute, device, repeat, 1, time.process_time) for way, compute in ways.items()}
        rows.append({"side_tokens": side, "flops": flops(side), "milliseconds": times})
        print(rows[-1], file=sys.stderr)
    return {
        "window_tokens": length,
        "heads": heads,
        "latents": latents,
        "dtype": str(dtype),
        "fewer_flops_from_side_tokens": counted,
        "fewer_flops_from_side_pixels": counted * PAD_MULTIPLE,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeat", type=int, default=3, help="measured runs of a row")
    parser.add_argument("--small", action="store_true", help="toy sizes, to test this script; needs --out")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, repeat, small = choose_device(options.device), options.repeat, options.small
    on_gpu = device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    if options.row is not None:
        print(json.dumps(measure(options.row, device, repeat, small)))
        return
    if options.small and options.out is None:
        parser.error("--small: name a file by --out; such times are not kept")
    path = options.out or RESULTS / f"cost{'_cuda' * on_gpu}.json"
    rows: list[Row] = []
    record: Row = {"benchmark": "cost", "machine": describe(device), "repeat": repeat, "measured": rows}
    record["threads"] = torch.get_num_threads()
    if not on_gpu:
        record["note"] = "the machine was shared: processor time is what to compare"
    for row in rows_of_tiny(small) + (rows_of_wan(small) if on_gpu else []):
        in_here = on_gpu or small  # a GPU's peak can be reset, a process's cannot; a test has no time
        rows.append(measure(row, device, repeat, small) if in_here else measure_alone(row, repeat, small))
        print(rows[-1], file=sys.stderr, flush=True)
        release_memory(device)
        write_json(path, record)
    record["lines"] = lines(rows, "seconds" if on_gpu else "processor_seconds")
    record["crossover"] = crossover(device, small, repeat)
    if not on_gpu:
        record["counted"] = count_wan(small)
    write_json(path, record)


if __name__ == "__main__":
    main()

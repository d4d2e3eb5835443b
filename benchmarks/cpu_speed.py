"""duovsr's `tiny` beside realesr-animevideov3 (ncnn) on the CPU: 320x180 -> 1280x720, interleaved in one run.

    pip install ncnn
    python benchmarks/cpu_speed.py --peer FOLDER   # with realesr-animevideov3-x4.param and .bin

Both get the same uint8 frames and give uint8 frames. They take turns round by round, and the first of a round changes,
so that a busy machine is busy for both; still, only a quiet machine gives numbers to keep. "inference" is upscaling
alone; "end to end" adds decoding and encoding, through the same reader and encoder for both, one after the other. Peak
memory is that of a process of its own for each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from measuring import peak_host_bytes

from duovsr import Upscaler
from duovsr.options import UpscaleOptions
from duovsr.video.codecs import encoding_for
from duovsr.video.encoder import VideoEncoder
from duovsr.video.output import target_of
from duovsr.video.reader import Frame, VideoReader

HERE = Path(__file__).parent
PEER = "realesr-animevideov3-x4"
SCALE = 4
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "bf16", "asimd")

Frames = Iterable[np.ndarray]
Contender = Callable[[Frames], Iterator[np.ndarray]]


def load_ours(threads: int) -> Contender:
    torch.set_num_threads(threads)
    upscaler = Upscaler.from_preset("tiny", device="cpu")
    return lambda frames: iter(upscaler.stream(frames))


def load_peer(folder: Path, threads: int) -> Contender:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    if net.load_param(str(folder / f"{PEER}.param")) or net.load_model(str(folder / f"{PEER}.bin")):
        raise SystemExit(f"cannot load {PEER}.param and {PEER}.bin from {folder}")

    def upscale(frame: np.ndarray) -> np.ndarray:
        height, width, _ = frame.shape
        data = ncnn.Mat.from_pixels(frame, ncnn.Mat.PixelType.PIXEL_RGB, width, height)
        data.substract_mean_normalize([], [1 / 255] * 3)
        extractor = net.create_extractor()
        extractor.input("data", data)
        _, output = extractor.extract("output")
        output.substract_mean_normalize([-0.5 / 255] * 3, [255] * 3)  # to 0.5..255.5: the cast to uint8 truncates
        planes = np.asarray(output)
        return np.ascontiguousarray(np.clip(planes, 0, 255, out=planes).astype(np.uint8).transpose(1, 2, 0))

    return lambda frames: map(upscale, frames)


def load(name: str, peer: Path, threads: int) -> Contender:
    return load_ours(threads) if name == "duovsr" else load_peer(peer, threads)


def seconds_of_inference(contender: Contender, frames: list[np.ndarray]) -> float:
    start = time.perf_counter()
    count = sum(1 for _ in contender(frames))
    assert count == len(frames)
    return time.perf_counter() - start


def seconds_end_to_end(contender: Contender, clip: Path, limit: int | None) -> tuple[float, int]:
    with tempfile.TemporaryDirectory() as folder:
        target = target_of(Path(folder) / "out.mp4")
        count = 0
        start = time.perf_counter()
        with VideoReader(clip) as reader:
            size = SCALE * reader.info.width, SCALE * reader.info.height
            encoding = encoding_for(target, reader.info, size, UpscaleOptions(scale=SCALE))
            with VideoEncoder(target.path, reader.info, *size, encoding, "mp4", numbered=False) as encoder:
                waiting: list[Frame] = []  # a contender may read ahead of what it gives

                def pixels() -> Iterator[np.ndarray]:
                    for frame in islice(reader, limit):
                        waiting.append(frame)
                        yield frame.pixels

                for result in contender(pixels()):
                    source = waiting.pop(0)
                    encoder.write(Frame(result, source.pts, source.time_base))
                    count += 1
        return time.perf_counter() - start, count


def peak_memory(name: str, peer: Path, threads: int, clip: Path) -> float:
    """MiB of this process after it upscaled the whole clip."""
    seconds_end_to_end(load(name, peer, threads), clip, None)
    return peak_host_bytes() / 2**20


def summary(milliseconds: list[float]) -> dict[str, float | list[float]]:
    quarters = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return {
        "median_ms": round(statistics.median(milliseconds), 2),
        "quartiles_ms": [round(quarters[0], 2), round(quarters[2], 2)],
        "min_ms": round(min(milliseconds), 2),
        "max_ms": round(max(milliseconds), 2),
        "rounds_ms": [round(value, 2) for value in milliseconds],
    }


def cpu() -> dict[str, object]:
    model, flags = platform.processor() or platform.machine(), []
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        fields = {key.strip(): value.strip() for key, _, value in lines}
        model = fields.get("model name", model)
        present = (fields.get("flags") or fields.get("Features") or "").split()
        flags = [flag for flag in CPU_FLAGS if flag in present]
    elif sys.platform == "darwin":
        model = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model, "cores": usable, "flags": flags}


def environment(peer: Path) -> dict[str, object]:
    packages = ("duovsr", "torch", "numpy", "av", "ncnn")
    digest = hashlib.sha256((peer / f"{PEER}.bin").read_bytes()).hexdigest()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "peer": {"model": PEER, "sha256_bin": digest, "settings": "ncnn defaults"},
    }


def measure(
    contenders: dict[str, Contender], run: Callable[[Contender], tuple[float, int]], rounds: int, label: str
) -> dict[str, object]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds):
        order = list(contenders) if index % 2 == 0 else list(reversed(contenders))
        for name in order:
            seconds, count = run(contenders[name])
            times[name].append(1000 * seconds / count)
        latest = ", ".join(f"{name} {values[-1]:.1f}" for name, values in times.items())
        print(f"{label} {index + 1}/{rounds}: ms a frame: {latest}", file=sys.stderr)
    ratios = [peer / ours for ours, peer in zip(*(times[name] for name in ("duovsr", "peer")), strict=True)]
    return {
        **{name: summary(values) for name, values in times.items()},
        "speed_relative_to_peer": round(statistics.median(ratios), 3),  # above 1: duovsr is faster
        "speed_relative_to_peer_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help=f"folder with {PEER}.param and .bin")
    parser.add_argument("--clip", type=Path, default=HERE / "sample.mp4")
    parser.add_argument("--frames", type=int, default=24, help="of the clip's start, a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="for both")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu_speed.json")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: 2 or more, for a spread")

    load_average = os.getloadavg()[0]
    if load_average > 0.5:
        print(f"warning: load average {load_average:.2f}: other processes will distort the times", file=sys.stderr)
    report: dict[str, object] = {"benchmark": "cpu_speed", **environment(args.peer), "threads": args.threads}
    names = ("duovsr", "peer")
    memory = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            memory[name] = round(process.apply(peak_memory, (name, args.peer, args.threads, args.clip)), 1)

    with VideoReader(args.clip) as reader:
        info = reader.info
        frames = [frame.pixels for frame in islice(reader, args.frames)]
    report["clip"] = {
        "name": args.clip.name,
        "size": [info.width, info.height],
        "output": [SCALE * info.width, SCALE * info.height],
        "frames_a_round": len(frames),
    }
    contenders = {name: load(name, args.peer, args.threads) for name in names}
    for contender in contenders.values():
        seconds_of_inference(contender, frames)  # first calls allocate, choose kernels and compile

    report["inference"] = measure(
        contenders, lambda contender: (seconds_of_inference(contender, frames), len(frames)), args.rounds, "inference"
    )
    report["end_to_end"] = measure(
        contenders,
        lambda contender: seconds_end_to_end(contender, args.clip, len(frames)),
        args.rounds,
        "end to end",
    )
    report["peak_rss_mib"] = memory
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

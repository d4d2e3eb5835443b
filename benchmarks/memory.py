"""Peak host memory of `upscale` on a CPU: by frame size, dtype and chunk (what the planner's constants come from), and
by the length of the clip (it must not grow). Each figure is the peak of a process of its own.

`python benchmarks/memory.py` writes `results/memory_cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from duovsr.engine.bench import describe_machine

RESULT = Path(__file__).parent / "results" / "memory_cpu.json"

_CHILD = """
import json, sys
from duovsr import Upscaler, UpscaleOptions
from duovsr.engine.bench import peak_rss
source, target, dtype, chunk = sys.argv[1:]
upscaler = Upscaler.from_preset("tiny", device="cpu", dtype=dtype)
loaded = peak_rss()
report = upscaler.upscale_file(source, target, UpscaleOptions(scale=4, chunk=int(chunk), tile=0, overwrite=True))
print(json.dumps({"loaded": loaded, "peak": peak_rss(), "planned": report.plan.memory_bytes}))
"""


def write_noise(path: Path, width: int, height: int, frames: int) -> Path:
    """A clip of drifting texture."""
    canvas = np.random.default_rng(0).integers(0, 256, (height, width + 64, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for n in range(frames):
            pixels = np.ascontiguousarray(canvas[:, n % 64 : n % 64 + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def measure(folder: Path, width: int, height: int, frames: int, dtype: str, chunk: int) -> dict[str, int]:
    source = write_noise(folder / "in.mp4", width, height, frames)
    command = [sys.executable, "-c", _CHILD, str(source), str(folder / "out.mp4"), dtype, str(chunk)]
    result: dict[str, int] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import torch

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for width, height, frames, dtype, chunk in (
            (160, 90, 17, "bfloat16", 4),
            (320, 180, 17, "bfloat16", 4),
            (320, 180, 17, "bfloat16", 8),
            (320, 180, 17, "float32", 4),
            (640, 360, 9, "bfloat16", 4),
            (64, 48, 200, "bfloat16", 4),
            (64, 48, 2000, "bfloat16", 4),
        ):
            bytes_ = measure(folder, width, height, frames, dtype, chunk)
            pixels = 16 * width * height * (chunk + 1)
            extra = (bytes_["peak"] - bytes_["loaded"]) / pixels
            rows.append({"source": [width, height], "frames": frames, "dtype": dtype, "chunk": chunk, **bytes_})
            print(
                f"{width}x{height} x4, {frames} frames, {dtype}, chunk {chunk}: peak {bytes_['peak'] / 2**20:.0f} MiB,"
                f" planned {bytes_['planned'] / 2**20:.0f} MiB, {extra:.0f} bytes a pixel and frame"
            )
    RESULT.write_text(json.dumps({"machine": describe_machine(torch.device("cpu")), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

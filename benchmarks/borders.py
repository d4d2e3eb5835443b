"""Do the ends of tiles, chunks and latent frames show? On real clips, with the shipped model, on the CPU.

    python benchmarks/borders.py CLIP [CLIP ...]     # writes `results/borders.json`

tiles: mean absolute difference of neighbouring pixels across the ends of the tiles' cross-fades, over that elsewhere in
the tiled frames, both relative to the untiled frames (1.0: no seam). time: flow-compensated difference of neighbouring
frames where a latent frame (and with chunks of 4, a chunk) ends, over that of the same two frames where none ends: the
clip is restored from its first four frames on, so that each pair is at a border once and inside three times. 1.0: no
border to be seen; the clip's own motion and key frames cancel out. (Needs OpenCV.)
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from duovsr import UpscaleOptions, Upscaler
from duovsr.engine.bench import describe_machine
from duovsr.metrics.meter import resized
from duovsr.metrics.warping import DisFlow, warping_error
from duovsr.model.tiny_vae import TEMPORAL_FACTOR
from duovsr.video.reader import VideoReader

RESULT = Path(__file__).parent / "results" / "borders.json"
FRAMES = 25
TILE = 512


def time_ratio(upscaler: Upscaler, lq: list[np.ndarray]) -> float:
    options = UpscaleOptions(tile=0, chunk=TEMPORAL_FACTOR)
    runs = [list(upscaler.stream(lq[start:], options)) for start in range(TEMPORAL_FACTOR)]
    reference = [resized(frame, runs[0][0].shape[:2]) for frame in lq]
    flow = DisFlow()
    errors: dict[bool, list[float]] = {True: [], False: []}
    for n in range(TEMPORAL_FACTOR + 1, len(lq)):
        forward, backward = flow(reference[n - 1], reference[n]), flow(reference[n], reference[n - 1])
        for start, frames in enumerate(runs):
            error = warping_error(frames[n - 1 - start], frames[n - start], forward, backward)
            if error is not None:
                # latent i holds frames 4i - 3 .. 4i
                errors[(n - start) % TEMPORAL_FACTOR == 1].append(error)
    return fmean(errors[True]) / fmean(errors[False])


def tile_ratio(tiled: np.ndarray, whole: np.ndarray) -> float:
    """The worst border of any column or row of tiles."""
    ratios = []
    for axis in (1, 2):
        other = (0, 3 - axis, 3)
        steps = np.abs(np.diff(tiled, axis=axis)).mean(other) / np.abs(np.diff(whole, axis=axis)).mean(other)
        borders = range(TILE // 2, tiled.shape[axis] - 1, TILE // 2)
        ratios += [float(steps[border - 1] / np.median(steps)) for border in borders]
    return max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path, nargs="+")
    upscaler = Upscaler.from_preset("tiny", device="cpu")
    rows = []
    for clip in parser.parse_args().clips:
        with VideoReader(clip) as reader:
            lq = [frame.pixels for frame in islice(iter(reader), FRAMES)]
        whole = list(upscaler.stream(lq[:5], UpscaleOptions(tile=0)))
        tiled = list(upscaler.stream(lq[:5], UpscaleOptions(tile=TILE)))
        as_float = [np.stack(frames).astype(np.float32) for frames in (tiled, whole)]
        row = {
            "clip": clip.stem,
            "tiles": tile_ratio(*as_float),
            "tiled_minus_whole_mean": float(np.abs(as_float[0] - as_float[1]).mean() / 255),
            "time": time_ratio(upscaler, lq),
        }
        rows.append(row)
        print(row)
    RESULT.write_text(json.dumps({"machine": describe_machine(torch.device("cpu")), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

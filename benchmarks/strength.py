"""Whether `--strength` is monotone, and whether scales and clean sources come out undamaged.

    python benchmarks/strength.py EVAL_FOLDER --niqe-parameters FILE [--frames 9]

EVAL_FOLDER/gt, made smaller by a bicubic filter and nothing else, is upscaled again by every scale, and
EVAL_FOLDER/real by 4; each at several strengths, beside bicubic. Means over the frames (of NIQE every fourth), then the
clips, of PSNR-Y, SSIM-Y, VMAF and NIQE. Writes `results/strength.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from measuring import RESULTS, describe, write_json

from duovsr import UpscaleOptions, Upscaler
from duovsr.metrics.fidelity import psnr_y, ssim_y
from duovsr.metrics.meter import FrameMeter, Meter, Unmeasurable, resized
from duovsr.metrics.niqe import load_parameters, niqe
from duovsr.metrics.vmaf import VmafMeter, load_model
from duovsr.video.reader import VideoReader

RESULT = RESULTS / "strength.json"
STRENGTHS = (0.0, 0.5, 1.0)
SCALES = (1.5, 2.0, 3.0, 4.0)
WHOLE = 12  # truths are cropped to a multiple of it: all scales divide it

Frames = list[np.ndarray]


def read(path: Path, count: int) -> Frames:
    with VideoReader(path) as reader:
        return [frame.pixels for frame in islice(reader, count)]


def sources(folder: Path, count: int) -> Iterator[tuple[str, Frames, Frames]]:
    """(set and scale, LQ, truth) of each clip."""
    for path in sorted((folder / "gt").iterdir()):
        truth = read(path, count)
        yield "real x4", read(next((folder / "real").glob(f"{path.stem}.*")), count), truth
        height, width = (side // WHOLE * WHOLE for side in truth[0].shape[:2])
        truth = [frame[:height, :width] for frame in truth]
        for scale in SCALES:
            small = (round(height / scale), round(width / scale))
            yield f"clean x{scale:g}", [resized(frame, small) for frame in truth], truth


def scores(frames: Frames, truth: Frames, meters: dict[str, Meter]) -> dict[str, float]:
    found = {}
    for name, meter in meters.items():
        for frame, reference in zip(frames, truth, strict=True):
            meter.update(frame, reference)
        with suppress(Unmeasurable):
            found[name] = meter.mean()
    return found


def means(clips: list[dict[str, float]]) -> dict[str, float]:
    """Of each score, over the clips that have it."""
    names = dict.fromkeys(name for clip in clips for name in clip)
    return {name: fmean(clip[name] for clip in clips if name in clip) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eval_folder", type=Path)
    parser.add_argument("--niqe-parameters", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, default=9, help="of each clip")
    arguments = parser.parse_args()
    upscaler, vmaf = Upscaler.from_preset(arguments.model, device="cpu"), load_model()
    parameters = load_parameters(arguments.niqe_parameters)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, lq, truth in sources(arguments.eval_folder, arguments.frames):
        height, width = truth[0].shape[:2]
        outputs = {"bicubic": [resized(frame, (height, width)) for frame in lq]}
        for strength in STRENGTHS:
            options = UpscaleOptions(size=(width, height), strength=strength)
            outputs[f"strength {strength:g}"] = list(upscaler.stream(lq, options))
        for way, frames in outputs.items():
            meters: dict[str, Meter] = {
                "psnr_y": FrameMeter(psnr_y),
                "ssim_y": FrameMeter(ssim_y),
                "vmaf": VmafMeter(vmaf, every=1),
                "niqe": FrameMeter(lambda output, _: niqe(output, parameters), every=4),
            }
            found.setdefault(name, {}).setdefault(way, []).append(scores(frames, truth, meters))
    rows = {name: {way: means(clips) for way, clips in ways.items()} for name, ways in found.items()}
    for name, ways in rows.items():
        for way, row in ways.items():
            print(name, way, " ".join(f"{key}={value:.3f}" for key, value in row.items()))
    machine = describe(torch.device("cpu"))
    write_json(RESULT, {"benchmark": "strength", "machine": machine, "frames": arguments.frames, "rows": rows})


if __name__ == "__main__":
    main()

"""A sheet of crops at 100 % to look at: the LQ's pixels, bicubic, realesr-animevideov3 where it is at hand, duovsr.

    python benchmarks/sheet.py CLIP RESULT OUT.png [--peer FOLDER] [--frame 30] [--at 60,60 --at 700,330]

CLIP is the LQ, RESULT what `duovsr upscale` made of it. A row is one place, given by its upper left corner in output
pixels; without `--at`, the four places with the strongest edges. `results/sample.png` is the sheet of our own clip:

    duovsr upscale benchmarks/sample.mp4 out.mkv --codec ffv1
    python benchmarks/sheet.py benchmarks/sample.mp4 out.mkv benchmarks/results/sample.png --at 60,60 --at 700,330
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
from cpu_speed import load_peer
from PIL import Image

from duovsr.video.reader import VideoReader

CROP = (320, 240)  # width and height in output pixels
GAP = 4
PLACES = 4


def frame_of(path: Path, index: int) -> np.ndarray:
    with VideoReader(path) as reader:
        frame = next(islice(iter(reader), index, None), None)
    if frame is None:
        raise SystemExit(f"no frame {index} in {path}")
    return frame.pixels


def busiest(pixels: np.ndarray) -> list[tuple[int, int]]:
    """The corners of the crops, of a grid of them, with the largest mean difference of neighbouring pixels."""
    grey = pixels.mean(axis=2)
    edges = np.abs(np.diff(grey, axis=1, append=0)) + np.abs(np.diff(grey, axis=0, append=0))
    width, height = CROP
    corners = [
        (x, y) for y in range(0, grey.shape[0] - height + 1, height) for x in range(0, grey.shape[1] - width + 1, width)
    ]
    return sorted(corners, key=lambda at: -edges[at[1] : at[1] + height, at[0] : at[0] + width].mean())[:PLACES]


def columns(clip: Path, result: Path, frame: int, peer: Path | None) -> list[Image.Image]:
    """The whole frame at the target size, once a column."""
    lq, ours = frame_of(clip, frame), Image.fromarray(frame_of(result, frame))
    small = Image.fromarray(lq)
    pictures = [small.resize(ours.size, way) for way in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)]
    if peer is not None:
        pictures.append(Image.fromarray(next(load_peer(peer, threads=2)([lq]))).resize(ours.size))
    return [*pictures, ours]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--peer", type=Path, help="folder of realesr-animevideov3-x4.param and .bin")
    parser.add_argument("--frame", type=int, default=30, help="from 0")
    parser.add_argument("--at", action="append", default=[], metavar="X,Y")
    arguments = parser.parse_args()
    pictures = columns(arguments.clip, arguments.result, arguments.frame, arguments.peer)
    corners = [tuple(map(int, at.split(","))) for at in arguments.at] or busiest(np.asarray(pictures[-1]))
    width, height = CROP
    sheet = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, len(corners) * (height + GAP) - GAP), "white")
    for row, (x, y) in enumerate(corners):
        for column, picture in enumerate(pictures):
            sheet.paste(picture.crop((x, y, x + width, y + height)), (column * (width + GAP), row * (height + GAP)))
    sheet.save(arguments.out)


if __name__ == "__main__":
    main()

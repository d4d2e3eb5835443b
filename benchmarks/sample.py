"""Renders duovsr's own sample clip: a street corner with text, brick, ivy and fabric, a moving camera and a melody.

    python benchmarks/sample.py benchmarks/sample.mp4 [--truth truth.mkv] [--still still.png]

Everything is drawn at 2560x1440 and halved to the truth (1280x720); its 4x4 area means, as a small web clip, are the
sample (320x180). `--truth` writes the truth losslessly. One seed draws all, so the same versions of Pillow and FFmpeg
give the same file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scene import balloon, paint_world

FPS, NUM_FRAMES, SAMPLE_RATE = 30, 75, 48_000
VIEW = (2560, 1440)  # rendered; halved to the truth, then quartered to the sample


def render(seed: int) -> Iterator[NDArray[np.uint8]]:
    """The truth: (720, 1280, 3) frames of a hand-held camera that pans, rolls and zooms past a drifting balloon."""
    rng = np.random.default_rng(seed)
    world, toy = paint_world(rng), balloon()
    grain = np.random.default_rng(seed + 1)
    for index in range(NUM_FRAMES):
        t = index / (NUM_FRAMES - 1)
        ease = t * t * (3 - 2 * t)
        centre_x = 1480 + 330 * ease + 5 * math.sin(9 * t)
        centre_y = 985 - 20 * ease + 6 * math.sin(7 * t + 1)
        zoom, roll = 0.90 + 0.13 * ease, math.radians(-1.6 + 2.6 * ease + 0.15 * math.sin(11 * t))
        cos, sin = math.cos(roll) / zoom, math.sin(roll) / zoom
        left = centre_x - cos * VIEW[0] / 2 + sin * VIEW[1] / 2
        top = centre_y - sin * VIEW[0] / 2 - cos * VIEW[1] / 2
        affine = (cos, -sin, left, sin, cos, top)
        view = world.transform(VIEW, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
        tilted = toy.rotate(9 * math.sin(5 * t + 0.4), Image.Resampling.BICUBIC, center=(150, 160))
        view.paste(tilted, (round(800 - 560 * t + 30 * math.sin(7 * t)), round(860 - 820 * t)), tilted)
        half = np.asarray(view.reduce(2), np.float32)
        yield np.clip(half + grain.normal(0, 1.6, half.shape) + 0.5, 0, 255).astype(np.uint8)  # a camera's noise


def melody() -> NDArray[np.float32]:
    """Stereo (2, samples): plucked notes that wander from left to right, with an echo."""
    length = NUM_FRAMES * SAMPLE_RATE // FPS
    sound = np.zeros((2, length + SAMPLE_RATE), np.float32)
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for step, pitch in enumerate((60, 64, 67, 72, 69, 67, 64, 67, 62, 65, 69, 74, 72)):
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        tone = sum(np.sin(2 * np.pi * hertz * k * time) * np.exp(-time * (3 + 2.5 * k)) / k for k in range(1, 7))
        side = 0.5 + 0.4 * math.sin(step * 0.9)
        for delay, gain in ((0.0, 0.24), (0.27, 0.07)):
            start = round((step * 0.18 + delay) * SAMPLE_RATE)
            stop = min(start + SAMPLE_RATE, sound.shape[1])
            sound[:, start:stop] += gain * np.array([[1 - side], [side]]) * np.asarray(tone)[: stop - start]
    fade = np.clip((length - np.arange(length)) / (0.2 * SAMPLE_RATE), 0, 1)
    return (sound[:, :length] * fade).astype(np.float32)


def tag(stream: av.VideoStream) -> None:
    """BT.709, as players assume for web video that says nothing."""
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = 1
    context.color_range = 1


def encode(
    truth: Iterator[NDArray[np.uint8]], sample_path: Path, truth_path: Path | None, still_path: Path | None
) -> None:
    with av.open(sample_path, "w", options={"movflags": "+faststart"}) as sample:
        video = sample.add_stream("libx264", FPS, options={"crf": "23", "preset": "slow", "threads": "1"})
        video.width, video.height, video.pix_fmt = VIEW[0] // 8, VIEW[1] // 8, "yuv420p"
        tag(video)
        audio = sample.add_stream("aac", SAMPLE_RATE, layout="stereo", bit_rate=96_000)
        lossless = av.open(truth_path, "w") if truth_path else None
        best = (
            lossless.add_stream("ffv1", FPS, width=VIEW[0] // 2, height=VIEW[1] // 2, pix_fmt="bgr0")
            if lossless
            else None
        )
        for index, frame in enumerate(truth):
            if index == NUM_FRAMES // 2 and still_path:
                Image.fromarray(frame).save(still_path)
            if lossless and best:
                lossless.mux(best.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            height, width, _ = frame.shape
            small = frame.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3), dtype=np.float32) + 0.5
            picture = av.VideoFrame.from_ndarray(small.astype(np.uint8), "rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
            picture.pts, picture.time_base = index, Fraction(1, FPS)
            sample.mux(video.encode(picture))
        sound = av.AudioFrame.from_ndarray(melody(), "fltp", "stereo")
        sound.sample_rate, sound.pts = SAMPLE_RATE, 0
        sample.mux([*video.encode(None), *audio.encode(sound), *audio.encode(None)])
        if lossless and best:
            lossless.mux(best.encode(None))
            lossless.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sample", type=Path, help="the 320x180 clip to write (mp4)")
    parser.add_argument("--truth", type=Path, help="also write the 1280x720 truth, losslessly (mkv)")
    parser.add_argument("--still", type=Path, help="also write the truth's middle frame (png)")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    encode(render(args.seed), args.sample, args.truth, args.still)


if __name__ == "__main__":
    main()

"""The shipped model leaves no borders, neither where tiles meet nor where chunks end (DESIGN section 2)."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from duovsr import UpscaleOptions, Upscaler
from duovsr.video.reader import VideoReader

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BORDERS = runpy.run_path(str(BENCHMARKS / "borders.py"))
BOUND = 1.1


@pytest.fixture(scope="module")
def upscaler() -> Upscaler:
    return Upscaler.from_preset("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def sample() -> list[np.ndarray]:
    with VideoReader(BENCHMARKS / "sample.mp4") as reader:
        return [frame.pixels for frame in reader]


def test_chunks_end_without_a_jump(upscaler: Upscaler, sample: list[np.ndarray]) -> None:
    pytest.importorskip("cv2")
    crop = [np.ascontiguousarray(frame[40:120, 100:212]) for frame in sample[10:35]]
    assert BORDERS["time_ratio"](upscaler, crop) <= BOUND


def test_tiles_meet_without_a_seam(upscaler: Upscaler, sample: list[np.ndarray]) -> None:
    lq = [np.ascontiguousarray(frame[:144, :200]) for frame in sample[:3]]
    options = (UpscaleOptions(tile=0), UpscaleOptions(tile=BORDERS["TILE"]))
    whole, tiled = (np.stack(list(upscaler.stream(lq, each))).astype(np.float32) for each in options)
    assert BORDERS["tile_ratio"](tiled, whole) <= BOUND
    assert np.abs(tiled - whole).mean() / 255 < 1e-3
    assert np.abs(tiled - whole).mean() > 0  # there were tiles

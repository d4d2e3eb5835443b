"""Footage of odd kinds: what is read of it is what `upscale` sees."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from duovsr.train.sources import find_sources, measure, open_footage
from tests.clips import Clip, woven, write_clip


@pytest.mark.parametrize("fields", ["tff", "bff"])
def test_interlaced_clips_have_no_combs(tmp_path: Path, fields: str) -> None:
    pictures = [woven(n, (96, 64), fields == "tff") for n in range(12)]
    written = Clip(range(0, 512 * 12, 512), size=(96, 64), pix_fmt="yuv420p", fields=fields, pictures=pictures)
    write_clip(tmp_path / "camcorder.mkv", written)
    (source,) = find_sources([tmp_path])
    for start, count, step in ((0, 5, 1), (5, 3, 2), (0, 12, 1), (6, 1, 1)):
        with open_footage(source, 48) as clip:
            frames = clip.read(start, count, step).float()
        assert len(frames) == count
        assert frames.diff(dim=2).abs().mean() < 2, "rows follow each other"
        bars = [int(frame.mean((0, 1)).argmax()) for frame in frames]
        assert np.diff(bars).tolist() == pytest.approx([8 * step] * (count - 1), abs=2)


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mkv", "libx264"), (".wmv", "wmv2"), (".flv", "flv1"), (".mp4", "libx264")]
)
def test_a_clip_that_begins_late_is_as_long_as_its_frames(tmp_path: Path, suffix: str, codec: str) -> None:
    """As a recording that was cut and kept its times: some containers count their duration from 0."""
    times = range(100_000, 100_480, 40)
    written = Clip(times, Fraction(1, 1000), size=(96, 64), codec=codec, pix_fmt="yuv420p")
    write_clip(tmp_path / f"late{suffix}", written)
    (source,) = find_sources([tmp_path])
    with open_footage(source, 48) as clip:
        assert clip.length == 12
    assert measure(source, 48) > 0

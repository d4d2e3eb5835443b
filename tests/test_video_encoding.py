"""What a target and the options together ask of the encoder."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from duovsr.errors import Remark, UsageError
from duovsr.options import UpscaleOptions
from duovsr.video.codecs import Encoding, encoding_for
from duovsr.video.info import VideoInfo
from duovsr.video.output import target_of
from tests.clips import Clip, probe, write_clip
from tests.test_video_codecs import source


def encode(name: str, info: VideoInfo, **options: Any) -> Encoding:
    return encoding_for(target_of(Path(name)), info, (128, 96), UpscaleOptions(**options))


@pytest.mark.parametrize(
    ("name", "chroma", "depth", "alpha", "settings", "way_out"),
    [
        ("out.mp4", Fraction(1), 8, False, {}, "yuv420p holds: --pix-fmt yuv444p"),
        ("out.mp4", Fraction(1, 2), 8, False, {}, "yuv420p holds: --pix-fmt yuv422p"),
        ("out.mp4", Fraction(1), 10, False, {}, "yuv420p10le holds: --pix-fmt yuv444p10le"),
        ("out.mkv", Fraction(1), 8, True, {}, "yuva420p holds: --codec ffv1"),  # libvpx opens none with both
        ("out.webm", Fraction(1), 8, True, {}, "yuva420p holds: --codec ffv1 in .mkv"),
        ("out.webm", Fraction(1), 8, False, {}, "yuv420p holds: --pix-fmt yuv444p"),
        ("out.mp4", Fraction(1), 8, False, {"codec": "av1"}, "yuv420p holds: --codec ffv1"),
        ("out.mp4", Fraction(1), 8, False, {"pix_fmt": "yuv420p"}, None),  # as asked for
        ("out.mkv", Fraction(1), 8, False, {"codec": "ffv1"}, None),
        ("out.mp4", Fraction(1, 4), 8, False, {}, None),
        ("out.mp4", Fraction(0), 8, False, {}, None),
        ("out.png", Fraction(1), 8, False, {}, None),
    ],
)
def test_coarser_colour_is_remarked(
    name: str, chroma: Fraction, depth: int, alpha: bool, settings: dict[str, str], way_out: str | None
) -> None:
    info = replace(source(depth, alpha), chroma_samples=chroma)
    encoding = encode(name, info, **settings)
    said = [f"the source's colours are sampled finer than {way_out} keeps them"] if way_out else []
    assert list(encoding.notices) == said
    assert all(isinstance(notice, Remark) for notice in encoding.notices)


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--codec", {"codec": "h264"}),
        ("--crf", {"crf": 20}),
        ("--pix-fmt", {"pix_fmt": "yuv420p"}),
        ("--encoder-opt", {"encoder_options": (("preset", "slow"),)}),
    ],
)
@pytest.mark.parametrize("name", ["out.png", "%d.png"])
def test_encoders_are_for_videos(flag: str, options: dict[str, object], name: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag} is for videos, not for images: `{name}`$") as caught:
        encode(name, source(), **options)
    assert caught.value.hint == f"leave out {flag}"


@pytest.mark.parametrize(
    ("pix_fmt", "samples"),
    [("yuv444p", Fraction(1)), ("yuv422p", Fraction(1, 2)), ("yuv420p", Fraction(1, 4)), ("gray", Fraction(0))],
)
def test_samples_of_colour_are_told_by_the_source(tmp_path: Path, pix_fmt: str, samples: Fraction) -> None:
    assert probe(write_clip(tmp_path / "in.mkv", Clip(codec="ffv1", pix_fmt=pix_fmt))).chroma_samples == samples

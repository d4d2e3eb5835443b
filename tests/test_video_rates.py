"""What decides how many bits a video has: crf, or an option of the encoder in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from duovsr.errors import UsageError
from tests.clips import probe
from tests.test_video_codecs import HDR, choose, encode, source


@pytest.mark.parametrize(
    ("codec", "option"),
    [
        ("h264", ("qp", "50")),
        ("h264", ("b", "1k")),
        ("h264", ("x264-params", "qp=50")),
        ("hevc", ("qp", "50")),
        ("hevc", ("b", "1k")),
        ("hevc", ("x265-params", "bitrate=1")),
        ("av1", ("qp", "63")),
        ("av1", ("b", "1k")),
        ("av1", ("svtav1-params", "rc=1:tbr=1")),
        ("vp9", ("b", "1k")),
    ],
)
def test_an_option_that_decides_the_rate_takes_the_place_of_the_crf(
    tmp_path: Path, codec: str, option: tuple[str, str]
) -> None:
    usual, coarse = (
        encode(tmp_path / f"{len(options)}.mkv", choose(source(), "matroska", codec, *options)).stat().st_size
        for options in ([], [option])
    )
    assert coarse < 0.8 * usual


@pytest.mark.parametrize("option", [("b", "0"), ("qp", "-1"), ("maxrate", "1M"), ("crf_max", "30")])
def test_an_option_that_decides_no_rate_leaves_the_crf(option: tuple[str, str]) -> None:
    assert choose(source(), "mp4", "h264", option).options["crf"] == "18"


@pytest.mark.parametrize(
    ("codec", "option", "rival"),
    [
        ("h264", ("crf", "10"), "crf"),
        ("h264", ("x264-params", "ref=2:qp=10"), "qp"),
        ("h264", ("x264opts", "bitrate=100"), "bitrate"),
        ("hevc", ("b", "1M"), "b"),
        ("hevc", ("x265-params", "lossless=1"), "lossless"),
        ("av1", ("svtav1-params", "crf=10"), "crf"),
        ("av1", ("crf", "0"), "crf"),
        ("vp9", ("lossless", "1"), "lossless"),
        ("h264_nvenc", ("cq", "10"), "cq"),
    ],
)
def test_a_crf_and_what_contradicts_it_are_refused(codec: str, option: tuple[str, str], rival: str) -> None:
    with pytest.raises(UsageError, match=f"^--crf and the encoder's own `{rival}` would both decide the rate$"):
        choose(source(), "matroska", codec, option, crf=30)


def test_vp9_takes_a_rate_beside_a_crf() -> None:
    options = choose(source(), "webm", "vp9", ("b", "1M"), crf=30).options
    assert (options["crf"], options["b"]) == ("30", "1M")


@pytest.mark.parametrize(
    ("options", "crf"),
    [([], 0), ([("crf", "0")], None), ([("qp", "0.0")], None), ([("svtav1-params", "tune=0"), ("crf", "0")], None)],
)
def test_zero_is_the_best_quality_of_av1(tmp_path: Path, options: list[tuple[str, str]], crf: int | None) -> None:
    """FFmpeg takes it for unset, which is 35."""
    best = encode(tmp_path / "best.mkv", choose(source(10, hdr=HDR), "matroska", "av1", *options, crf=crf))
    good = encode(tmp_path / "good.mkv", choose(source(10, hdr=HDR), "matroska", "av1", crf=1))
    assert best.stat().st_size > good.stat().st_size
    assert probe(best).hdr is not None


@pytest.mark.parametrize("codec", ["h264_nvenc", "hevc_nvenc", "av1_nvenc"])
@pytest.mark.parametrize(("options", "crf"), [([], 0), ([("cq", "0")], None)])
def test_zero_is_no_quality_of_nvenc(codec: str, options: list[tuple[str, str]], crf: int | None) -> None:
    """FFmpeg takes it for "automatic"."""
    with pytest.raises(UsageError, match=f"^unsupported crf for {codec}: `0`$") as caught:
        choose(source(), "mp4", codec, *options, crf=crf)
    assert "from 1 to " in (caught.value.hint or "")

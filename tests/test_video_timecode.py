"""Timecodes count as editors do, label by label, and come along, also with a piece and beside chapters."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import pytest

from duovsr.video.timecode import Timecode
from duovsr.video.window import Window
from tests.clips import Clip, video_times, write_clip
from tests.pieces import copy_beside, copy_clip, copy_streams

NTSC = Fraction(30000, 1001)


def labels(a_second: int, drops: bool) -> Iterator[str]:
    """Of 21 minutes, in order."""
    for minute, second, frame in product(range(21), range(60), range(a_second)):
        if not (drops and second == 0 and minute % 10 and frame < a_second // 15):
            yield f"00:{minute:02}:{second:02}{';' if drops else ':'}{frame:02}"


@pytest.mark.parametrize(("rate", "drops"), [(Fraction(25), False), (NTSC, True), (NTSC, False), (2 * NTSC, True)])
def test_each_label_follows_the_one_before(rate: Fraction, drops: bool) -> None:
    for number, label in enumerate(labels(round(rate), drops)):
        if number % 7 == 0 or ":00" in label[5:]:
            timecode = Timecode.parse(label, rate)
            assert timecode is not None
            assert (timecode.number, str(timecode)) == (number, label)
    separator = ";" if drops else ":"
    last = Timecode.parse(f"23:59:59{separator}{round(rate) - 1}", rate)
    assert last is not None
    assert str(last.after(1 / rate)) == f"00:00:00{separator}00"
    assert str(last.after((last.number + 1) / rate)) == str(last)


def test_left_out_labels_keep_up_with_the_clock() -> None:
    midnight = Timecode.parse("00:00:00;00", NTSC)
    assert midnight is not None
    assert str(midnight.after(Fraction(3600))) == "01:00:00;00"
    assert str(midnight.after(Fraction(3600 * 23))) == "23:00:00;02"  # to a few frames a day


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("01:02:03:25", Fraction(25)),
        ("01:02:03;04", Fraction(25)),
        ("01:02:03:04", Fraction(300)),
        ("01:02:03:04", None),
        ("01:02:03:01", Fraction(1)),
        ("1:02:03:04", Fraction(25)),
        ("gone", Fraction(25)),
    ],
)
def test_what_is_no_timecode(text: str, rate: Fraction | None) -> None:
    assert Timecode.parse(text, rate) is None


def test_the_spelling_stays() -> None:
    """FFmpeg writes one digit below 11 frames a second."""
    for text, due in (("01:02:03:0", "01:02:05:1"), ("01:02:03:00", "01:02:05:01")):
        timecode = Timecode.parse(text, Fraction(5, 2))
        assert timecode is not None
        assert str(timecode.after(Fraction(14, 5))) == due


def timecodes(path: Path) -> list[str]:
    with av.open(str(path)) as container:
        return [stream.metadata["timecode"] for stream in container.streams.data if "timecode" in stream.metadata]


@pytest.mark.parametrize("suffix", [".mov", ".mp4"])
@pytest.mark.parametrize(
    ("timecode", "rate", "kept"),
    [
        ("01:02:03:04", Fraction(25), True),
        ("23:59:59:23", Fraction(24000, 1001), True),
        ("01:02:03;04", Fraction(30000, 1001), True),
        ("01:02:03;04", Fraction(359640, 12001), True),  # as an average comes out
        ("01:02:03;04", Fraction(25), False),
        ("01:02:03:25", Fraction(25), False),
        ("01:02:03:04", Fraction(300), False),
        ("01:02:03:0", Fraction(1), True),  # as FFmpeg writes those below 11 frames a second
        ("01:02:03:2", Fraction(5, 2), True),
        ("gone", Fraction(25), False),
    ],
)
def test_timecode_track(tmp_path: Path, suffix: str, timecode: str, rate: Fraction, kept: bool) -> None:
    source, target = (
        write_clip(tmp_path / "in.mkv", Clip(stream_metadata={"timecode": timecode})),
        tmp_path / f"o{suffix}",
    )
    copier = copy_beside(source, target, rate=rate)
    assert timecodes(target) == ([timecode] if kept else [])
    notice = f"the timecode is not kept: `{timecode}` does not go with {rate} frames a second"
    assert copier.notices == ([] if kept else [notice])


def test_a_timecode_goes_from_file_to_file(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mov", Clip(stream_metadata={"timecode": "01:02:03:04"}))
    assert timecodes(source) == ["01:02:03:04"]
    for suffix in (".mov", ".mp4"):
        assert copy_clip(source, tmp_path / f"once{suffix}").notices == []
        assert copy_clip(tmp_path / f"once{suffix}", tmp_path / f"twice{suffix}").notices == []
        assert timecodes(tmp_path / f"once{suffix}") == timecodes(tmp_path / f"twice{suffix}") == ["01:02:03:04"]
    assert copy_clip(source, tmp_path / "once.mkv").notices == []
    assert copy_clip(tmp_path / "once.mkv", tmp_path / "back.mov").notices == []
    assert timecodes(tmp_path / "back.mov") == ["01:02:03:04"]


@pytest.mark.parametrize("suffix", [".mov", ".mp4"])
@pytest.mark.parametrize("audio", [[], ["aac"]])
@pytest.mark.parametrize("timecode", [{}, {"timecode": "01:02:03:04"}])
def test_chapters_are_no_subtitles(tmp_path: Path, timecode: dict[str, str], audio: list[str], suffix: str) -> None:
    """FFmpeg's muxer links a timecode or the chapters to a track, not both."""
    clip = Clip(chapters=[(0, 200, "One"), (200, 400, "Two")], audio=audio, stream_metadata=timecode)
    source, target = write_clip(tmp_path / "in.mkv", clip), tmp_path / f"out{suffix}"
    assert copy_clip(source, target).notices == []
    with av.open(str(target)) as container:
        assert not container.streams.subtitles
        found = container.chapters()
    assert timecodes(target) == list(timecode.values())
    assert [(c["start"] * c["time_base"], c["metadata"]["title"]) for c in found] == [
        (0, "One"),
        (Fraction(1, 5), "Two"),
    ]
    assert len(video_times(target)) == 12
    assert copy_clip(target, tmp_path / "back.mkv").notices == []


def test_a_timecode_that_cannot_be_kept_is_said(tmp_path: Path) -> None:
    """A stream of unknown rate has no timecode in mp4 and mov, nor has a piece of it."""
    clip = Clip(codec="prores_ks", pix_fmt="yuv422p10le", stream_metadata={"timecode": "01:02:03:04"})
    source = write_clip(tmp_path / "in.mov", clip)
    notice = "the timecode is not kept: `01:02:03:04` does not go with an unknown frame rate"
    assert copy_streams(source, tmp_path / "out.mov").notices == [notice]
    start = Fraction(2, 25)
    assert copy_streams(source, tmp_path / "cut.mkv", Window(start, None, -start)).notices == [notice]
    assert copy_streams(source, tmp_path / "out.mkv").notices == []
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.streams.video[0].metadata["TIMECODE"] == "01:02:03:04"


@pytest.mark.parametrize("suffix", [".mov", ".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("timecode", "rate", "start", "due"),
    [
        ("01:02:03:04", Fraction(25), Fraction(2, 5), "01:02:03:14"),
        ("23:59:59:20", Fraction(25), Fraction(1), "00:00:00:20"),
        ("00:00:59;28", Fraction(30000, 1001), Fraction(2002, 30000), "00:01:00;02"),
        ("00:59:59:28", Fraction(30000, 1001), Fraction(2002, 30000), "01:00:00:00"),
    ],
)
def test_a_piece_begins_at_a_later_timecode(
    tmp_path: Path, suffix: str, timecode: str, rate: Fraction, start: Fraction, due: str
) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(stream_metadata={"timecode": timecode}))
    copier = copy_beside(source, tmp_path / f"out{suffix}", rate=rate, window=Window(start, None, -start))
    assert copier.notices == []
    if suffix == ".mkv":
        with av.open(str(tmp_path / "out.mkv")) as container:
            assert container.streams.video[0].metadata["TIMECODE"] == due
    else:
        assert timecodes(tmp_path / f"out{suffix}") == [due]

"""A finished file is looked at before it gets its name: its frames, their times, and how long it says that it lasts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest

from duovsr.video.reader import VideoReader
from duovsr.video.verify import verify_output
from tests.clips import Clip, write_clip
from tests.pieces import copy_clip

TICK = Fraction(1, 12800)
PTS, END = (0, 512, 1024), 1536


def edit(path: Path, name: bytes, offset: int, form: str, change: Callable[[float], float], place: int = 0) -> None:
    """Changes a number that stands `offset` bytes after the `place`th `name` of a file."""
    data = bytearray(path.read_bytes())
    at = -1
    for _ in range(place + 1):
        at = data.index(name, at + 1)
    (number,) = struct.unpack_from(form, data, at + offset)
    struct.pack_into(form, data, at + offset, change(number))
    path.write_bytes(data)


def test_missing_and_late_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "in.mp4", Clip(pts=PTS))
    verify_output(path, PTS, END, TICK)
    with pytest.raises(AssertionError, match="has 3 frames instead of 4"):
        verify_output(path, [*PTS, 1536], 2048, TICK)
    with pytest.raises(AssertionError, match=r"frame 2 of .* is at 2/25 s instead of"):
        verify_output(path, [0, 512, 1025], END, TICK)


@pytest.mark.parametrize("late", [0, 36000])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm"])
def test_an_end_that_is_not_the_last_frames(tmp_path: Path, suffix: str, late: int) -> None:
    codec = {".webm": "libvpx-vp9"}.get(suffix, "libx264")
    muxer = {"movie_timescale": "12800"} if suffix in (".mp4", ".mov") else {}
    pts = [late + each for each in PTS]
    path = write_clip(tmp_path / f"in{suffix}", Clip(pts=pts, codec=codec, pix_fmt="yuv420p", muxer=muxer))
    verify_output(path, pts, late + END, TICK)
    for wrong in (late + END - 30, late + END + 30):
        with pytest.raises(AssertionError, match=r"the picture of .* ends at .* instead of"):
            verify_output(path, pts, wrong, TICK)


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_an_altered_movie(tmp_path: Path, suffix: str) -> None:
    path = write_clip(tmp_path / f"in{suffix}", Clip(pts=PTS))
    edit(path, b"mvhd", 4 + 16, ">I", lambda ms: ms - 5)
    with pytest.raises(AssertionError, match=r"says that it ends at 0\.115 s, its picture at 0\.12 s"):
        verify_output(path, PTS, END, TICK)
    edit(path, b"mvhd", 4 + 16, ">I", lambda ms: ms + 1000)  # sound may be longer
    verify_output(path, PTS, END, TICK)
    edit(path, b"tkhd", 4 + 20, ">I", lambda ms: ms + 5)
    with pytest.raises(AssertionError, match=r"ends at 0\.125 s instead of 0\.12 s"):
        verify_output(path, PTS, END, TICK)


def test_an_altered_matroska_file(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "in.mkv", Clip(pts=PTS))
    edit(path, b"\x44\x89\x88", 3, ">d", lambda ms: ms - 5)
    with pytest.raises(AssertionError, match=r"says that it ends at 0\.115 s, its picture at 0\.12 s"):
        verify_output(path, PTS, END, TICK)
    path.write_bytes(path.read_bytes().replace(b"00:00:00.120000000", b"00:01:00.120000000"))
    with pytest.raises(AssertionError, match=r"ends at 60\.12 s instead of 0\.12 s"):
        verify_output(path, PTS, END, TICK)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("last", [1, 100, 512, 12800])
def test_the_last_frame_is_shown_as_long_as_in_the_source(tmp_path: Path, suffix: str, last: int) -> None:
    """Durations of packets tell it, where the whole of the file agrees."""
    intra = write_clip(tmp_path / "clip.mp4", Clip(pts=PTS, options={"bf": "0"}))
    source = with_last_duration(intra, tmp_path / "in.mp4", last)
    with VideoReader(source) as reader:
        assert [frame.pts for frame in reader] == list(PTS)
        assert reader.end == 1024 + last
    copy_clip(source, tmp_path / f"out{suffix}")  # and verified


def with_last_duration(clip: Path, path: Path, ticks: int) -> Path:
    with av.open(str(clip)) as container, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(container.streams.video[0], opaque=True)
        packets = [packet for packet in container.demux() if packet.size]
        packets[-1].duration = ticks
        for packet in packets:
            packet.stream = stream
            out.mux(packet)
    return path

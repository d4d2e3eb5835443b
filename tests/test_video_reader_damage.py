"""Wrong times, holes and joined parts: only what is wrong moves, and what is missing is said."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from duovsr.options import Position
from duovsr.video.reader import VideoReader
from duovsr.video.timeline import LOOK_AHEAD, Timeline
from duovsr.video.window import JoinedTime, Window
from tests.clips import Clip, start_time, translucent, video_times, write_clip
from tests.pieces import copy_beside, copy_clip

TS = Fraction(1, 90000)


def places(given: Sequence[int | None]) -> tuple[list[int], Timeline]:
    timeline = Timeline(start=0, step=4)
    placed = [timeline.place(pts, given[index + 1 : index + 1 + LOOK_AHEAD]) for index, pts in enumerate(given)]
    assert timeline.misplaced == sum(a != b for a, b in zip(given, placed, strict=True))
    return placed, timeline


@pytest.mark.parametrize(
    ("given", "placed", "moves"),
    [
        ([0, 4, 8, 140, 16, 20, 24], [0, 4, 8, 12, 16, 20, 24], []),  # one wrong among right ones
        ([0, 4, 8, 140, 10, 11, 12], [0, 4, 8, 9, 10, 11, 12], []),
        ([100, 104, 0, 112, 116], [100, 104, 108, 112, 116], []),
        ([140, 4, 8, 12], [0, 4, 8, 12], []),
        ([0, 4, 8, 140, 144, 148], [0, 4, 8, 140, 144, 148], []),  # a hole in time
        ([0, 4, 5, 6, 300, 301, 900], [0, 4, 5, 6, 300, 301, 900], []),
        ([0, 4, 8, 140], [0, 4, 8, 140], []),
        ([0, 4, 40, 8, 44, 12, 48], [0, 4, 40, 41, 44, 45, 48], []),  # 8 and 12 come late, from around a hole
        ([0, None, 8, 140, None, 20, 24], [0, 4, 8, 12, 16, 20, 24], []),
        ([*range(0, 80, 4), 0, 4, 8], [*range(0, 92, 4)], [80]),  # time starts again
        ([*range(0, 80, 4), 0, 4, 400, 12, 16], [*range(0, 100, 4)], [80]),
        ([*range(0, 80, 4)] * 3, [*range(0, 240, 4)], [80, 160]),
    ],
)
def test_only_a_wrong_time_is_moved(given: list[int | None], placed: list[int], moves: list[int]) -> None:
    found, timeline = places(given)
    assert found == placed
    assert timeline.moves == moves


def test_one_flipped_bit_moves_one_frame(tmp_path: Path) -> None:
    pts = range(0, 100 * 3600, 3600)
    source = write_clip(tmp_path / "in.ts", Clip(pts=pts, time_base=TS, pix_fmt="yuv420p", options={"bf": "0"}))
    times, data = video_times(source), bytearray(source.read_bytes())
    headers = [at for at in range(0, len(data), 188) if b"\0\0\1\xe0" in data[at : at + 188]]
    flipped = next(
        number for number, at in enumerate(headers) if number >= 40 and not data[data.index(b"\0\0\1\xe0", at) + 11] & 8
    )
    data[data.index(b"\0\0\1\xe0", headers[flipped]) + 11] ^= 8
    source.write_bytes(data)
    wrong = [a for a, b in zip(video_times(source), times, strict=True) if a != b]
    assert len(wrong) == 1 and wrong[0] not in times
    with VideoReader(source) as reader:
        assert [frame.pts * frame.time_base for frame in reader] == times
    assert reader.notices == ["1 frame without a usable timestamp, placed after those before"]


@pytest.mark.parametrize("count", [100, 200])
@pytest.mark.parametrize(("codec", "audio"), [("libx264", ["aac"]), ("ffv1", ["flac"]), ("libx264", [])])
def test_a_hole_in_matroska_is_said(tmp_path: Path, codec: str, audio: list[str], count: int) -> None:
    pts = range(0, count * 512, 512)
    clip = Clip(pts=pts, size=(32, 24), pix_fmt="yuv420p", audio=audio, codec=codec, options={"g": "10"})
    source = write_clip(tmp_path / "in.mkv", clip)
    with VideoReader(source) as reader:
        assert len(list(reader)) == count
    assert reader.notices == []
    data = bytearray(source.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    source.write_bytes(data)
    with VideoReader(source) as reader:
        found = len(list(reader))
    assert 5 < found < count - 5
    assert len(reader.notices) == 1
    assert reader.notices[0].startswith(f"damaged input: decoded {found} of {count} frames")


@pytest.mark.parametrize("begin", range(18000, 38000, 1370))
def test_zeros_in_a_transport_stream_are_said(tmp_path: Path, begin: int) -> None:
    """Wherever they begin: FFmpeg marks the packets around most holes, not around all."""
    clip = Clip(pts=range(0, 60 * 3600, 3600), time_base=TS, pix_fmt="yuv420p", audio=["aac"])
    source = write_clip(tmp_path / "in.ts", clip)
    data = bytearray(source.read_bytes())
    data[begin : begin + 4000] = bytes(4000)
    source.write_bytes(data)
    with VideoReader(source) as reader:
        found = len(list(reader))
    assert 50 < found < 60
    assert reader.notices[-1] == f"damaged input: decoded {found} of 60 frames"
    assert reader.notices[:-1] in ([], ["damaged input: parts of audio stream #1 (aac) are missing"])


def test_uneven_frames_in_a_transport_stream_are_no_false_alarm(tmp_path: Path) -> None:
    pts = (0, 3600, 7200, 90000, 93600, 97200, 450000, 453600)
    source = write_clip(tmp_path / "in.ts", Clip(pts=pts, time_base=TS, pix_fmt="yuv420p", audio=["aac"]))
    with VideoReader(source) as reader:
        assert len(list(reader)) == len(pts)
    assert reader.notices == []


def test_a_late_start_is_no_false_alarm(tmp_path: Path) -> None:
    """Matroska's duration may count from 0, as FFmpeg writes it."""
    late = Clip(pts=range(10000, 12000, 40), time_base=Fraction(1, 1000))
    with VideoReader(write_clip(tmp_path / "in.mkv", late)) as reader:
        assert len(list(reader)) == 50
    assert reader.notices == []


def test_whole_matroska_is_no_false_alarm(tmp_path: Path) -> None:
    """Slides, with and without sound, with transparency beside the packets, and frames that come in bursts."""
    slides = Clip(pts=range(0, 24000, 3000), time_base=Fraction(1, 1000), audio=["flac"])
    clear = Clip(
        pts=(0, 40, 80, 3000, 3040, 9000, 20000),
        time_base=Fraction(1, 1000),
        codec="libvpx-vp9",
        pix_fmt="yuva420p",
        pictures=[translucent(index, (64, 48)) for index in range(7)],
        stream_metadata={"alpha_mode": "1"},
    )
    bursts = Clip(pts=(0, 512, 1024, 51200, 51300, 51400, 512000), audio=["aac"], options={"bf": "3"})
    for number, clip in enumerate((slides, clear, bursts)):
        with VideoReader(write_clip(tmp_path / f"{number}.mkv", clip)) as reader:
            assert len(list(reader)) == len(clip.pts)
        assert reader.notices == []


def test_frames_before_zero_come_before_those_with_a_time(tmp_path: Path) -> None:
    """FFmpeg loses matroska's negative times of reordered pictures."""
    clip = Clip(pts=range(-2560, 20 * 512, 512), audio=["aac"], muxer={"avoid_negative_ts": "disabled"})
    source, target = write_clip(tmp_path / "in.mkv", clip), tmp_path / "out.mkv"
    with av.open(str(source)) as container:
        assert [frame.pts for frame in container.decode(video=0)][:7] == [None] * 5 + [0, 40]
    copied = copy_clip(source, target)
    assert copied.pts == list(range(-200, 800, 40))
    assert copied.notices == ["5 frames without a usable timestamp, placed after those before"]
    assert video_times(target) == [Fraction(pts + 200, 1000) for pts in copied.pts]
    assert start_time(target, "audio") - start_time(source, "audio") == Fraction(1, 5)


def sound_times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        return [packet.pts * packet.time_base for packet in container.demux(audio=0) if packet.size]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_sound_of_joined_parts_moves_with_the_picture(tmp_path: Path, suffix: str) -> None:
    clip = Clip(pts=range(0, 100 * 3600, 3600), time_base=TS, pix_fmt="yuv420p", audio=["mp2"])
    part, joined = write_clip(tmp_path / "part.ts", clip), tmp_path / "joined.ts"
    joined.write_bytes(3 * part.read_bytes())
    with VideoReader(joined) as reader:
        assert len(list(reader)) == 300
    assert reader.moves == (4, 8)
    target = tmp_path / f"out{suffix}"
    copier = copy_beside(joined, target, window=Window(moves=reader.moves))
    expected = [time + move for move in (0, 4, 8) for time in sound_times(part)]
    if suffix == ".webm":  # converted, packet by packet of another length
        assert len(copier.notices) == 1
        assert abs(sound_times(target)[-1] - expected[-1]) < Fraction(1, 20)
        return
    assert copier.notices == []
    assert all(abs(a - b) <= Fraction(1, 1000) for a, b in zip(sound_times(target), expected, strict=True))
    cut = Window(Fraction(5), Fraction(9), Fraction(-5), reader.moves)
    copy_beside(joined, tmp_path / "cut.mkv", window=cut)
    inside = [time - 5 for time in expected if 5 <= time < 9]
    found = sound_times(tmp_path / "cut.mkv")
    assert all(abs(a - b) <= Fraction(1, 1000) for a, b in zip(found, inside, strict=True))


def test_sound_that_outlives_its_part_is_cut_and_said(tmp_path: Path) -> None:
    clip = Clip(pts=range(0, 20 * 3600, 3600), time_base=TS, pix_fmt="yuv420p", audio=["mp2"])  # 1 s of sound
    part, joined = write_clip(tmp_path / "part.ts", clip), tmp_path / "joined.ts"
    joined.write_bytes(2 * part.read_bytes())
    window = Window(moves=(Fraction(4, 5),))
    notice = copy_beside(joined, tmp_path / "out.mkv", window=window).notices[0]
    assert notice.endswith(" with times that go back, as around damage or where parts overlap")
    times = sound_times(part)
    overlapping = sum(time + Fraction(4, 5) <= times[-1] for time in times)
    assert notice.startswith(f"left out: {overlapping} packets of sound")


@pytest.mark.parametrize("until_the_end", [1, 2, 5, 40])
@pytest.mark.parametrize("reordering", ["0", "3"])
def test_a_piece_before_the_next_part_has_no_sound_of_it(tmp_path: Path, until_the_end: int, reordering: str) -> None:
    """Time starts again a few frames after the piece: the reader may not see it."""
    options = {"bf": reordering}
    clip = Clip(pts=range(0, 100 * 3600, 3600), time_base=TS, pix_fmt="yuv420p", audio=["mp2"], options=options)
    part, joined = write_clip(tmp_path / "part.ts", clip), tmp_path / "joined.ts"
    joined.write_bytes(2 * part.read_bytes())
    with VideoReader(joined, start=Position(frame=10), end=Position(frame=100 - until_the_end)) as reader:
        assert len(list(reader)) == 90 - until_the_end
    start, end = reader.window
    assert start is not None and end is not None
    copier = copy_beside(joined, tmp_path / "out.mkv", window=Window(start, end, -start, reader.moves))
    assert copier.notices == []
    inside = [time - start for time in sound_times(part) if start <= time < end]
    found = sound_times(tmp_path / "out.mkv")
    assert all(abs(a - b) <= Fraction(1, 1000) for a, b in zip(found, inside, strict=True))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("ahead", [16, 256])
def test_sound_with_a_wrong_time_keeps_out_no_other(tmp_path: Path, suffix: str, ahead: int) -> None:
    clip = Clip(pts=range(0, 100 * 3600, 3600), time_base=TS, pix_fmt="yuv420p", audio=["mp2"])
    source = write_clip(tmp_path / "in.ts", clip)
    before = sound_times(source)
    data = bytearray(source.read_bytes())
    at = -1
    for _ in range(4):
        at = data.index(b"\0\0\1\xc0", at + 1)
    pts = int.from_bytes(data[at + 9 : at + 14], "big")
    data[at + 9 : at + 14] = (pts ^ (ahead << (16 + 1))).to_bytes(5, "big")  # a bit of the middle 15: 32768 ticks
    source.write_bytes(data)
    assert max(sound_times(source)) > max(before)
    target = tmp_path / f"out{suffix}"
    assert copy_beside(source, target, window=Window()).notices == []
    found = sound_times(target)
    assert all(abs(a - b) <= Fraction(1, 1000) for a, b in zip(found, before, strict=True))


def test_a_hole_in_the_sound_stays(tmp_path: Path) -> None:
    clip = Clip(pts=range(0, 200 * 3600, 3600), time_base=TS, pix_fmt="yuv420p", audio=["mp2"])
    source = write_clip(tmp_path / "clip.mkv", clip)
    with av.open(str(source)) as container, av.open(str(tmp_path / "in.mkv"), "w") as out:
        copies = [out.add_stream_from_template(stream, opaque=True) for stream in container.streams]
        for packet in container.demux():
            hole = packet.stream.type == "audio" and packet.pts is not None and 1000 <= packet.pts < 3000
            if packet.size and not hole:
                packet.stream = copies[packet.stream_index]
                out.mux(packet)
    assert len(sound_times(source)) - len(sound_times(tmp_path / "in.mkv")) == 83
    assert copy_beside(tmp_path / "in.mkv", tmp_path / "out.mkv", window=Window()).notices == []
    assert sound_times(tmp_path / "out.mkv") == sound_times(tmp_path / "in.mkv")


def test_subtitles_move_with_the_packets_around_them(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "out.mkv"), "w") as out:
        streams: dict[str, Any] = {"v": out.add_stream("libx264", rate=25), "s": out.add_stream("subrip")}
        joined = JoinedTime((Fraction(4),))
        placed = []
        for name, time in [("v", 0), ("s", 1500), ("v", 3960), ("v", 0), ("s", 3000), ("v", 40)]:
            packet = av.Packet(b"x")
            packet.stream, packet.time_base = streams[name], Fraction(1, 1000)
            packet.pts, packet.dts, packet.duration = time, time, 40
            joined.place(packet)
            placed.append((packet.pts, packet.dts))
    assert placed == [(time, time) for time in (0, 1500, 3960, 4000, 7000, 4040)]


def test_no_more_frames_than_there_are_in_all(tmp_path: Path) -> None:
    """What FFmpeg says of the duration of half a program stream is too short."""
    clip = Clip(pts=range(60), time_base=Fraction(1, 25), codec="mpeg2video", pix_fmt="yuv420p", audio=["mp2"])
    source = write_clip(tmp_path / "in.mpg", clip)
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2])
    with VideoReader(source) as reader:
        count = len(list(reader))
        assert (reader.info.num_frames or 0) < count
    assert [notice for notice in reader.notices if notice.startswith(f"damaged input: decoded {count} frames")]

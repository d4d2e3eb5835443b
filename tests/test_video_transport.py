"""What a transport stream lacks is said, whichever stream it hits; whole, joined and stopped ones raise no alarm."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from duovsr.errors import Remark
from duovsr.options import Position
from duovsr.video.reader import VideoReader
from duovsr.video.transport import _next_packet, losses
from tests.clips import Clip, write_clicks, write_clip

TS = Fraction(1, 90000)
VIDEO, AUDIO = 256, 257  # as FFmpeg's muxer numbers them
CLIP = Clip(pts=range(0, 60 * 3600, 3600), time_base=TS, pix_fmt="yuv420p", audio=["mp2"])


def said(path: Path, **piece: Position) -> list[str]:
    with VideoReader(path, **piece) as reader:
        assert list(reader)
    return reader.notices


def packets_of(path: Path) -> np.ndarray:
    """(N, 188) of uint8."""
    return np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 188)


def numbers_of(packets: np.ndarray) -> np.ndarray:
    return (packets[:, 1].astype(int) & 0x1F) << 8 | packets[:, 2]


@pytest.mark.parametrize("audio", ["aac", "mp2", "ac3"])
@pytest.mark.parametrize("video", ["libx264", "mpeg2video"])
def test_whole_streams_raise_no_alarm(tmp_path: Path, video: str, audio: str) -> None:
    fields = "tff" if video == "mpeg2video" else None
    clip = Clip(pts=range(60), time_base=Fraction(1, 25), codec=video, fields=fields, pix_fmt="yuv420p", audio=[audio])
    source = write_clip(tmp_path / "in.ts", clip)
    assert [notice for notice in said(source) if not isinstance(notice, Remark)] == []


@pytest.mark.parametrize("start", [Fraction(3, 2), Fraction(-1, 5)])
@pytest.mark.parametrize("audio", ["aac", "mp2", "ac3"])
def test_sound_that_begins_at_another_time_raises_no_alarm(tmp_path: Path, audio: str, start: Fraction) -> None:
    assert said(write_clicks(tmp_path / "in.ts", audio, rate=48000, start=start)) == []


@pytest.mark.parametrize("stride", [192, 204])
def test_other_strides_and_what_lies_around(tmp_path: Path, stride: int) -> None:
    packets = packets_of(write_clip(tmp_path / "in.ts", CLIP))
    rows = np.full((len(packets), stride), 7, np.uint8)
    before = 4 if stride == 192 else 0
    rows[:, before : before + 188] = packets
    source = tmp_path / "in.m2ts"
    source.write_bytes(b"before it" + rows.tobytes() + bytes(1000))
    assert said(source) == []
    source.write_bytes(np.delete(rows, 300, axis=0).tobytes())
    assert losses(source, {VIDEO, AUDIO}).torn == {int(numbers_of(packets)[300])}
    source.write_bytes(rows.tobytes()[: -stride // 2])
    assert losses(source, {VIDEO, AUDIO}).cut_off


@pytest.mark.parametrize("number", [VIDEO, AUDIO])
@pytest.mark.parametrize("count", [1, 5])
def test_missing_packets_are_said(tmp_path: Path, number: int, count: int) -> None:
    """Of one stream alone, wherever they are, but for the very first and the very last."""
    packets = packets_of(write_clip(tmp_path / "clip.ts", CLIP))
    places = np.flatnonzero(numbers_of(packets) == number)
    what = {VIDEO: "damaged input: decoded ", AUDIO: "damaged input: parts of audio stream #1 (mp2) are missing"}[
        number
    ]
    source = tmp_path / "in.ts"
    for first in range(8, len(places) - 12, 1 + len(places) // 12):  # the first picture is in six packets
        source.write_bytes(np.delete(packets, places[first : first + count], axis=0).tobytes())
        notices = said(source)
        assert len(notices) == 1 and notices[0].startswith(what)
        assert not isinstance(notices[0], Remark)


def test_packets_of_tables_are_no_loss(tmp_path: Path) -> None:
    packets = packets_of(write_clip(tmp_path / "clip.ts", CLIP))
    tables = np.flatnonzero(numbers_of(packets) < VIDEO)
    source = tmp_path / "in.ts"
    source.write_bytes(np.delete(packets, tables[5::3], axis=0).tobytes())
    assert said(source) == []


def test_sixteen_missing_packets_are_told_by_the_times(tmp_path: Path) -> None:
    """After which the counter goes on as if nothing had been there: 16 of the sound, and a few of the picture."""
    packets = packets_of(write_clip(tmp_path / "clip.ts", CLIP))
    places = np.flatnonzero(numbers_of(packets) == AUDIO)[100:116]
    source = tmp_path / "in.ts"
    source.write_bytes(np.delete(packets, np.arange(places[0], places[-1] + 1), axis=0).tobytes())
    assert losses(source, {AUDIO}).torn == set()
    assert "damaged input: parts of audio stream #1 (mp2) are missing" in said(source)


def test_copies_and_announced_jumps_are_no_loss(tmp_path: Path) -> None:
    packets = packets_of(write_clip(tmp_path / "clip.ts", CLIP))
    source = tmp_path / "in.ts"
    again = np.repeat(packets, np.where(np.arange(len(packets)) % 50 == 40, 2, 1), axis=0)
    source.write_bytes(again.tobytes())
    assert losses(source, {VIDEO, AUDIO}).torn == set()
    jumping = packets.copy()
    own = np.flatnonzero(numbers_of(packets) == AUDIO)
    for place in own[own > len(packets) // 2]:
        jumping[place, 3] = jumping[place, 3] & 0xF0 | (jumping[place, 3] + 5) & 0xF
    source.write_bytes(jumping.tobytes())
    assert losses(source, {VIDEO, AUDIO}).torn == {AUDIO}
    first = jumping[own[own > len(packets) // 2][0]]
    announcement = np.full((1, 188), 0xFF, np.uint8)  # a packet of padding with the discontinuity indicator
    announcement[0, :6] = (0x47, AUDIO >> 8, AUDIO & 0xFF, 0x20 | (first[3] - 1) & 0xF, 183, 0x80)
    at = own[own > len(packets) // 2][0]
    source.write_bytes(np.concatenate([jumping[:at], announcement, jumping[at:]]).tobytes())
    assert losses(source, {VIDEO, AUDIO}).torn == set()


@pytest.mark.parametrize("parts", [2, 20])
def test_joined_segments_are_no_loss(tmp_path: Path, parts: int) -> None:
    """As of live streams: times go on, counters start anew in each."""
    frames, segments = 10, []
    for number in range(parts):
        pts = range(90000 + number * frames * 3600, 90000 + (number + 1) * frames * 3600, 3600)
        clip = Clip(pts=pts, time_base=TS, pix_fmt="yuv420p", options={"bf": "0"}, muxer={"mpegts_copyts": "1"})
        segments.append(write_clip(tmp_path / "part.ts", clip).read_bytes())
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(segments))
    assert said(joined) == []
    joined.write_bytes(3 * write_clip(tmp_path / "clip.ts", CLIP).read_bytes())  # times start anew, too
    assert losses(joined, {VIDEO, AUDIO}).torn == set()


def test_another_rate_after_a_join_is_no_loss(tmp_path: Path) -> None:
    """FFmpeg's average rate is that of the first part, and counts on more pictures than there are."""
    segments, start = [], 90000
    for step in (1800, 3600):
        pts = range(start, start + 50 * step, step)
        clip = Clip(pts=pts, time_base=TS, pix_fmt="yuv420p", options={"bf": "0"}, muxer={"mpegts_copyts": "1"})
        segments.append(write_clip(tmp_path / "part.ts", clip).read_bytes())
        start = pts.stop
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(segments))
    with VideoReader(joined) as reader:
        assert len(list(reader)) == 100 < (reader.info.num_frames or 0)
    assert losses(joined, {VIDEO}).suspect
    assert reader.notices == []


@pytest.mark.parametrize("size", [188, 192, 204])
def test_the_next_packet_is_the_first_that_others_follow(size: int) -> None:
    rng = np.random.default_rng(size)
    for length in rng.integers(0, 30000, 200):
        data = rng.integers(0x46, 0x50, length).astype(np.uint8)
        data[length // 2 :: size] = 0x47
        starts = (at for at in range(length) if (data[at::size][:5] == 0x47).all())
        assert _next_packet(data, size) == next(starts, length)


@pytest.mark.parametrize("cut", [1, 100, 187, 188 * 10 + 50])
def test_a_file_that_ends_inside_a_packet_is_said(tmp_path: Path, cut: int) -> None:
    source = write_clip(tmp_path / "in.ts", CLIP)
    source.write_bytes(source.read_bytes()[:-cut])
    notices = said(source)
    assert notices == ["damaged input: the file ends in the middle of a packet"]
    assert not isinstance(notices[0], Remark)
    assert said(source, end=Position(frame=20)) == []


def test_a_recording_that_was_stopped_is_remarked(tmp_path: Path) -> None:
    """Between two packets, while some sound was being sent."""
    source = write_clip(tmp_path / "in.ts", CLIP)
    source.write_bytes(packets_of(source)[:-1].tobytes())
    (notice,) = said(source)
    assert notice == "the source stops in the middle of audio stream #1 (mp2), as recordings do"
    assert isinstance(notice, Remark)

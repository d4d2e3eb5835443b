"""When pictures are shown, pieces of a clip, pipes, and what is left of damaged files."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from clips import Clip, picture, video_times, write_clip

from duovsr.errors import InputError, UsageError
from duovsr.options import PIPE, Position
from duovsr.video.reader import VideoReader
from duovsr.video.timeline import Timeline
from tests.clips import probe

IRREGULAR = (0, 512, 1024, 2560, 2816, 3072, 7168, 7680, 12800, 13000, 13500, 14000)
NOISE = list(np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), dtype=np.uint8))


def times_of(path: Path) -> list[Fraction]:
    with VideoReader(path) as reader:
        return [frame.pts * frame.time_base for frame in reader]


@pytest.mark.parametrize("first", [0, 13, 36000])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".ts"])
def test_times_are_the_files_own(tmp_path: Path, suffix: str, first: int) -> None:
    pts = [first + pts for pts in IRREGULAR]
    clip = Clip(pts=pts, pix_fmt="yuv420p", options={"bf": "2"}, muxer={"movie_timescale": "12800"})
    source = write_clip(tmp_path / f"in{suffix}", clip)
    found = times_of(source)
    assert found == video_times(source)
    shift = found[0] - Fraction(pts[0], 12800) if suffix == ".ts" else 0  # its muxer moves all streams together
    expected = [Fraction(pts, 12800) + shift for pts in pts]
    tolerance = {".mkv": Fraction(1, 2000), ".ts": Fraction(1, 90000)}.get(suffix, 0)
    assert all(abs(a - b) <= tolerance for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("suffix", "codec"), [(".mkv", "ffv1"), (".ts", "libx264")])
def test_times_before_zero_are_kept(tmp_path: Path, suffix: str, codec: str) -> None:
    pts = range(-120, 360, 40)
    muxer = {"avoid_negative_ts": "disabled"} | ({"mpegts_copyts": "1"} if suffix == ".ts" else {})
    clip = Clip(pts=pts, time_base=Fraction(1, 1000), codec=codec, pix_fmt="yuv420p", muxer=muxer)
    source = write_clip(tmp_path / f"in{suffix}", clip)
    assert times_of(source) == [Fraction(pts, 1000) for pts in pts]


def test_frames_that_an_edit_list_hides_are_not_shown(tmp_path: Path) -> None:
    clip = Clip(pts=range(-1200, 3600, 400), time_base=Fraction(1, 10000), muxer={"avoid_negative_ts": "disabled"})
    source = write_clip(tmp_path / "in.mp4", clip)
    with VideoReader(source) as reader:
        frames = list(reader)
    assert [frame.pts for frame in frames] == list(range(0, 3600, 400))
    assert reader.info.num_frames == 9
    assert reader.notices == []
    assert np.abs(frames[0].pixels.astype(int) - picture(3, (64, 48))).mean() < 3


def test_gif_keeps_its_hundredths(tmp_path: Path) -> None:
    clip = Clip(pts=(0, 4, 10, 100), time_base=Fraction(1, 100), codec="gif", pix_fmt="rgb8")
    assert times_of(write_clip(tmp_path / "in.gif", clip)) == [0, Fraction(4, 100), Fraction(1, 10), 1]


def test_one_keyframe_is_no_trap(tmp_path: Path) -> None:
    clip = Clip(pts=range(0, 50 * 512, 512), pix_fmt="yuv420p", options={"g": "500", "bf": "8", "sc_threshold": "0"})
    source = write_clip(tmp_path / "in.ts", clip)
    with VideoReader(source, start=Position(frame=30)) as reader:
        assert len(list(reader)) == 20


S, F = (lambda seconds: Position(seconds=Fraction(seconds))), (lambda frame: Position(frame=frame))
PIECES: dict[str, tuple[Position | None, Position | None, slice, bool, bool]] = {
    "all": (None, None, slice(None), False, False),
    "from a frame": (F(3), None, slice(3, None), True, False),
    "from a time": (S("0.2"), None, slice(3, None), True, False),  # frame 3 is the first at or after 0.2 s
    "to a frame": (None, F(4), slice(4), False, True),
    "to a time": (None, S("0.2"), slice(3), False, True),
    "between times": (S("0.08"), S("0.56"), slice(2, 6), True, True),
    "a frame and a time": (F(1), S("0.24"), slice(1, 5), True, True),
    "one frame": (F(11), F(12), slice(11, 12), True, False),
    "past the end": (None, F(500), slice(None), False, False),
    "from the first frame": (F(0), S("900"), slice(None), True, False),
}


@pytest.mark.parametrize("first", [0, 36000])
@pytest.mark.parametrize("case", PIECES)
def test_a_piece_has_its_frames_and_its_window(tmp_path: Path, case: str, first: int) -> None:
    start, end, piece, begun, ended = PIECES[case]
    pts = [first + pts for pts in IRREGULAR]
    source = write_clip(tmp_path / "in.mp4", Clip(pts=pts, muxer={"movie_timescale": "12800"}))
    with VideoReader(source) as whole, VideoReader(source, start=start, end=end) as reader:
        expected = [(frame.pts, frame.pixels.tobytes()) for frame in whole][piece]
        assert [(frame.pts, frame.pixels.tobytes()) for frame in reader] == expected
    times = [Fraction(pts, 12800) for pts in pts]
    assert reader.window == (times[piece][0] if begun else None, times[piece.stop] if ended else None)
    assert reader.notices == []


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [
        (F(12), None, "the piece starts after the end of"),
        (S("1.2"), None, "the piece starts after the end of"),
        (None, F(0), "the piece ends before it starts"),
        (None, S("0"), "the piece ends before it starts"),
        (F(5), F(5), "the piece ends before it starts"),
        (S("0.5"), S("0.25"), "the piece ends before it starts"),
        (F(8), S("0.2"), "no frame of .* lies between start and end"),
        (S("0.25"), S("0.5"), "no frame of .* lies between start and end"),
    ],
)
def test_a_piece_without_frames_is_refused(
    tmp_path: Path, start: Position | None, end: Position | None, reason: str
) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=IRREGULAR))
    with pytest.raises(UsageError, match=reason) as caught, VideoReader(source, start=start, end=end) as reader:
        list(reader)
    assert caught.value.hint


def test_a_piece_of_an_interlaced_clip_is_cut_from_the_deinterlaced_whole(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=IRREGULAR, fields="tff"))
    with VideoReader(source) as whole, VideoReader(source, start=F(4), end=F(9)) as reader:
        frames = list(whole)[4:9]
        for frame, expected in zip(reader, frames, strict=True):
            assert frame.pts == expected.pts
            assert (frame.pixels == expected.pixels).all()


def pipe_of(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input is a pipe with `data` in it."""
    read_end, write_end = os.pipe()

    def feed() -> None:
        with os.fdopen(write_end, "wb") as sink:
            sink.write(data)

    threading.Thread(target=feed, daemon=True).start()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=os.fdopen(read_end, "rb"), isatty=lambda: False))


def y4m_of(count: int, rate: Fraction) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="yuv4mpegpipe") as container:
        video = container.add_stream("wrapped_avframe", rate=rate)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv444p"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index, (64, 48)), format="rgb24").reformat(format="yuv444p")
            frame.pts = index
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return file.getvalue()


def test_y4m_is_read_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_of(y4m_of(30, Fraction(30000, 1001)), monkeypatch)
    with VideoReader(PIPE) as reader:
        assert (reader.info.path, reader.info.frame_rate) == (PIPE, Fraction(30000, 1001))
        frames = list(reader)
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(1001 * n, 30000) for n in range(30)]
    assert np.abs(frames[0].pixels.astype(int) - picture(0, (64, 48))).mean() < 3
    assert reader.notices == []


def test_nut_with_irregular_times_is_read_from_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_clip(tmp_path / "in.nut", Clip(pts=IRREGULAR, codec="ffv1", pix_fmt="bgr0", audio=["flac"]))
    pipe_of(source.read_bytes(), monkeypatch)
    with VideoReader(PIPE, start=Position(frame=1)) as reader:
        frames = list(reader)
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(pts, 12800) for pts in IRREGULAR[1:]]
    assert (frames[3].pixels == picture(4, (64, 48))).all()


def test_a_piped_process_reads_its_whole_input() -> None:
    code = (
        "from pathlib import Path; from duovsr.video.reader import VideoReader\n"
        "with VideoReader(Path('-')) as reader: print(len(list(reader)))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=y4m_of(40, Fraction(25)), capture_output=True, check=True)
    assert done.stdout.split() == [b"40"]


@pytest.mark.parametrize("data", [b"", b"not a video\n" * 500])
def test_what_is_no_video_in_a_pipe_is_refused(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_of(data, monkeypatch)
    with pytest.raises(InputError, match="not a video, or damaged beyond reading: `-`"):
        VideoReader(PIPE)


def test_a_terminal_is_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UsageError, match="`-` reads a video from a pipe"):
        probe(PIPE)


@pytest.mark.parametrize(
    ("given", "placed"),
    [
        ([0, 3, 10, 11, 500], [0, 3, 10, 11, 500]),
        ([-8, -4, 0], [-8, -4, 0]),
        ([None, None, None], [5, 9, 13]),
        ([0, None, 8, None, 12], [0, 4, 8, 12, 13]),
        ([0, 4, 40, 8, 44, 12, 48], [0, 4, 40, 41, 44, 45, 48]),  # 8 and 12 come late, from around a hole
        ([0, 4, 4, 8], [0, 4, 5, 8]),
        ([0, 4, 8, 0, 5, 9, 13], [0, 4, 8, 12, 17, 21, 25]),  # time starts again, and keeps its own steps
        ([*range(0, 80, 4)] * 3, [*range(0, 240, 4)]),
        ([100, 104, 0, 108, 112], [100, 104, 108, 109, 112]),  # one wrong among right ones
    ],
)
def test_places_on_the_timeline(given: list[int | None], placed: list[int]) -> None:
    timeline = Timeline(start=5, step=4)
    assert [timeline.place(pts) for pts in given] == placed
    assert timeline.misplaced == sum(a != b for a, b in zip(given, placed, strict=True))


def test_joined_streams_follow_one_another(tmp_path: Path) -> None:
    parts = [write_clip(tmp_path / f"{n}.ts", Clip(pts=IRREGULAR, pix_fmt="yuv420p")) for n in range(2)]
    (tmp_path / "joined.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    alone, joined = times_of(parts[0]), times_of(tmp_path / "joined.ts")
    assert joined[:12] == alone
    assert [time - joined[12] for time in joined[12:]] == [time - alone[0] for time in alone]
    assert 0 < joined[12] - joined[11] < Fraction(1, 5)


def damaged(path: Path, kind: str) -> tuple[Path, list[Fraction]]:
    """A clip of 60 frames of noise, spoilt, and the times it had."""
    muxer = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    clip = Clip(pts=range(0, 60 * 512, 512), pictures=NOISE, pix_fmt="yuv420p", options={"g": "12"}, muxer=muxer)
    times, data = video_times(write_clip(path, clip)), bytearray(path.read_bytes())
    third = len(data) // 3
    if kind == "cut":
        del data[len(data) // 2 :]
    elif kind == "flipped":
        for position in np.random.default_rng(1).integers(third, 2 * third, 40):
            data[position] ^= 255
    else:
        data[third : third + third // 3] = bytes(third // 3)
    path.write_bytes(data)
    return path, times


@pytest.mark.parametrize("kind", ["cut", "flipped", "hole"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_damaged_clips_keep_their_timeline_and_say_so(tmp_path: Path, suffix: str, kind: str) -> None:
    source, times = damaged(tmp_path / f"in{suffix}", kind)
    with VideoReader(source) as reader:
        found = [frame.pts * frame.time_base for frame in reader]
    assert len(found) >= 25
    assert found == sorted(set(found))
    assert set(found[-5:]) <= set(times) and set(found[:5]) <= set(times)  # nothing moves what comes after
    assert sum(time in times for time in found) >= len(found) - 4
    if (suffix, kind) != (".ts", "cut"):  # a stream has no end of its own
        assert re.search(rf"damaged input: decoded {len(found)}( of \d+)? frames", "\n".join(reader.notices))


def test_a_piece_before_the_damage_is_whole(tmp_path: Path) -> None:
    source, _ = damaged(tmp_path / "in.mkv", "cut")
    with VideoReader(source, end=Position(frame=10)) as reader:
        assert len(list(reader)) == 10
    assert reader.notices == []


@pytest.mark.parametrize("variant", range(40))
def test_flipped_bytes_never_crash(tmp_path: Path, variant: int) -> None:
    """Any damage is an InputError, or frames of one size in order."""
    clips = [
        ("in.mp4", Clip(audio=["aac"], pix_fmt="yuv420p", pictures=NOISE)),
        ("in.mkv", Clip(codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": "log-level=none"})),
        ("in.ts", Clip(codec="mpeg2video", pix_fmt="yuv420p", time_base=Fraction(1, 25), pts=range(12), fields="tff")),
        ("in.mov", Clip(codec="prores_ks", pix_fmt="yuva444p10le")),
        ("in.gif", Clip(pts=range(0, 48, 4), time_base=Fraction(1, 100), codec="gif", pix_fmt="rgb8")),
    ]
    name, clip = clips[variant % len(clips)]
    source = write_clip(tmp_path / name, clip)
    data, rng = bytearray(source.read_bytes()), np.random.default_rng(variant)
    for position in rng.integers(0, len(data), rng.integers(1, 40)):
        data[position] ^= rng.integers(1, 256)
    source.write_bytes(data)
    try:
        with VideoReader(source) as reader:
            last = None
            for frame in reader:
                assert frame.pixels.shape == (reader.info.height, reader.info.width, 3)
                assert last is None or frame.pts > last
                last = frame.pts
    except InputError:
        pass

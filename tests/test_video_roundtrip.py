"""Frame count, size, times and sound survive reader -> writer, to the frame, the pixel, the tick and the byte."""

from __future__ import annotations

import gc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from duovsr.errors import UsageError
from duovsr.video.reader import VideoReader
from tests.clips import Clip, edited, packet_hashes, picture, probe, start_time, video_times, write_clip
from tests.pieces import copy_clip

IRREGULAR = (0, 512, 1024, 2560, 2816, 3072, 7168, 7680, 12800, 13000, 13500, 14000)


def assert_same_times(found: list[Fraction], expected: list[Fraction], suffix: str) -> None:
    tolerance = Fraction(1, 2000) if suffix in (".mkv", ".webm") else Fraction(0)
    assert len(found) == len(expected)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= tolerance


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 17, 33, 100])
def test_every_frame_keeps_its_time(tmp_path: Path, frames: int, suffix: str) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, frames * 512, 512), audio=["aac"]))
    target = tmp_path / f"out{suffix}"
    copy_clip(source, target)
    assert_same_times(video_times(target), video_times(source), suffix)
    assert packet_hashes(target, "audio") == packet_hashes(source, "audio")


@pytest.mark.parametrize("target_suffix", [".mp4", ".mkv", ".mov", ".webm"])
@pytest.mark.parametrize("source_suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_irregular_times_in_all_containers(tmp_path: Path, source_suffix: str, target_suffix: str) -> None:
    pts = range(len(IRREGULAR)) if source_suffix == ".avi" else IRREGULAR
    time_base = Fraction(1, 25) if source_suffix == ".avi" else Fraction(1, 12800)
    codec = "mpeg4" if source_suffix == ".avi" else "libx264"
    clip = Clip(pts=pts, time_base=time_base, codec=codec, pix_fmt="yuv420p", options={"bf": "2"}, audio=["libmp3lame"])
    source, target = write_clip(tmp_path / f"in{source_suffix}", clip), tmp_path / f"out{target_suffix}"
    copied = copy_clip(source, target, scale=2)
    assert_same_times(video_times(target), video_times(source), target_suffix)
    assert (probe(target).width, probe(target).height) == (128, 96)
    if target_suffix == ".webm":
        assert copied.notices == ["audio stream #1 (mp3) is converted to opus: webm does not hold it"]
    else:
        assert copied.notices == []
        assert packet_hashes(target, "audio") == packet_hashes(source, "audio")


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9", "ffv1", "prores"])
def test_codecs_keep_times_and_size(tmp_path: Path, codec: str) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=IRREGULAR))
    target = tmp_path / "out.mkv"
    copy_clip(source, target, codec=codec)
    info = probe(target)
    assert (info.codec, info.width, info.height) == (codec, 64, 48)
    assert_same_times(video_times(target), video_times(source), ".mkv")


@pytest.mark.parametrize("size", [(63, 47), (321, 181), (1, 1), (2, 2), (7, 3)])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_odd_sizes_are_exact(tmp_path: Path, size: tuple[int, int], scale: int) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0, 512, 1024), size=size))
    target = tmp_path / "out.mp4"
    copied = copy_clip(source, target, scale=scale)
    assert (probe(target).width, probe(target).height) == (scale * size[0], scale * size[1])
    odd = scale * size[0] % 2 or scale * size[1] % 2
    assert bool(odd) == any("odd side: written as 4:4:4" in notice for notice in copied.notices)


@pytest.mark.parametrize("codec", ["av1", "vp9"])
def test_odd_sizes_in_codecs_that_take_them_in_420(tmp_path: Path, codec: str) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0, 512), size=(63, 47)))
    copied = copy_clip(source, tmp_path / "out.mkv", codec=codec)
    assert (probe(tmp_path / "out.mkv").width, probe(tmp_path / "out.mkv").height) == (63, 47)
    assert copied.notices == []


def test_pix_fmt_that_cannot_hold_odd_sides_is_refused(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0,), size=(63, 47)))
    with pytest.raises(UsageError, match="cannot write 63x47 in `yuv420p`") as caught:
        copy_clip(source, tmp_path / "out.mp4", pix_fmt="yuv420p")
    assert caught.value.hint is not None
    assert "yuv444p" in caught.value.hint


@pytest.mark.parametrize("first", [36000, 13])
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_late_start_keeps_the_offset_to_the_sound(tmp_path: Path, first: int, suffix: str) -> None:
    clip = Clip(pts=range(first, first + 5120, 512), audio=["aac"], muxer={"movie_timescale": "12800"})
    source, target = write_clip(tmp_path / "in.mp4", clip), tmp_path / f"out{suffix}"
    copy_clip(source, target)
    assert_same_times(video_times(target), video_times(source), suffix)
    offsets = [start_time(path, "video") - start_time(path, "audio") for path in (source, target)]
    assert abs(offsets[0] - offsets[1]) <= Fraction(1, 1000)


@pytest.mark.parametrize("bframes", ["0", "3"])
@pytest.mark.parametrize("gap", [3, 60, 3600])
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_a_clock_that_is_too_fine_for_mp4_is_made_coarser(tmp_path: Path, suffix: str, gap: int, bframes: str) -> None:
    """Its tables hold 2.1 s between two packets, or between a packet's times, in nanoseconds."""
    ticks = [0, 33366667, 66733333, 100000000]
    pts = ticks + [ticks[-1] + gap * 10**9 + tick for tick in ticks]
    audio = ["aac"] if gap < 3600 else []
    clip = Clip(pts=pts, time_base=Fraction(1, 10**9), codec="ffv1", pix_fmt="bgr0", audio=audio)
    source, target = write_clip(tmp_path / "in.nut", clip), tmp_path / f"out{suffix}"
    assert copy_clip(source, target, codec="h264", encoder_options=(("bf", bframes),)).notices == []
    found, expected = video_times(target), video_times(source)
    assert len(found) == len(expected)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < Fraction(1, 10**5)
    if audio:
        assert packet_hashes(target, "audio") == packet_hashes(source, "audio")
        assert abs(start_time(target, "audio") - start_time(source, "audio")) < Fraction(1, 10**3)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("ticks", [705_600_000, 10**9])
def test_a_clock_that_is_too_fine_for_libvpx(tmp_path: Path, ticks: int, suffix: str) -> None:
    """It counts in 100 ns, and gives other times back than those of the frames; two of them are nearer than that."""
    pts = [0, 1, *(round(index * Fraction(1001, 24000) * ticks) for index in range(1, 9))]
    clip = Clip(pts=pts, time_base=Fraction(1, ticks), codec="ffv1", pix_fmt="bgr0")
    source, target = write_clip(tmp_path / "in.nut", clip, "nut"), tmp_path / f"out{suffix}"
    copy_clip(source, target, codec="vp9")
    assert_same_times(video_times(target), video_times(source), suffix)


@pytest.mark.parametrize("pts", [(0, 1, 2, 22, 42), (7, 11, 16, 20)])
@pytest.mark.parametrize("codec", ["h264", "vp9", "ffv1", "prores"])
def test_frames_nearer_than_the_clock_of_matroska(tmp_path: Path, codec: str, pts: tuple[int, ...]) -> None:
    """FFmpeg takes the duration that the rate tells, here none, for that of the first frames, and moves them by it."""
    clip = Clip(pts=pts, codec="ffv1", pix_fmt="bgr0")
    source, target = write_clip(tmp_path / "in.nut", clip, "nut"), tmp_path / "out.mkv"
    copy_clip(source, target, codec=codec)
    assert_same_times(video_times(target), video_times(source), ".mkv")


def test_rotated_clip_comes_out_upright(tmp_path: Path) -> None:
    clip = Clip(pts=(0, 512), rotation=90, aspect=Fraction(16, 11))
    source, target = write_clip(tmp_path / "in.mp4", clip), tmp_path / "out.mkv"
    copy_clip(source, target, codec="ffv1")
    info = probe(source)
    assert (info.width, info.height, info.rotation, info.sample_aspect_ratio) == (48, 64, 90, Fraction(11, 16))
    assert (probe(target).width, probe(target).height, probe(target).rotation) == (48, 64, 0)
    with VideoReader(target) as reader:
        pixels = next(iter(reader)).pixels.astype(int)
    assert np.abs(pixels - np.rot90(picture(0, (64, 48)))).mean() < 3  # lossy source


def test_mirrored_clip_comes_out_mirrored(tmp_path: Path) -> None:
    path = tmp_path / "in.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv444p"
        video.set_display_rotation(0, hflip=True)
        container.mux(video.encode(av.VideoFrame.from_ndarray(picture(0, (64, 48)), format="rgb24")))
        container.mux(video.encode(None))
    with VideoReader(path) as reader:
        pixels = next(iter(reader)).pixels.astype(int)
    assert np.abs(pixels - picture(0, (64, 48))[:, ::-1]).mean() < 3


@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("hevc", ".mov"), ("h264", ".mkv"), ("ffv1", ".mp4")])
def test_pixel_aspect_ratio_is_kept(tmp_path: Path, codec: str, suffix: str) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0, 512), aspect=Fraction(16, 11)))
    copied = copy_clip(source, tmp_path / f"out{suffix}", codec=codec)
    assert probe(tmp_path / f"out{suffix}").sample_aspect_ratio == Fraction(16, 11)
    assert copied.notices == []


def test_lost_pixel_aspect_ratio_is_said(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0, 512), aspect=Fraction(16, 11)))
    assert "pixel aspect ratio 16/11 is not kept" in copy_clip(source, tmp_path / "out.mkv", codec="vp9").notices[0]


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(30000, 1001), Fraction(50)])
@pytest.mark.parametrize(("suffix", "codec"), [(".h264", "libx264"), (".hevc", "libx265"), (".m2v", "mpeg2video")])
def test_raw_streams_have_the_rate_that_they_tell(tmp_path: Path, suffix: str, codec: str, rate: Fraction) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    clip = Clip(pts=range(12), time_base=1 / rate, codec=codec, pix_fmt="yuv420p", options=options)
    source, target = write_clip(tmp_path / f"in{suffix}", clip), tmp_path / "out.mp4"
    assert probe(source).frame_rate == rate
    assert copy_clip(source, target).notices == []
    times = video_times(target)
    assert times == [times[0] + index / rate for index in range(12)]


@pytest.mark.parametrize(("suffix", "codec"), [(".h264", "libx264"), (".mjpeg", "mjpeg")])
def test_a_raw_stream_without_a_rate_is_said(tmp_path: Path, suffix: str, codec: str) -> None:
    """MJPEG has none, and the clock that x264 was given is not one."""
    rate = Fraction(12800, 512)
    ticks = Clip(pts=range(0, 8 * 512, 512)) if codec == "libx264" else Clip(pts=range(8), time_base=1 / rate)
    source = write_clip(tmp_path / f"in{suffix}", Clip(**{**vars(ticks), "codec": codec, "pix_fmt": "yuvj420p"}))
    copied = copy_clip(source, tmp_path / "out.mkv")
    assert copied.notices == ["the raw stream tells no frame rate: 25 frames a second are assumed"]
    assert video_times(tmp_path / "out.mkv") == [Fraction(index, 25) for index in range(8)]


def test_gif_and_png_are_clips(tmp_path: Path) -> None:
    gif = write_clip(tmp_path / "in.gif", Clip(pts=(0, 4, 10), time_base=Fraction(1, 100), codec="gif", pix_fmt="rgb8"))
    copy_clip(gif, tmp_path / "gif.mp4")
    assert video_times(tmp_path / "gif.mp4") == [0, Fraction(4, 100), Fraction(1, 10)]
    png = write_clip(tmp_path / "in.png", Clip(pts=(0,), codec="png", pix_fmt="rgb24"), "image2")
    copy_clip(png, tmp_path / "png.mkv", codec="ffv1")
    with VideoReader(tmp_path / "png.mkv") as reader:
        assert (next(iter(reader)).pixels == picture(0, (64, 48))).all()


def test_size_that_changes_in_mid_stream_loses_nothing(tmp_path: Path) -> None:
    parts = [write_clip(tmp_path / f"{side}.ts", Clip(size=(side, side), pix_fmt="yuv420p")) for side in (64, 96)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    copied = copy_clip(joined, tmp_path / "out.mp4")
    assert "the size changes in mid-stream: 12 frames rescaled to 64x64" in copied.notices
    assert len(video_times(tmp_path / "out.mp4")) == 24


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_cut_off_clip_yields_what_decodes_and_says_so(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), dtype=np.uint8)
    clip = Clip(pts=range(0, 60 * 512, 512), pictures=list(noise), audio=["aac"], muxer={"movflags": "faststart"})
    source = write_clip(tmp_path / f"in{suffix}", clip if suffix == ".mp4" else Clip(**{**vars(clip), "muxer": {}}))
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2])
    copied = copy_clip(source, tmp_path / "out.mp4")
    frames = len(copied.pts)
    assert 15 <= frames <= 45
    assert any(notice.startswith(f"damaged input: decoded {frames} of 60 frames") for notice in copied.notices)


@pytest.mark.parametrize("movflags", ["faststart", "frag_keyframe+empty_moov"])
@pytest.mark.parametrize(
    ("audio", "lost"), [([], "decoded 58 of 60 frames"), (["aac"], "parts of audio stream #1 (aac) are missing")]
)
def test_the_last_bytes_of_an_mp4_are_missed(tmp_path: Path, audio: list[str], lost: str, movflags: str) -> None:
    """However few they are: its index tells of them."""
    pts = range(0, 60 * 512, 512)
    source = write_clip(tmp_path / "in.mp4", Clip(pts=pts, audio=audio, muxer={"movflags": movflags}))
    assert copy_clip(source, tmp_path / "whole.mp4").notices == []
    with av.open(str(source)) as container:
        last = sorted(entry.pos for stream in container.streams for entry in stream.index_entries)[-2:]
    source.write_bytes(source.read_bytes()[: last[0]])
    assert f"damaged input: {lost}" in copy_clip(source, tmp_path / "out.mp4").notices


def test_flipped_bytes_are_survived_and_said(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), dtype=np.uint8)
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 60 * 512, 512), pictures=list(noise)))
    data = bytearray(source.read_bytes())
    for position in np.random.default_rng(1).integers(len(data) // 4, len(data) * 3 // 4, 30):
        data[position] ^= 255
    source.write_bytes(bytes(data))
    copied = copy_clip(source, tmp_path / "out.mp4")
    assert any("damaged input: decoded" in notice for notice in copied.notices)


def test_sound_clip_has_no_notices(tmp_path: Path) -> None:
    """Sound much longer than the picture is no damage."""
    source = write_clip(tmp_path / "in.mkv", Clip(pts=(0, 512), audio=["flac"]))
    assert copy_clip(source, tmp_path / "out.mkv").notices == []


def test_pictures_are_freed_at_once(tmp_path: Path) -> None:
    """A reference cycle would keep every picture until the collector comes by: hundreds of megabytes at full HD."""
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 200 * 512, 512), rotation=90))
    gc.collect()
    gc.disable()
    try:
        copy_clip(source, tmp_path / "out.mp4")
        assert gc.collect() < 300  # pieces open more containers than pictures would
    finally:
        gc.enable()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_the_frame_rate_is_told(tmp_path: Path, suffix: str) -> None:
    """Of H.264 in Matroska, FFmpeg would take the rate of the clock that its header has."""
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 50 * 512, 512)))
    copy_clip(source, tmp_path / f"out{suffix}")
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        assert container.streams.video[0].average_rate == 25


def test_the_rate_of_a_clock_is_none_of_frames(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "clip.mp4", Clip(pts=range(0, 50 * 512, 512)))
    path = edited(source, tmp_path / "in.mkv", lambda out, copies: setattr(copies[0].codec_context, "framerate", 12800))
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 12800
    assert (probe(path).frame_rate, probe(path).num_frames) == (25, 50)

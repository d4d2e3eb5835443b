"""Odd files through a whole run: every frame comes out, at its time, with the sound as far from it as before."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from duovsr import UpscaleOptions
from duovsr.video.reader import VideoReader
from tests.bicubic import bicubic
from tests.clips import Clip, picture, probe, start_time, video_times, write_clip

VFR = (0, 512, 1024, 2560, 2816, 3072, 7168, 7680, 12800, 13000, 13500, 14000)
LATE = range(36000, 36000 + 12 * 512, 512)
TICK = Fraction(1, 25)


def rgba(index: int) -> np.ndarray:
    return np.dstack([picture(index, (64, 48)), np.full((48, 64), 200 - index, np.uint8)])


CORPUS: dict[str, Clip] = {
    "plain.mp4": Clip(audio=["aac"]),
    "plain.mkv": Clip(audio=["flac"]),
    "plain.mov": Clip(audio=["aac"]),
    "plain.ts": Clip(pix_fmt="yuv420p", audio=["aac"]),
    "plain.avi": Clip(codec="mpeg4", pix_fmt="yuv420p", pts=range(12), time_base=TICK, audio=["libmp3lame"]),
    "plain.webm": Clip(codec="libvpx-vp9", pix_fmt="yuv420p", audio=["libopus"]),
    "mpeg2.ts": Clip(codec="mpeg2video", pix_fmt="yuv420p", pts=range(12), time_base=TICK),
    "vfr.mp4": Clip(pts=VFR, audio=["aac"]),
    "vfr.mkv": Clip(pts=VFR, audio=["aac"]),
    "vfr.mov": Clip(pts=VFR),
    "vfr_b_frames.mp4": Clip(pts=VFR, options={"bf": "3"}, audio=["aac"]),
    "late.mp4": Clip(pts=LATE, audio=["aac"], muxer={"movie_timescale": "12800"}),
    "late.mkv": Clip(pts=LATE, audio=["aac"]),
    "late.ts": Clip(pts=LATE, pix_fmt="yuv420p", audio=["aac"]),
    "b_frames.ts": Clip(pix_fmt="yuv420p", options={"bf": "8"}, audio=["aac"]),
    "one_keyframe.ts": Clip(pts=range(0, 60 * 512, 512), pix_fmt="yuv420p", options={"g": "500", "bf": "8"}),
    "hevc.mkv": Clip(codec="libx265", pix_fmt="yuv420p"),
    "hevc_ten_bits.mp4": Clip(codec="libx265", pix_fmt="yuv420p10le", color=(9, 18, 9, 1)),
    "av1.mp4": Clip(codec="libsvtav1", pix_fmt="yuv420p"),
    "vp8.webm": Clip(codec="libvpx", pix_fmt="yuv420p"),
    "prores.mov": Clip(codec="prores_ks", pix_fmt="yuv422p10le"),
    "prores_alpha.mov": Clip(codec="prores_ks", pix_fmt="yuva444p10le", pictures=[rgba(i) for i in range(12)]),
    "vp9_alpha.webm": Clip(codec="libvpx-vp9", pix_fmt="yuva420p", pictures=[rgba(i) for i in range(12)]),
    "ffv1.mkv": Clip(codec="ffv1", pix_fmt="bgr0"),
    "ffv1_deep.mkv": Clip(codec="ffv1", pix_fmt="yuv444p12le"),
    "gray.mkv": Clip(codec="ffv1", pix_fmt="gray"),
    "rgb.mp4": Clip(codec="libx264rgb", pix_fmt="rgb24"),
    "full_range.mp4": Clip(pix_fmt="yuvj420p", color=(1, 1, 1, 2)),
    "rotated.mp4": Clip(rotation=90),
    "upside_down.mp4": Clip(rotation=180),
    "wide_pixels.mp4": Clip(aspect=Fraction(16, 11)),
    "rotated_wide_pixels.mp4": Clip(rotation=270, aspect=Fraction(16, 11)),
    "odd_sides.mp4": Clip(size=(63, 47)),
    "one_pixel.mkv": Clip(codec="ffv1", pix_fmt="bgr0", size=(1, 1)),
    "two_pixels.mp4": Clip(size=(2, 2), pix_fmt="yuv420p"),
    "one_frame.mp4": Clip(pts=(0,), audio=["aac"]),
    "two_frames.mkv": Clip(pts=(0, 5120)),
    "many_tracks.mkv": Clip(audio=["aac", "libopus", "flac"], languages=["deu", "fra", "eng"]),
    "chapters.mp4": Clip(audio=["aac"], chapters=[(0, 200, "One"), (200, 480, "Two")], metadata={"title": "A clip"}),
    "loop.gif": Clip(pts=(0, 4, 10), time_base=Fraction(1, 100), codec="gif", pix_fmt="rgb8"),
    "y4m.y4m": Clip(codec="rawvideo", pix_fmt="yuv420p", pts=range(12), time_base=TICK),
}


@pytest.mark.parametrize("name", CORPUS)
def test_frames_and_times_are_kept(tmp_path: Path, name: str) -> None:
    clip = CORPUS[name]
    source = write_clip(tmp_path / name, clip, "yuv4mpegpipe" if name.endswith(".y4m") else None)
    target = tmp_path / "out.mkv"
    bicubic().upscale_file(source, target, UpscaleOptions(scale=2, codec="ffv1"))
    with VideoReader(source) as reader:
        before = [frame.pts * frame.time_base for frame in reader]
    after = video_times(target)
    assert len(before) == len(clip.pts)
    assert len(after) == len(before)
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) <= Fraction(1, 2000)
    upright = probe(source)
    assert (probe(target).width, probe(target).height) == (2 * upright.width, 2 * upright.height)
    if clip.audio:
        offsets = [start_time(path, "video") - start_time(path, "audio") for path in (source, target)]
        assert abs(offsets[0] - offsets[1]) <= Fraction(1, 1000)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (7, 7), (17, 17), (33, 33), (321, 181), (479, 270)])
def test_sizes_are_exact(tmp_path: Path, size: tuple[int, int], scale: int) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(pts=(0, 512), size=size, codec="ffv1", pix_fmt="bgr0"))
    bicubic().upscale_file(source, tmp_path / "out.mp4", UpscaleOptions(scale=scale))
    info = probe(tmp_path / "out.mp4")
    assert (info.width, info.height) == (scale * size[0], scale * size[1])


@pytest.mark.parametrize("suffix", [".webm", ".mov", ".mkv", ".mp4"])
@pytest.mark.parametrize("name", ["vp9_alpha.webm", "prores_alpha.mov"])
def test_transparency_is_kept_or_flattened_with_a_word(tmp_path: Path, name: str, suffix: str) -> None:
    source, target = write_clip(tmp_path / name, CORPUS[name]), tmp_path / f"out{suffix}"
    report = bicubic().upscale_file(source, target, UpscaleOptions(scale=1, color="none"))
    with VideoReader(source) as reader:
        before = [frame.alpha for frame in reader]
    with VideoReader(target) as reader:
        after = [frame.alpha for frame in reader]
    assert len(after) == len(before) == 12
    if suffix == ".mp4":
        assert any("transparency is flattened on black" in notice for notice in report.warnings)
        return
    for old, new in zip(before, after, strict=True):
        assert old is not None
        assert new is not None
        levels = [alpha.astype(float) / np.iinfo(alpha.dtype).max * 255 for alpha in (old, new)]
        assert np.abs(levels[0] - levels[1]).mean() < 2

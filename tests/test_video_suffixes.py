"""Every name that a folder is searched for is one of something that can be read."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from duovsr.engine.batch import Selection, find_items
from duovsr.video.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from duovsr.video.reader import VideoReader
from tests.clips import Clip, write_clip
from tests.test_video_info import write_heic

# (container, codec, pixel format): endings
VIDEOS = {
    ("apng", "apng", "rgb24"): ".apng",
    ("asf", "wmv2", "yuv420p"): ".asf .wmv",
    ("avi", "mpeg4", "yuv420p"): ".avi .divx .xvid",
    ("dv", "dvvideo", "yuv420p"): ".dv",
    ("flv", "flv", "yuv420p"): ".flv",
    ("gif", "gif", "rgb8"): ".gif",
    ("gxf", "mpeg2video", "yuv420p"): ".gxf",
    ("h264", "libx264", "yuv420p"): ".264 .h264",
    ("hevc", "libx265", "yuv420p"): ".265 .h265 .hevc",
    ("ismv", "libx264", "yuv420p"): ".ismv",
    ("ivf", "libvpx-vp9", "yuv420p"): ".ivf",
    ("matroska", "libx264", "yuv420p"): ".mk3d .mkv",
    ("mjpeg", "mjpeg", "yuvj420p"): ".mjpeg .mjpg",
    ("mov", "jpeg2000", "rgb24"): ".mj2",
    ("mov", "libx264", "yuv420p"): ".3g2 .3gp .f4v .m4v .mov .mp4 .qt",
    ("mpeg", "mpeg1video", "yuv420p"): ".mpe .mpeg .mpg",
    ("mpeg1video", "mpeg1video", "yuv420p"): ".m1v",
    ("mpeg2video", "mpeg2video", "yuv420p"): ".m2v .mpv",
    ("mpegts", "mpeg2video", "yuv420p"): ".m2t .m2ts .mts .tod .tp .trp .ts",
    ("mxf", "mpeg2video", "yuv422p"): ".mxf",
    ("nut", "ffv1", "bgr0"): ".nut",
    ("obu", "libsvtav1", "yuv420p"): ".obu",
    ("ogg", "libvpx", "yuv420p"): ".ogm .ogv",
    ("rm", "rv20", "yuv420p"): ".rm .rmvb",
    ("vob", "mpeg2video", "yuv420p"): ".evo .m2p .vob .vro",
    ("webm", "libvpx", "yuv420p"): ".webm",
    ("wtv", "mpeg2video", "yuv420p"): ".wtv",
    ("yuv4mpegpipe", "rawvideo", "yuv420p"): ".y4m",
}
IMAGES = {
    ("avif", "libsvtav1", "yuv420p"): ".avif",
    ("image2", "bmp", "bgr24"): ".bmp",
    ("image2", "dpx", "rgb24"): ".dpx",
    ("image2", "exr", "gbrpf32le"): ".exr",
    ("image2", "hdr", "gbrpf32le"): ".hdr",
    ("image2", "jpeg2000", "rgb24"): ".j2c .j2k .jp2 .jpc",
    ("image2", "jpegls", "rgb24"): ".jls",
    ("image2", "libwebp", "bgra"): ".webp",
    ("image2", "mjpeg", "yuvj420p"): ".jfif .jpe .jpeg .jpg",
    ("image2", "pam", "rgb24"): ".pam",
    ("image2", "pbm", "monow"): ".pbm",
    ("image2", "pcx", "rgb24"): ".pcx",
    ("image2", "pfm", "gbrpf32le"): ".pfm",
    ("image2", "pgm", "gray"): ".pgm",
    ("image2", "png", "rgb24"): ".png",
    ("image2", "ppm", "rgb24"): ".pnm .ppm",
    ("image2", "qoi", "rgb24"): ".qoi",
    ("image2", "sgi", "rgb24"): ".sgi",
    ("image2", "sunrast", "bgr24"): ".ras .sun",
    ("image2", "targa", "bgr24"): ".tga",
    ("image2", "tiff", "rgb24"): ".tif .tiff",
    ("image2", "xwd", "bgra"): ".xwd",
    ("heic", "", ""): ".heic .heif .hif",
}
CASES = [(suffix, *how) for table in (VIDEOS, IMAGES) for how, suffixes in table.items() for suffix in suffixes.split()]


def test_all_are_here() -> None:
    assert {suffix for suffix, *_ in CASES} == VIDEO_SUFFIXES | IMAGE_SUFFIXES


@pytest.mark.parametrize(("suffix", "container", "codec", "pix_fmt"), CASES)
def test_what_a_folder_finds_is_read(tmp_path: Path, suffix: str, container: str, codec: str, pix_fmt: str) -> None:
    path = tmp_path / f"in{suffix}"
    frames = 12 if suffix in VIDEO_SUFFIXES else 1
    size = (720, 576) if container in ("dv", "gxf") else (128, 128)  # they hold those of television alone
    if container == "heic":
        write_heic(path, grid=False)
    else:
        clip = Clip(range(frames), Fraction(1, 25), size=size, codec=codec, pix_fmt=pix_fmt)
        write_clip(path, clip, container)
    selection = Selection(pattern=None if suffix in VIDEO_SUFFIXES else f"*{suffix}")
    assert [item.source for item in find_items(tmp_path, tmp_path / "out", selection)] == [path]
    with VideoReader(path) as reader:
        assert [frame.pixels.shape for frame in reader] == [(size[1], size[0], 3)] * frames

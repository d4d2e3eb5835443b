"""Colours: the conversions against H.273 in float64, and the tags."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from clips import Clip, write_clip

from duovsr.errors import InputError
from duovsr.video.color import (
    FULL,
    LUMA_WEIGHTS,
    ColorTags,
    FrameToRgb,
    RgbToFrame,
    decoding_tags,
    image_tags,
    matrix_by_size,
    output_tags,
)
from duovsr.video.reader import VideoReader
from tests.clips import probe
from tests.pieces import copy_clip

UNTAGGED = ColorTags(2, 2, 2, 0)
CASES = [(matrix, full) for matrix in (1, 6, 9) for full in (1, 2)]


def patches(dtype: type = np.uint8) -> np.ndarray:
    """(96, 144, 3): flat 24x24 patches of random colours, black and white among them; as wide as 4:2:0 smears."""
    colors = np.random.default_rng(0).random((4, 6, 3))
    colors[0, 0], colors[0, 1], colors[0, 2] = 0, 1, np.array([200, 50, 30]) / 255
    return np.rint(colors * np.iinfo(dtype).max).astype(dtype).repeat(24, axis=0).repeat(24, axis=1)


def centres(pixels: np.ndarray) -> np.ndarray:
    """(4, 6, ...): one pixel inside each patch, away from the borders that chroma resampling mixes."""
    return pixels[12::24, 12::24]


def codes_of(rgb: np.ndarray, matrix: int, full: bool, depth: int) -> np.ndarray:
    """(..., 3) float64 YUV codes of RGB in 0..1: the equations of H.273, 8.3, written out."""
    kr, kb = LUMA_WEIGHTS[matrix]
    r, g, b = np.moveaxis(rgb.astype(np.float64), -1, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    u, v = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    if full:
        return np.stack([y, u + 0.5, v + 0.5], -1) * (2**depth - 1) + np.array([0, 0.5, 0.5])
    return np.stack([16 + 219 * y, 128 + 224 * u, 128 + 224 * v], -1) * 2 ** (depth - 8)


@pytest.mark.parametrize(("matrix", "full"), [(matrix, full) for matrix in LUMA_WEIGHTS for full in (1, 2)])
@pytest.mark.parametrize(
    ("dtype", "pix_fmt", "depth"),
    [
        (np.uint8, "yuv444p", 8),
        (np.uint8, "yuv444p10le", 10),
        (np.uint16, "yuv444p10le", 10),
        (np.uint16, "yuv444p12le", 12),
        (np.uint16, "yuv444p", 8),
    ],
)
def test_encoded_codes_follow_the_standard(matrix: int, full: int, dtype: type, pix_fmt: str, depth: int) -> None:
    rgb = patches(dtype)
    frame = RgbToFrame(ColorTags(1, 1, matrix, full), pix_fmt)(rgb)
    samples = [np.frombuffer(plane, np.uint8 if depth == 8 else np.uint16) for plane in frame.planes]
    planes = np.stack([plane.reshape(96, -1)[:, :144] for plane in samples], -1)
    errors = np.abs(planes - codes_of(rgb / np.iinfo(dtype).max, matrix, full == 2, depth).clip(0, 2**depth - 1))
    assert errors.max() < (0.51 if dtype is np.uint16 else 1.35)  # swscale rounds full range a code too low at worst
    assert (frame.colorspace, frame.color_range) == (matrix, full)


@pytest.mark.parametrize(("matrix", "full"), CASES)
@pytest.mark.parametrize(
    ("dtype", "pix_fmt", "depth"),
    [
        (np.uint8, "yuv420p", 8),
        (np.uint8, "yuv444p", 8),
        (np.uint16, "yuv420p10le", 10),
        (np.uint16, "yuv422p12le", 12),
    ],
)
def test_colours_survive_the_way_there_and_back(matrix: int, full: int, dtype: type, pix_fmt: str, depth: int) -> None:
    rgb, tags = patches(dtype), ColorTags(1, 1, matrix, full)
    back = FrameToRgb(tags, depth)(RgbToFrame(tags, pix_fmt)(rgb))
    assert back.dtype == dtype
    errors = np.abs(centres(back).astype(int) - centres(rgb)) / np.iinfo(dtype).max * (2**depth - 1)
    assert errors.max() <= 2  # the quantisation of YUV itself, in codes of the format's depth
    assert errors.mean() <= 0.75


@pytest.mark.parametrize(("matrix", "full"), CASES)
@pytest.mark.parametrize(("pix_fmt", "dtype"), [("yuv444p", np.uint8), ("yuv420p10le", np.uint16)])
def test_reading_then_lossless_writing_is_the_identity(
    tmp_path: Path, matrix: int, full: int, pix_fmt: str, dtype: type
) -> None:
    """Acceptance: at most 2 levels of 255, or 1 of 1023, from the source's colours to the output's."""
    clip = Clip(
        pts=(0, 512),
        size=(144, 96),
        codec="ffv1",
        pix_fmt=pix_fmt,
        pictures=[patches()] * 2,
        color=(1, 1, matrix, full),
    )
    source, target = write_clip(tmp_path / "in.mkv", clip), tmp_path / "out.mkv"
    copy_clip(source, target, codec="ffv1")
    with VideoReader(source) as before, VideoReader(target) as after:
        for first, second in zip(before, after, strict=True):
            assert first.pixels.dtype == second.pixels.dtype == dtype
            assert (first.pixels == second.pixels).all()  # RGB through ffv1 is bit-exact
            errors = np.abs(centres(second.pixels) / np.iinfo(dtype).max - centres(patches()) / 255)
            assert errors.max() <= 2.01 / 255


@pytest.mark.parametrize(("matrix", "full"), CASES)
def test_ten_bit_codes_come_back_exactly(matrix: int, full: int) -> None:
    """YUV codes -> RGB -> YUV codes: what a model that changes nothing does to a 10-bit clip."""
    tags = ColorTags(matrix, matrix, matrix, full)
    coded = RgbToFrame(tags, "yuv444p10le")(patches(np.uint16))
    again = RgbToFrame(tags, "yuv444p10le")(FrameToRgb(tags, 10)(coded))
    for before, after in zip(coded.planes, again.planes, strict=True):
        errors = np.frombuffer(before, np.uint16).astype(int) - np.frombuffer(after, np.uint16)
        assert np.abs(errors).max() <= 1


def test_untagged_video_is_read_and_tagged_as_players_do(tmp_path: Path) -> None:
    """An untagged 480p source crosses the players' SD/HD line at x4: the colours must not change."""
    red = np.tile(np.array([200, 50, 30], np.uint8), (120, 320, 1))
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0,), size=(320, 120), pictures=[red], options={"crf": "0"}))
    target = tmp_path / "out.mp4"
    copy_clip(source, target, scale=4, crf=1)
    assert probe(source).color == UNTAGGED
    assert probe(target).color == ColorTags(1, 1, 1, 1)
    with VideoReader(target) as reader:
        assert np.abs(next(iter(reader)).pixels.astype(int) - red[0, 0]).max() <= 2


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9", "prores"])
@pytest.mark.parametrize("color", [(9, 18, 9, 1), (1, 1, 1, 2), (5, 6, 5, 1)])
def test_tags_are_written_in_every_codec(tmp_path: Path, codec: str, color: tuple[int, int, int, int]) -> None:
    if codec == "prores" and color[3] == 2:
        pytest.skip("ProRes has no full range")
    source = write_clip(tmp_path / "in.mkv", Clip(pts=(0, 512), codec="ffv1", pix_fmt="yuv420p", color=color))
    for suffix in (".mkv", ".mov") if codec not in ("vp9", "av1") else (".mkv", ".mp4"):
        copy_clip(source, tmp_path / f"out{suffix}", codec=codec)
        assert probe(tmp_path / f"out{suffix}").color == ColorTags(*color)


def test_deep_sources_stay_deep(tmp_path: Path) -> None:
    pictures = [patches(np.uint16)] * 4
    clip = Clip(
        pts=(0, 512, 1024, 1536),
        size=(144, 96),
        codec="libx265",
        pix_fmt="yuv420p10le",
        color=(9, 18, 9, 1),
        pictures=pictures,
    )
    source = write_clip(tmp_path / "in.mp4", clip)
    writer = copy_clip(source, tmp_path / "out.mp4")
    info = probe(tmp_path / "out.mp4")
    assert (info.codec, info.bit_depth, info.color) == ("hevc", 10, ColorTags(9, 18, 9, 1))
    assert writer.notices == []
    shallow = copy_clip(source, tmp_path / "out.webm", codec="vp9")
    assert shallow.notices == ["the source has 10 bits a channel, the output 8 (vp9, yuv420p)"]


@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [("h264", "gray"), ("hevc", "gray10le"), ("ffv1", "gray"), ("ffv1", "gray16le"), ("ffv1", "ya8")],
)
@pytest.mark.parametrize(("dtype", "layout"), [(np.uint8, "rgb24"), (np.uint16, "rgb48be")])
def test_gray_keeps_black_and_white(tmp_path: Path, codec: str, pix_fmt: str, dtype: type, layout: str) -> None:
    clip = Clip(pts=(0,), size=(144, 96), codec="png", pix_fmt=layout, pictures=[patches(dtype)])
    source = write_clip(tmp_path / "in.png", clip, "image2")
    copy_clip(source, tmp_path / "out.mkv", codec=codec, pix_fmt=pix_fmt, crf=None if codec == "ffv1" else 1)
    with VideoReader(tmp_path / "out.mkv") as reader:
        back = next(iter(reader)).pixels
    assert reader.info.color.range == FULL
    luma = centres(patches(dtype)) @ np.array([0.299, 0.587, 0.114]) / np.iinfo(dtype).max
    assert np.abs(centres(back)[..., 0] / np.iinfo(back.dtype).max - luma).max() < 2 / 255


@pytest.mark.parametrize(("dtype", "pix_fmt"), [(np.uint8, "rgb24"), (np.uint16, "rgb48be")])
def test_rgb_sources_are_exact(tmp_path: Path, dtype: type, pix_fmt: str) -> None:
    clip = Clip(pts=(0,), size=(144, 96), codec="png", pix_fmt=pix_fmt, pictures=[patches(dtype)])
    copy_clip(write_clip(tmp_path / "in.png", clip, "image2"), tmp_path / "out.mkv", codec="ffv1")
    with VideoReader(tmp_path / "out.mkv") as reader:
        assert (next(iter(reader)).pixels == patches(dtype)).all()
        assert reader.info.color == ColorTags(1, 1, 0, 2) or reader.info.color.matrix == 0
    copy_clip(tmp_path / "in.png", tmp_path / "out.mp4", crf=0)
    assert probe(tmp_path / "out.mp4").color.matrix == 6
    assert probe(tmp_path / "out.mp4").color.range == 1


@pytest.mark.parametrize(("size", "matrix"), [((1279, 576), 6), ((1280, 2), 1), ((2, 577), 1)])
def test_players_size_rule(size: tuple[int, int], matrix: int) -> None:
    assert matrix_by_size(*size) == matrix
    assert output_tags(UNTAGGED, *size, "yuv420p") == ColorTags(matrix, matrix, matrix, 1)


def test_rgb_of_wide_primaries_gets_their_matrix() -> None:
    """As HDR frames from a pattern of PNGs."""
    assert output_tags(ColorTags(9, 16, 0, 2), 64, 48, "yuv420p10le") == ColorTags(9, 16, 9, 1)
    assert output_tags(ColorTags(1, 13, 0, 2), 64, 48, "yuv420p") == ColorTags(1, 13, 6, 1)
    assert output_tags(ColorTags(9, 16, 0, 2), 64, 48, "gbrp16le") == ColorTags(9, 16, 0, 2)


def test_tags_of_images_are_kept() -> None:
    picture = av.VideoFrame(16, 16, "rgb24")
    assert image_tags(picture) == ColorTags(1, 13, 0, 2)
    picture.color_primaries, picture.color_trc = 9, 16
    assert image_tags(picture) == ColorTags(9, 16, 0, 2)
    assert image_tags(av.VideoFrame(16, 16, "yuvj420p")) == ColorTags(1, 13, 2, 2)


def test_unknown_matrix_is_refused(tmp_path: Path) -> None:
    assert decoding_tags(ColorTags(2, 2, 14, 1), 64, 48) is None
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0,), color=(9, 16, 14, 1)))
    assert probe(source).color == ColorTags(9, 16, 14, 1)
    with pytest.raises(InputError, match=r"unsupported colour matrix 14 \(H.273\) in `.*in.mp4`"):
        VideoReader(source)


@pytest.mark.parametrize("layout", ["rgb555", "bgr555", "rgb565", "bgr565"])
def test_bytes_in_either_order_are_the_same_colours(layout: str) -> None:
    """QuickTime's raw video has the high byte first, of which swscale makes other colours."""
    codes = np.random.default_rng(0).integers(0, 2 ** (15 if "555" in layout else 16), (48, 64))
    results = []
    for order in "<>":
        frame = av.VideoFrame(64, 48, layout + {"<": "le", ">": "be"}[order])
        frame.planes[0].update(codes.astype(f"{order}u2").tobytes())
        results.append(FrameToRgb(ColorTags(2, 2, 0, 2), 8)(frame))
    np.testing.assert_array_equal(*results)


def test_pixels_that_cannot_be_converted_are_bad_input(tmp_path: Path) -> None:
    """Packed four bits and some big-endian formats: FFmpeg decodes them, and swscale does not read them."""
    with av.open(str(tmp_path / "in.nut"), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb4"
        container.mux(stream.encode(av.VideoFrame(64, 48, "rgb4")))
    with VideoReader(tmp_path / "in.nut") as reader, pytest.raises(InputError, match=r"pixel format.*`rgb4`"):
        next(iter(reader))

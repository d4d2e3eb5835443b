"""What pictures are made of: fields, transparency, gray, depths, and the display they were graded on."""

from __future__ import annotations

import gc
import os
import struct
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from clips import Clip, picture, translucent, woven, write_clip

from duovsr.video import sidedata
from duovsr.video.color import ColorTags, FrameToRgb
from duovsr.video.reader import Frame, VideoReader
from duovsr.video.sidedata import HDRMetadata, MasteringDisplay
from tests.clips import probe

SIZE = (64, 48)
LOSSLESS = {"qp": "0", "bf": "0"}


def read(path: Path, **settings: bool) -> tuple[list[Frame], list[str]]:
    with VideoReader(path, **settings) as reader:
        return list(reader), reader.notices


def write_woven(path: Path, top_first: bool = True, first: int = 0, **changes: object) -> Path:
    fields = "tff" if top_first else "bff"
    pictures = [woven(index, SIZE, top_first) for index in range(10)]
    pts = range(first, first + 10 * 512, 512)
    clip = Clip(pts=pts, pictures=pictures, fields=fields, options=LOSSLESS, **changes)  # type: ignore[arg-type]
    return write_clip(path, clip)


def combing(pixels: np.ndarray) -> float:
    """How far each line is from the mean of its neighbours: large where fields of two moments are woven."""
    lines = pixels[..., 0].astype(int)
    return float(np.abs(2 * lines[1:-1] - lines[:-2] - lines[2:]).mean())


@pytest.mark.parametrize("top_first", [True, False])
def test_interlaced_video_is_deinterlaced_one_for_one(tmp_path: Path, top_first: bool) -> None:
    source = write_woven(tmp_path / "in.mp4", top_first)
    assert probe(source).interlaced
    frames, notices = read(source)
    woven_frames, _ = read(source, deinterlace=False)
    assert [frame.pts for frame in frames] == [frame.pts for frame in woven_frames] == list(range(0, 5120, 512))
    assert notices == ["the video is interlaced: deinterlaced with bwdif"]
    first_field = 0 if top_first else 1
    for frame, before in zip(frames, woven_frames, strict=True):
        assert (frame.pixels[first_field::2] == before.pixels[first_field::2]).all()
        assert combing(before.pixels) > 20
        assert combing(frame.pixels) < 0.35 * combing(before.pixels)


def test_fields_can_be_kept(tmp_path: Path) -> None:
    frames, notices = read(write_woven(tmp_path / "in.mp4"), deinterlace=False)
    assert notices == ["the video is interlaced: the fields are upscaled as they are woven"]
    assert (frames[3].pixels == woven(3, SIZE)).all()


def test_interlacing_that_begins_later_is_found_and_the_rest_left_alone(tmp_path: Path) -> None:
    part = {"pix_fmt": "yuv420p", "muxer": {"mpegts_copyts": "1"}, "time_base": Fraction(1, 90000)}
    still = Clip(pts=range(0, 36000, 3600), options=LOSSLESS, **part)  # type: ignore[arg-type]
    first = write_clip(tmp_path / "0.ts", still)
    moving = Clip(
        pts=range(36000, 72000, 3600),
        pictures=[woven(index, SIZE) for index in range(10)],
        fields="tff",
        options=LOSSLESS,
        **part,  # type: ignore[arg-type]
    )
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + write_clip(tmp_path / "1.ts", moving).read_bytes())
    assert not probe(joined).interlaced
    frames, notices = read(joined)
    kept, _ = read(joined, deinterlace=False)
    assert notices == ["the video is interlaced in 10 frames: deinterlaced with bwdif"]
    assert [frame.pts for frame in frames] == [frame.pts for frame in kept] == [3600 * n for n in range(20)]
    for number, (frame, before) in enumerate(zip(frames, kept, strict=True)):
        assert (frame.pixels == before.pixels).all() == (number < 10)


def test_progressive_frames_after_interlaced_ones_are_left_alone(tmp_path: Path) -> None:
    part = {"pix_fmt": "yuv420p", "muxer": {"mpegts_copyts": "1"}, "time_base": Fraction(1, 90000), "options": LOSSLESS}
    moving = write_woven(tmp_path / "0.ts", pix_fmt="yuv420p", muxer={"mpegts_copyts": "1"})
    still = write_clip(tmp_path / "1.ts", Clip(pts=range(72000, 108000, 3600), **part))  # type: ignore[arg-type]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(moving.read_bytes() + still.read_bytes())
    frames, _ = read(joined)
    kept, _ = read(joined, deinterlace=False)
    assert len(frames) == 20
    assert all((frame.pixels == before.pixels).all() for frame, before in zip(frames[10:], kept[10:], strict=True))
    assert not any((frame.pixels == before.pixels).all() for frame, before in zip(frames[:10], kept[:10], strict=True))


def test_rotation_transparency_and_fields_together(tmp_path: Path) -> None:
    pictures = [np.dstack([woven(n, SIZE), translucent(0, SIZE)[..., 3]]) for n in range(6)]
    clip = Clip(
        pts=range(0, 6 * 512, 512),
        codec="prores_ks",
        pix_fmt="yuva444p10le",
        pictures=pictures,
        rotation=90,
        aspect=Fraction(16, 11),
        fields="tff",
        options={"qscale": "2"},
    )
    source = write_clip(tmp_path / "in.mov", clip)
    info = probe(source)
    assert (info.width, info.height, info.rotation, info.sample_aspect_ratio) == (48, 64, 90, Fraction(11, 16))
    assert info.interlaced and info.has_alpha and info.bit_depth > 8
    frames, notices = read(source)
    assert notices == ["the video is interlaced: deinterlaced with bwdif"]
    assert [frame.pts for frame in frames] == list(clip.pts)
    for frame in frames:
        assert frame.pixels.shape == (64, 48, 3) and frame.alpha is not None and frame.alpha.shape == (64, 48)
        assert combing(np.rot90(frame.pixels // 257, -1)) < 12
        expected = np.rot90(pictures[0][..., 3]) / 255
        assert np.abs(frame.alpha / 65535 - expected).max() < 0.01


ALPHA = {  # name: codec, pix_fmt, type of the frames, tolerance of alpha
    "in.webm": ("libvpx-vp9", "yuva420p", np.uint8, 0.03),
    "vp8.webm": ("libvpx", "yuva420p", np.uint8, 0.03),
    "vp9.mkv": ("libvpx-vp9", "yuva420p", np.uint8, 0.03),
    "in.mov": ("prores_ks", "yuva444p10le", np.uint16, 0.002),
    "qtrle.mov": ("qtrle", "argb", np.uint8, 0),
    "rgb.mkv": ("ffv1", "bgra", np.uint8, 0),
    "yuv.mkv": ("ffv1", "yuva444p", np.uint8, 0.004),
    "yuv10.mkv": ("ffv1", "yuva444p10le", np.uint16, 0.002),
    "rgb12.mkv": ("ffv1", "gbrap12le", np.uint16, 0.0002),
    "rgb16.mkv": ("ffv1", "gbrap16le", np.uint16, 0),
    "in.png": ("png", "rgba", np.uint8, 0),
    "deep.png": ("png", "rgba64be", np.uint16, 0),
    "gray.png": ("png", "ya8", np.uint8, 0.004),
    "gray16.png": ("png", "ya16be", np.uint16, 0.00001),
}


@pytest.mark.parametrize("name", ALPHA)
def test_transparency_is_read(tmp_path: Path, name: str) -> None:
    codec, pix_fmt, dtype, tolerance = ALPHA[name]
    count = 1 if name.endswith(".png") else 4
    clip = Clip(
        pts=range(0, count * 40, 40),
        time_base=Fraction(1, 1000),
        codec=codec,
        pix_fmt=pix_fmt,
        pictures=[translucent(index, SIZE, dtype) for index in range(count)],
        options={"crf": "4", "b": "1M", "auto-alt-ref": "0"} if "libvpx" in codec else {},
        stream_metadata={"alpha_mode": "1"} if "libvpx" in codec else {},
    )
    source = write_clip(tmp_path / name, clip, "image2" if count == 1 else None)
    assert probe(source).has_alpha
    frames, notices = read(source)
    assert len(frames) == count
    assert notices == []
    expected = translucent(0, SIZE, dtype)[..., 3] / np.iinfo(dtype).max
    for index, frame in enumerate(frames):
        assert frame.alpha is not None
        assert frame.alpha.dtype == frame.pixels.dtype == dtype
        assert frame.alpha.shape == (48, 64) and frame.alpha.flags.c_contiguous and frame.pixels.flags.c_contiguous
        assert np.abs(frame.alpha / np.iinfo(dtype).max - expected).max() <= tolerance
        if not pix_fmt.startswith("ya"):
            colours = picture(index, SIZE, dtype) / np.iinfo(dtype).max
            assert np.abs(frame.pixels / np.iinfo(dtype).max - colours).mean() < 0.02


def test_gif_has_transparency_where_its_picture_has(tmp_path: Path) -> None:
    clear = np.dstack([picture(0, SIZE), np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(48, 0)])
    for name, pixels, pix_fmt in (("solid.gif", picture(0, SIZE), "rgb8"), ("clear.png", clear, "rgba")):
        codec = name[-3:]
        source = write_clip(tmp_path / name, Clip(pts=(0,), codec=codec, pix_fmt=pix_fmt, pictures=[pixels]), None)
        assert probe(source).has_alpha == (name == "clear.png")
    from PIL import Image

    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.gif")
    frames, _ = read(tmp_path / "clear.gif")
    assert frames[0].alpha is not None
    assert (frames[0].alpha[:, :32] == 0).all() and (frames[0].alpha[:, 32:] == 255).all()


@pytest.mark.parametrize("name", ["in.gif", "%d.png"])
def test_transparency_that_begins_later_is_said(tmp_path: Path, name: str) -> None:
    from PIL import Image

    images = [Image.fromarray(picture(number, SIZE)).convert("P") for number in range(4)]
    for image in images[2:]:
        image.paste(image.getpixel((0, 0)), (0, 0, 32, 48))
        image.info["transparency"] = image.getpixel((0, 0))
    if name == "in.gif":
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=100, disposal=2)
    for number, image in enumerate(images if name == "%d.png" else []):
        image.save(tmp_path / f"{number}.png")
    frames, notices = read(tmp_path / name)
    assert [frame.alpha for frame in frames] == [None] * 4
    assert notices == ["transparency that begins after the first frame is not kept"]


def test_opaque_video_has_no_alpha(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0,)))
    assert not probe(source).has_alpha
    assert read(source)[0][0].alpha is None


@pytest.mark.parametrize(("pix_fmt", "depth"), [("yuva444p", 8), ("yuva444p10le", 10), ("yuva444p12le", 12)])
def test_alpha_codes_come_back_exactly(pix_fmt: str, depth: int) -> None:
    codes = np.arange(2**depth, dtype=np.uint8 if depth == 8 else np.uint16).reshape(-1, 64)
    frame = av.VideoFrame(64, len(codes), pix_fmt)
    for plane in frame.planes:
        plane.update(codes.tobytes())
    rgba = FrameToRgb(ColorTags(1, 1, 1, 1), depth)(frame, alpha=True)
    top = np.iinfo(rgba.dtype).max
    assert (rgba[..., 3] == np.rint(codes * (top / (2**depth - 1)))).all()


@pytest.mark.parametrize("tag", [0, 1, 2])
@pytest.mark.parametrize(("pix_fmt", "depth"), [("gray", 8), ("gray10le", 10), ("gray12le", 12), ("gray16le", 16)])
def test_gray_is_read_by_its_range(tmp_path: Path, pix_fmt: str, depth: int, tag: int) -> None:
    """Untagged gray is full range, as FFmpeg has it; swscale takes all gray for that, tagged or not."""
    dtype = np.uint8 if depth == 8 else np.uint16
    codes = np.linspace(0, 2**depth - 1, 64).astype(dtype)[None].repeat(48, axis=0)
    path = tmp_path / "in.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, pix_fmt
        video.codec_context.color_range = tag
        frame = av.VideoFrame.from_ndarray(codes, format=pix_fmt)
        frame.color_range = tag
        container.mux(video.encode(frame))
        container.mux(video.encode(None))
    black, white = (16 * 2 ** (depth - 8), 235 * 2 ** (depth - 8)) if tag == 1 else (0, 2**depth - 1)
    expected = np.rint((codes.astype(float) - black).clip(0, white - black) / (white - black) * np.iinfo(dtype).max)
    pixels = read(path)[0][0].pixels
    assert pixels.dtype == dtype
    assert (pixels == expected[..., None]).all()


MASTERED = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"


def write_hdr(path: Path, parameters: str, format_name: str | None = None) -> Path:
    options = {"x265-params": f"log-level=none:hdr10=1:repeat-headers=1:{parameters}"}
    clip = Clip(codec="libx265", pix_fmt="yuv420p10le", color=(9, 16, 9, 1), options=options)
    return write_clip(path, clip, format_name)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_hdr10_metadata_is_read(tmp_path: Path, suffix: str) -> None:
    source = write_hdr(tmp_path / f"in{suffix}", f"master-display={MASTERED}:max-cll=1000,400")
    display = MasteringDisplay((34000, 16000), (13250, 34500), (7500, 3000), (15635, 16450), 50, 10000000)
    assert probe(source).hdr == HDRMetadata(display, (1000, 400))
    assert read(source)[1] == []


def test_light_level_without_a_display_and_sdr(tmp_path: Path) -> None:
    assert probe(write_hdr(tmp_path / "cll.mp4", "max-cll=1000,400")).hdr == HDRMetadata(None, (1000, 400))
    assert probe(write_clip(tmp_path / "sdr.mp4", Clip(pts=(0,)))).hdr is None


def test_dynamic_hdr_is_said_not_to_be_kept(tmp_path: Path) -> None:
    """HDR10+ as a player gets it: a user-data SEI (ITU-T T.35) before the first slice."""
    fields = [(1, 2), (400, 27), (0, 1)] + [(90000, 17)] * 3 + [(9000, 17), (0, 4), (511, 10), (0, 3)]
    bits = "".join(f"{value:0{width}b}" for value, width in fields)
    message = bytes.fromhex("b5 003c 0001 04 01") + int(bits.ljust(120, "0"), 2).to_bytes(15, "big")
    nal = bytes([0, 0, 0, 1, 39 << 1, 1, 4, len(message)]) + message + b"\x80"
    data = write_hdr(tmp_path / "in.hevc", "max-cll=1000,400", "hevc").read_bytes()
    slices = [at for at in range(len(data) - 4) if data[at : at + 3] == b"\0\0\1" and data[at + 3] >> 1 < 32]
    (tmp_path / "in.hevc").write_bytes(data[: slices[0]] + nal[1:] + data[slices[0] :])
    assert "dynamic HDR metadata (HDR10+, Dolby Vision) is not kept" in read(tmp_path / "in.hevc")[1]


def test_a_display_without_colours_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Item(bytes):
        type = SimpleNamespace(name="MASTERING_DISPLAY_METADATA")

    known = [34000, 50000] * 8 + [50, 10000, 10000000, 10000]
    for flags, is_known in (((1, 1), True), ((0, 1), False), ((1, 0), False)):
        item = Item(struct.pack("=22i", *known, *flags))
        monkeypatch.setattr(sidedata, "_items", lambda picture, item=item: [item])
        assert (sidedata.SideData(av.VideoFrame(2, 2, "gray")).hdr is not None) == is_known


def test_gray_may_change_in_depth() -> None:
    codes = np.array([[64, 502, 940, 1023]], np.uint16)
    pixels = FrameToRgb(ColorTags(2, 2, 6, 1), 8)(av.VideoFrame.from_ndarray(codes, format="gray10le"))
    assert np.abs(pixels[0, :, 0].astype(int) - [0, 127, 255, 255]).max() <= 1


def test_interlaced_pictures_may_change_in_size(tmp_path: Path) -> None:
    wide = Clip(pts=range(72000, 108000, 3600), size=(128, 48), pix_fmt="yuv420p", fields="bff", options=LOSSLESS)
    wide = replace(wide, time_base=Fraction(1, 90000), muxer={"mpegts_copyts": "1"})
    files = [write_woven(tmp_path / "0.ts", pix_fmt="yuv420p"), write_clip(tmp_path / "1.ts", wide)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(file.read_bytes() for file in files))
    frames, notices = read(joined)
    assert len(frames) == 20
    assert notices[0] == "the video is interlaced: deinterlaced with bwdif"
    assert "10 frames rescaled to 64x48" in notices[1]
    for index, frame in enumerate(frames[10:]):
        assert np.abs(frame.pixels.astype(int) - picture(index, SIZE)).mean() < 12


def test_pictures_may_change_in_depth_size_and_colours(tmp_path: Path) -> None:
    """What a stream becomes later is read by its own tags, and brought to the first picture's size and depth."""
    red = np.tile(np.array([200, 50, 30], np.uint8), (96, 128, 1))
    parts = [
        Clip(size=(64, 48), pix_fmt="yuv420p", color=(6, 6, 6, 1), pictures=[red[:48, :64]] * 12),
        Clip(size=(128, 96), pix_fmt="yuv444p10le", color=(9, 16, 9, 2), pictures=[red] * 12),
        Clip(size=(32, 96), pix_fmt="gray", color=(2, 2, 2, 2), pictures=[red[:, :32]] * 12),
        Clip(size=(64, 48), pix_fmt="yuv422p", color=(1, 1, 1, 1), pictures=[red[:48, :64]] * 12),
    ]
    files = [write_clip(tmp_path / f"{index}.ts", part) for index, part in enumerate(parts)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(file.read_bytes() for file in files))
    frames, notices = read(joined)
    assert len(frames) >= 44
    assert {(frame.pixels.shape, frame.pixels.dtype) for frame in frames} == {((48, 64, 3), np.dtype(np.uint8))}
    assert all(later.pts > earlier.pts for earlier, later in pairwise(frames))
    coloured = [frame for frame in frames if frame.pixels.std(axis=2).mean() > 1]
    assert len(coloured) >= 33
    assert all(np.abs(frame.pixels.astype(int) - red[0, 0]).mean() < 3 for frame in coloured)
    rescaled = sum("size changes in mid-stream" in notice and "rescaled to 64x48" in notice for notice in notices)
    assert rescaled == 1


@pytest.mark.parametrize("fields", [None, "tff"])
def test_memory_stays_flat(tmp_path: Path, fields: str | None) -> None:
    clip = Clip(pts=range(0, 300 * 512, 512), size=(320, 240), pix_fmt="yuv420p", fields=fields)
    source = write_clip(tmp_path / "in.mp4", clip)
    gc.collect()
    gc.disable()  # what only the collector frees counts as kept
    try:
        resident = []
        with VideoReader(source) as reader:
            for _ in reader:
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    finally:
        gc.enable()
    assert max(resident) - max(resident[:60]) < 8e6  # 240 pictures would be 28 MB

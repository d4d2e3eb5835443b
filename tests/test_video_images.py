"""Images: one as a clip of one frame, many as a clip; by pattern or by folder."""

from __future__ import annotations

import gc
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import Clip, picture, write_clip
from PIL import Image

from duovsr.errors import InputError, UsageError
from duovsr.options import PIPE, Position
from duovsr.video.images import image_files, is_sequence, kind_of
from duovsr.video.reader import Frame, VideoReader
from tests.clips import probe

SIZE = (64, 48)


def write_images(folder: Path, names: list[str], sizes: dict[str, tuple[int, int]] | None = None) -> None:
    """Each file has the picture of its place in `names`."""
    folder.mkdir()
    for index, name in enumerate(names):
        Image.fromarray(picture(index, (sizes or {}).get(name, SIZE))).save(folder / name)


def read(path: Path, frame_rate: Fraction | None = None) -> tuple[list[Frame], list[str]]:
    with VideoReader(path, frame_rate=frame_rate) as reader:
        return list(reader), reader.notices


def shows(frame: Frame, index: int) -> bool:
    return bool((frame.pixels == picture(index, SIZE)).all())


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".tif", ".webp", ".ppm", ".tga", ".jpg", ".jp2"])
def test_a_still_is_a_clip_of_one_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"50%d{suffix}"  # no pattern: the file is there
    Image.fromarray(picture(9, SIZE)).save(tmp_path / f"501{suffix}")
    Image.fromarray(picture(3, SIZE)).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    info = probe(path)
    assert (info.width, info.height, info.rotation, info.interlaced) == (64, 48, 0, False)
    frames, notices = read(path)
    assert [frame.pts for frame in frames] == [0]
    assert notices == []
    error = np.abs(frames[0].pixels.astype(int) - picture(3, SIZE))
    assert error.max() == 0 if suffix not in (".jpg", ".jp2") else error.mean() < 3


@pytest.mark.parametrize(("pix_fmt", "suffix", "codec"), [("rgb48be", ".png", "png"), ("rgb48le", ".tiff", "tiff")])
def test_sixteen_bits_are_kept(tmp_path: Path, pix_fmt: str, suffix: str, codec: str) -> None:
    pixels = picture(3, SIZE, np.uint16)
    clip = Clip(pts=(0,), codec=codec, pix_fmt=pix_fmt, pictures=[pixels])
    path = write_clip(tmp_path / f"in{suffix}", clip, "image2")
    frame = read(path)[0][0]
    assert probe(path).bit_depth == 16
    assert frame.pixels.dtype == np.uint16
    assert (frame.pixels == pixels).all()


def test_exr_is_read_deep(tmp_path: Path) -> None:
    clip = Clip(pts=(0,), codec="exr", pix_fmt="gbrpf32le", pictures=[picture(3, SIZE, np.uint16)])
    frame = read(write_clip(tmp_path / "in.exr", clip, "image2"))[0][0]
    assert np.abs(frame.pixels.astype(int) - picture(3, SIZE, np.uint16)).max() < 80  # swscale: 11 bits


def test_a_palette_is_read_as_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(picture(3, SIZE)).quantize(16)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=3)
    opaque, clear = (read(tmp_path / f"{name}.png")[0][0] for name in ("opaque", "clear"))
    assert (opaque.pixels == np.asarray(image.convert("RGB"))).all()
    assert opaque.alpha is None
    assert clear.alpha is not None
    assert ((clear.alpha == 0) == (np.asarray(image) == 3)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_exif_says(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(3, SIZE)).save(tmp_path / "in.jpg", exif=exif, quality=95, subsampling=0)
    turns = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    turns |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1)}
    turns |= {7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}
    expected = turns[orientation](picture(3, SIZE))
    info = probe(tmp_path / "in.jpg")
    assert (info.height, info.width) == expected.shape[:2]
    frame = read(tmp_path / "in.jpg")[0][0]
    assert frame.pixels.shape == expected.shape
    assert np.abs(frame.pixels.astype(int) - expected).mean() < 3


def test_png_in_passes_is_not_interlaced_video(tmp_path: Path) -> None:
    """Adam7: FFmpeg marks it as it marks fields, and deinterlacing would destroy it."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    lines = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx])
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 64, 48, 8, 0, 0, 0, 1)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    coded = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    (tmp_path / "in.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(coded))
    assert not probe(tmp_path / "in.png").interlaced
    frames, notices = read(tmp_path / "in.png")
    assert (frames[0].pixels == pixels[..., None]).all()
    assert notices == []


@pytest.mark.parametrize("first", [0, 1, 9998])
def test_a_pattern_is_a_clip(tmp_path: Path, first: int) -> None:
    write_images(tmp_path / "frames", [f"a{first + index:04d}.png" for index in range(5)])
    (tmp_path / "frames" / "a7.png").write_bytes(b"")  # not as the pattern writes numbers
    (tmp_path / "frames" / "notes.txt").write_text("")
    path = tmp_path / "frames" / "a%04d.png"
    info = probe(path)
    assert (info.path, info.width, info.height, info.codec) == (path, 64, 48, "png")
    assert (info.frame_rate, info.time_base, info.num_frames) == (25, Fraction(1, 25), 5)
    assert info.duration == Fraction(1, 5)
    frames, notices = read(path)
    assert [frame.pts for frame in frames] == list(range(5))
    assert all(shows(frame, index) for index, frame in enumerate(frames))
    assert notices == []


def test_a_frame_rate_can_be_asked_for(tmp_path: Path) -> None:
    write_images(tmp_path / "frames", [f"{index}.png" for index in range(5)])
    rate = Fraction(24000, 1001)
    for path in (tmp_path / "frames" / "%d.png", tmp_path / "frames"):
        with VideoReader(path, frame_rate=rate, start=Position(frame=1), end=Position(frame=3)) as reader:
            times = [frame.pts * frame.time_base for frame in reader]
            assert (reader.info.frame_rate, reader.window) == (rate, (1 / rate, 3 / rate))
        assert times == [1 / rate, 2 / rate]
    clip = write_clip(tmp_path / "in.mp4", Clip(pts=(0,)))
    with pytest.raises(UsageError, match=r"a frame rate is for sequences of images: `.*in.mp4` has its own times"):
        VideoReader(clip, frame_rate=rate)
    with pytest.raises(UsageError, match="unsupported frame rate: `0`"):
        VideoReader(tmp_path / "frames", frame_rate=Fraction(0))


def test_missing_numbers_leave_their_time_empty(tmp_path: Path) -> None:
    write_images(tmp_path / "frames", ["03.png", "04.png", "07.png", "08.png"])
    path = tmp_path / "frames" / "%02d.png"
    frames, notices = read(path)
    assert [frame.pts for frame in frames] == [0, 1, 4, 5]
    assert all(shows(frame, index) for index, frame in enumerate(frames))
    assert notices == [f"missing of `{path}`: 2 images; a video shows those before longer"]
    assert probe(path).num_frames == 4


def test_more_bits_than_the_first_image_has_are_told(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["1.png", "3.png"])
    deep = Clip(pts=(0,), codec="png", pix_fmt="rgb48be", pictures=[picture(1, SIZE, np.uint16)])
    write_clip(tmp_path / "in" / "2.png", deep, "image2")
    frames, notices = read(tmp_path / "in")
    assert [frame.pixels.dtype for frame in frames] == [np.uint8] * 3
    assert notices == ["the 16 bits of later frames are not kept: the first has 8"]
    (tmp_path / "in" / "1.png").unlink()
    assert read(tmp_path / "in")[1] == []


def test_only_numbers_inside_a_piece_are_missing(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["3.png", "4.png", "7.png", "9.png"])
    path = tmp_path / "in" / "%d.png"
    for start, end, expected in ((0, 2, []), (2, 3, []), (0, 3, ["2 images"]), (1, 4, ["3 images"])):
        with VideoReader(path, start=Position(frame=start), end=Position(frame=end)) as reader:
            assert len(list(reader)) == end - start
        notice = f"missing of `{path}`: {{}}; a video shows those before longer"
        assert reader.notices == [notice.format(images) for images in expected]


def test_a_folder_is_a_clip_in_the_order_of_names(tmp_path: Path) -> None:
    names = ["b1.png", "b2.PNG", "b10.png", "c.bmp"]
    write_images(tmp_path / "frames", names)
    for name in (".hidden.png", "readme.txt", "sound.wav"):
        (tmp_path / "frames" / name).write_bytes(b"")
    assert [file.name for file in image_files(tmp_path / "frames")] == names
    frames, notices = read(tmp_path / "frames")
    assert [frame.pts for frame in frames] == [0, 1, 2, 3]
    assert all(shows(frame, index) for index, frame in enumerate(frames))
    assert notices == []


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "frames", ["1.png", "2.png", "3.png"], {"2.png": (32, 48)})
    with VideoReader(tmp_path / "frames") as reader:
        frames = iter(reader)
        next(frames)
        with pytest.raises(InputError, match=r"`.*2.png` is 32x48, the images before it are 64x48"):
            next(frames)


def test_images_of_several_kinds_are_one_clip(tmp_path: Path) -> None:
    """Each is read by its own tags, and turned by its own; the first decides on the depth."""
    write_images(tmp_path / "frames", ["1.png"])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.rot90(picture(1, SIZE)))
    turned.save(tmp_path / "frames" / "2.jpg", exif=exif, quality=95, subsampling=0)
    Image.fromarray(picture(2, SIZE)).convert("L").save(tmp_path / "frames" / "3.png")
    clip = Clip(pts=(0,), codec="png", pix_fmt="rgb48be", pictures=[picture(3, SIZE, np.uint16)])
    write_clip(tmp_path / "frames" / "4.png", clip, "image2")
    frames, _ = read(tmp_path / "frames")
    assert {frame.pixels.dtype for frame in frames} == {np.dtype(np.uint8)}
    for index in (0, 1, 3):
        assert np.abs(frames[index].pixels.astype(int) - picture(index, SIZE)).mean() < 3
    assert (frames[2].pixels == frames[2].pixels[..., :1]).all()


def test_an_image_that_does_not_decode_leaves_its_place(tmp_path: Path) -> None:
    write_images(tmp_path / "frames", ["1.png", "2.png", "3.png", "4.png"])
    for name in ("1.png", "3.png"):
        (tmp_path / "frames" / name).write_bytes(b"")
    frames, notices = read(tmp_path / "frames")
    assert [frame.pts for frame in frames] == [1, 3]
    assert shows(frames[0], 1) and shows(frames[1], 3)
    assert notices == ["damaged input: decoded 2 of 4 frames"]
    for name in ("2.png", "4.png"):
        (tmp_path / "frames" / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"no picture of .* can be decoded"):
        probe(tmp_path / "frames")


def test_pictures_are_freed_at_once(tmp_path: Path) -> None:
    write_images(tmp_path / "frames", [f"{index}.jpg" for index in range(30)])
    gc.collect()
    gc.disable()
    try:
        assert len(read(tmp_path / "frames")[0]) == 30
        assert gc.collect() < 10
    finally:
        gc.enable()


def test_what_is_no_sequence_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "covers", ["cover.jpg"])
    (tmp_path / "covers" / "film.mkv").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for folder in ("covers", "empty"):
        with pytest.raises(InputError, match=f"a folder, not a video: `.*{folder}`"):
            probe(tmp_path / folder)
    with pytest.raises(InputError, match=r"no image has a name such as `.*%03d.png`") as nothing:
        probe(tmp_path / "empty" / "%03d.png")
    assert nothing.value.hint == "%05d is a number of five digits, with zeros before it; %d is one without"
    with pytest.raises(InputError, match=r"no such folder: `.*missing`") as nowhere:
        probe(tmp_path / "missing" / "%03d.png")
    assert nowhere.value.hint == "check the path before `%03d.png`"


def test_kinds_of_paths(tmp_path: Path) -> None:
    write_images(tmp_path / "frames", ["1.png", "%d.png"])
    folder = tmp_path / "frames"
    for path in (folder, folder / "1.png", folder / "%d.png", folder / "%05d.jpg", Path("out.PNG"), Path("x/%d.tiff")):
        assert kind_of(path) == "images"
    for path in (tmp_path, tmp_path / "none", PIPE, Path("in.mp4"), Path("in.gif"), Path("%d.mp4")):
        assert kind_of(path) == "video"
    assert [is_sequence(path) for path in (folder, folder / "1.png", folder / "%d.png", folder / "x%d.png")] == [
        True,
        False,
        False,  # a file has that name
        True,
    ]
    assert image_files(folder / "1.png") == []

"""Images as output: what each format holds, what they are called, and that no source is overwritten."""

from __future__ import annotations

import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duovsr.engine.upscaler import Upscaler
from duovsr.errors import Remark, UsageError
from duovsr.options import Position, UpscaleOptions
from duovsr.video.images import image_files, numbered_files, numbered_name
from duovsr.video.output import FORMATS, check_target
from tests.clips import Clip, picture, probe, translucent, write_clip

SIZE = (32, 24)
SAME_SIZE = UpscaleOptions(scale=1, color="none", strength=0)


def write_image(path: Path, pixels: np.ndarray) -> Path:
    formats = {(3, 1): "rgb24", (3, 2): "rgb48be", (4, 1): "rgba", (4, 2): "rgba64be"}
    pix_fmt = formats[pixels.shape[2], pixels.itemsize]
    return write_clip(path, Clip(pts=(0,), size=SIZE, codec="png", pix_fmt=pix_fmt, pictures=[pixels]), "image2")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_a_format_does_not_hold_is_said(
    small_upscaler: Upscaler, tmp_path: Path, suffix: str, alpha: bool, dtype: type
) -> None:
    source = write_image(tmp_path / "in.png", (translucent if alpha else picture)(3, SIZE, dtype))
    output = tmp_path / f"out{suffix}"
    report = small_upscaler.upscale_file(source, output, SAME_SIZE)
    found = probe(output)
    keeps_alpha, keeps_depth = suffix in (".png", ".tif", ".tiff", ".webp"), suffix in (".png", ".tif", ".tiff")
    expected = []
    if alpha and not keeps_alpha:
        expected.append(f"transparency is flattened on black: {suffix} does not hold it")
    if dtype == np.uint16 and not keeps_depth:
        expected.append(f"the source has 16 bits a channel, the output 8 ({suffix})")
    assert list(report.notices) == expected
    assert not any(isinstance(notice, Remark) for notice in report.notices)
    assert found.bit_depth == (16 if dtype == np.uint16 and keeps_depth else 8)
    if found.bit_depth == 8:  # Pillow knows no deep RGB
        with Image.open(output) as image:
            assert ("A" in image.mode) == (alpha and keeps_alpha) or suffix == ".webp"
            shown = np.asarray(image.convert("RGBA")).astype(int)
        clear = shown[:, :2]
        if alpha:
            assert (clear[..., 3].max() < 16) if keeps_alpha else (clear[..., :3].max() < 40), "clear is black"
        else:
            assert (shown[..., 3] == 255).all()


@pytest.mark.parametrize("name", ["in.png", "in.jpg", "in.bmp", "%d.png"])
@pytest.mark.parametrize("size", [SIZE, (32, 600)])  # players take untagged video of these for SD and HD
def test_untagged_images_are_srgb(small_upscaler: Upscaler, tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    Image.fromarray(picture(3, size)).save(tmp_path / name.replace("%d", "1"))
    for output in ("out.png", "out.mp4"):
        small_upscaler.upscale_file(tmp_path / name, tmp_path / output, SAME_SIZE)
        color = probe(tmp_path / output).color
        assert (color.primaries, color.transfer) == (1, 13)
    coded = (tmp_path / "out.png").read_bytes()
    assert b"sRGB" in coded and b"cICP" not in coded


def test_a_picture_of_untagged_video_is_what_players_show(small_upscaler: Upscaler, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0,), size=SIZE))
    small_upscaler.upscale_file(source, tmp_path / "out.png", SAME_SIZE)
    color = probe(tmp_path / "out.png").color
    assert (color.primaries, color.transfer) == (6, 6)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("%03d.png", ["001.png", "1234.png"]),
        ("50%_%03d.png", ["50%_001.png", "50%_1234.png"]),
        ("100%% %d.png", ["100%% 1.png", "100%% 1234.png"]),
        ("%s%(x)%d.png", ["%s%(x)1.png", "%s%(x)1234.png"]),
    ],
)
def test_names_are_written_as_they_are_read(tmp_path: Path, pattern: str, names: list[str]) -> None:
    paths = [numbered_name(tmp_path / pattern, number) for number in (1, 1234)]
    assert [path.name for path in paths] == names
    for path in paths:
        path.touch()
    assert numbered_files(tmp_path / pattern) == list(zip((1, 1234), paths, strict=True))


@pytest.mark.parametrize("pattern", [False, True])
@pytest.mark.parametrize("suffix", FORMATS)
def test_pixels_that_are_not_square(small_upscaler: Upscaler, tmp_path: Path, suffix: str, pattern: bool) -> None:
    clip = Clip(pts=(0, 512) if pattern else (0,), size=SIZE, aspect=Fraction(16, 11))
    source = write_clip(tmp_path / "in.mp4", clip)
    output = tmp_path / (f"%d{suffix}" if pattern else f"out{suffix}")
    report = small_upscaler.upscale_file(source, output, SAME_SIZE)
    if suffix in (".webp", ".bmp"):
        assert report.warnings == (f"the pixel aspect ratio 16/11 is not kept: {suffix} does not hold it",)
    else:
        assert report.warnings == ()
        assert probe(output).sample_aspect_ratio == Fraction(16, 11)


def test_percent_signs_in_a_pattern(small_upscaler: Upscaler, tmp_path: Path) -> None:
    source, pattern = write_clip(tmp_path / "in.mp4"), tmp_path / "50%_%03d.png"
    assert small_upscaler.upscale_file(source, pattern, SAME_SIZE).frames == 12
    assert [path.name for path in image_files(pattern)] == [f"50%_{number:03d}.png" for number in range(1, 13)]


@pytest.mark.parametrize(
    ("source", "piece", "numbers"),
    [
        ("in/%04d.png", {}, [1, 3, 4, 5, 6]),
        ("in/%04d.png", {"start": "1f"}, [1, 4, 5, 6, 9]),
        ("in/%04d.png", {"end": "1f"}, [1, 3, 5, 6, 9]),
        ("in/%04d.png", {"start": "0f", "end": "9f"}, [1, 3, 4, 5, 6, 9]),
        ("in", {}, [1, 2, 3]),
        ("in", {"start": "1f"}, [1, 2, 5, 6, 9]),
    ],
)
def test_images_of_a_pattern_keep_their_numbers(
    small_upscaler: Upscaler, tmp_path: Path, source: str, piece: dict[str, str], numbers: list[int]
) -> None:
    """Of a whole clip, images after the last go; of a piece, none do."""
    (tmp_path / "in").mkdir()
    for number in (3, 4, 6):
        write_image(tmp_path / "in" / f"{number:04d}.png", picture(number, SIZE))
    (tmp_path / "out").mkdir()
    for number in (1, 5, 6, 9):
        (tmp_path / "out" / f"{number:05d}.png").touch()
    pattern = tmp_path / "out" / "%05d.png"
    bounds: dict[str, Any] = {key: Position.parse(value) for key, value in piece.items()}
    report = small_upscaler.upscale_file(tmp_path / source, pattern, replace(SAME_SIZE, overwrite=True, **bounds))
    assert [number for number, _ in numbered_files(pattern)] == numbers
    written = [file for file in image_files(pattern) if file.stat().st_size]
    assert len(written) == report.frames


def test_a_clip_does_not_overwrite_its_own_images(small_upscaler: Upscaler, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for number in (7, 8):
        write_image(folder / f"{number:03d}.png", picture(number, SIZE))
    (tmp_path / "links").symlink_to(folder)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "001.png").touch()
    os.link(folder / "008.png", tmp_path / "mixed" / "002.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for source, destination, reason in [
        ("f/%03d.png", "f/%03d.png", "the target is the source: `.*007.png`"),
        ("f/%03d.png", "links/%03d.png", "the target is the source"),
        ("f/%03d.png", "mixed/%03d.png", "the target is the source: `.*002.png`"),
        ("f/%03d.png", "f/008.png", "the target is the source"),
        ("f/007.png", "f/%03d.png", "the target is the source"),
        ("f", "f/%03d.png", "the target is in the folder of the source"),
        ("f", "f/new_%03d.png", "the target is in the folder of the source"),
        ("links", "f/new.jpg", "the target is in the folder of the source"),
    ]:
        with pytest.raises(UsageError, match=reason):
            small_upscaler.upscale_file(tmp_path / source, tmp_path / destination, UpscaleOptions(overwrite=True))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    check_target(folder / "%03d.png", folder / "new_%03d.png", overwrite=False)
    check_target(folder, folder / "new.mp4", overwrite=False)


def test_every_image_of_a_target_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "1.png").touch()
    (tmp_path / "2.png").mkdir()
    with pytest.raises(UsageError, match=r"the target is a folder: `.*2.png`"):
        check_target(tmp_path / "in.mp4", tmp_path / "%d.png", overwrite=True)

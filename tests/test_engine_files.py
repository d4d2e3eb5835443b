"""Files of every kind through a whole run: images, sequences, pipes, pieces of clips, scenes."""

from __future__ import annotations

import io
import os
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from duovsr import UpscaleOptions, Upscaler
from duovsr.errors import DuovsrError, NoSpaceError, UsageError
from duovsr.options import Position, Progress
from duovsr.video.output import FORMATS
from duovsr.video.reader import VideoReader
from tests.bicubic import bicubic
from tests.clips import Clip, frame_hashes, packet_hashes, picture, probe, start_time, video_times, write_clip

LOSSLESS = UpscaleOptions(scale=2, codec="ffv1")


def frames_of(path: Path) -> list[np.ndarray]:
    with VideoReader(path) as reader:
        return [frame.pixels for frame in reader]


def restored(upscaler: Upscaler, frames: list[np.ndarray], options: UpscaleOptions = LOSSLESS) -> list[np.ndarray]:
    return list(upscaler.stream(frames, options))


def write_images(folder: Path, count: int, dtype: type = np.uint8) -> list[np.ndarray]:
    folder.mkdir()
    pixels = [picture(index, (32, 24), dtype) for index in range(count)]
    for index, each in enumerate(pixels):
        clip = Clip(pts=(0,), size=(32, 24), codec="png", pix_fmt="rgb24" if dtype == np.uint8 else "rgb48be")
        write_clip(folder / f"{index + 1:03d}.png", Clip(**{**vars(clip), "pictures": [each]}), "image2")
    return pixels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_image_gives_an_image_of_its_depth(small_upscaler: Upscaler, tmp_path: Path, dtype: type) -> None:
    (pixels,) = write_images(tmp_path / "in", 1, dtype)
    report = small_upscaler.upscale_file(tmp_path / "in" / "001.png", tmp_path / "out.png", UpscaleOptions(scale=2))
    (found,) = frames_of(tmp_path / "out.png")
    assert report.notices == ()
    assert found.dtype == dtype
    assert (found == restored(small_upscaler, [pixels])[0]).all()
    assert sorted(os.listdir(tmp_path)) == ["in", "out.png"]


@pytest.mark.parametrize(("codec", "name"), [("h264", "out.mp4"), ("h264", "out.mkv"), ("ffv1", "out.mp4")])
def test_a_stretched_clip_is_shown_in_its_shape(tmp_path: Path, codec: str, name: str) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0, 512), aspect=Fraction(4, 3)))
    for size, expected in (((128, 72), Fraction(1)), ((128, 96), Fraction(4, 3))):
        options = UpscaleOptions(size=size, codec=codec, overwrite=True)
        assert bicubic().upscale_file(source, tmp_path / name, options).warnings == ()
        assert probe(tmp_path / name).sample_aspect_ratio == expected


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_kind_of_image(small_upscaler: Upscaler, tmp_path: Path, suffix: str) -> None:
    (pixels,) = write_images(tmp_path / "in", 1)
    small_upscaler.upscale_file(tmp_path / "in" / "001.png", tmp_path / f"out{suffix}", UpscaleOptions(scale=2))
    with Image.open(tmp_path / f"out{suffix}") as image:
        found = np.asarray(image.convert("RGB")).astype(int)
    expected = restored(small_upscaler, [pixels])[0]
    assert found.shape == expected.shape
    # The random model's colours are noise, which WebP keeps at half resolution.
    assert np.abs(found - expected).mean() < {".jpg": 5, ".jpeg": 5, ".webp": 20}.get(suffix, 1e-9)


@pytest.mark.parametrize("target", ["out.webp", "%03d.webp"])
def test_a_size_that_the_images_do_not_hold_is_refused_before_the_work(tmp_path: Path, target: str) -> None:
    Image.new("RGB", (4096, 4)).save(tmp_path / "wide.png")
    with pytest.raises(UsageError, match=r"\.webp holds no image of 16384x16") as caught:
        bicubic().upscale_file(tmp_path / "wide.png", tmp_path / target, None, lambda _: pytest.fail("it worked"))
    assert caught.value.hint == "use .png or .tif"


def test_a_folder_of_images_is_a_clip_and_a_pattern_takes_one(small_upscaler: Upscaler, tmp_path: Path) -> None:
    pixels = write_images(tmp_path / "in", 6)
    (tmp_path / "out").mkdir()
    pattern = tmp_path / "out" / "f_%04d.png"
    small_upscaler.upscale_file(tmp_path / "in", pattern, UpscaleOptions(scale=2))
    assert sorted(os.listdir(tmp_path / "out")) == [f"f_{index:04d}.png" for index in range(1, 7)]
    expected = restored(small_upscaler, pixels)
    for found, frame in zip(frames_of(tmp_path / "out"), expected, strict=True):
        assert (found == frame).all()
    options = UpscaleOptions(scale=2, codec="ffv1", frame_rate=Fraction(24000, 1001))
    small_upscaler.upscale_file(tmp_path / "in" / "%03d.png", tmp_path / "out.mkv", options)
    assert all((found == frame).all() for found, frame in zip(frames_of(tmp_path / "out.mkv"), expected, strict=True))
    assert abs(video_times(tmp_path / "out.mkv")[5] - 5 * Fraction(1001, 24000)) <= Fraction(1, 2000)
    with pytest.raises(UsageError, match="the target exists"):
        small_upscaler.upscale_file(tmp_path / "in", pattern, UpscaleOptions(scale=2))


def test_a_shorter_sequence_replaces_a_longer_one(
    small_upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old images after the new ones go, and only once these are there; other files stay."""
    write_images(tmp_path / "long", 6)
    write_images(tmp_path / "short", 3)
    out, options = tmp_path / "out", UpscaleOptions(scale=2, overwrite=True)
    out.mkdir()
    small_upscaler.upscale_file(tmp_path / "long", out / "f_%03d.png", UpscaleOptions(scale=2))
    others = ["f_0001.png", "f_004.jpg", "f_004.png.txt", "f_05.png", "f_1000.png.bak", "g_004.png"]
    for name in ("f_000.png", *others):
        (out / name).write_bytes(b"other")
    everything = sorted(os.listdir(out))

    def fail(*_: object) -> None:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr("duovsr.video.pictures.fsync_folder", fail)
        with pytest.raises(DuovsrError):
            small_upscaler.upscale_file(tmp_path / "short", out / "f_%03d.png", options)
    assert sorted(set(os.listdir(out)) - {"f_%03d.png.duovsr"}) == everything
    report = small_upscaler.upscale_file(tmp_path / "short", out / "f_%03d.png", options)
    assert report.notices == (f"3 later images were removed: `{out / 'f_%03d.png'}`",)
    assert report.warnings == ()
    assert sorted(os.listdir(out)) == sorted([*others, "f_000.png", "f_001.png", "f_002.png", "f_003.png"])


def test_transparency_is_scaled_beside_the_picture(small_upscaler: Upscaler, tmp_path: Path) -> None:
    pixels = np.dstack([picture(3, (32, 24)), np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (24, 1))])
    Image.fromarray(pixels, "RGBA").save(tmp_path / "in.png")
    small_upscaler.upscale_file(tmp_path / "in.png", tmp_path / "out.png", UpscaleOptions(scale=2))
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "RGBA"
        found = np.asarray(image)
    assert (found[..., :3] == restored(small_upscaler, [pixels[..., :3].copy()])[0]).all()
    smooth = np.linspace(0, 255, 64)
    assert np.abs(found[..., 3] - smooth).max() <= 4
    report = small_upscaler.upscale_file(tmp_path / "in.png", tmp_path / "out.mp4", UpscaleOptions(scale=2))
    assert any("transparency" in notice for notice in report.notices)
    (flat,) = frames_of(tmp_path / "out.mp4")
    assert flat[:, :4].mean() < 8, "what is transparent is black"


def test_a_clip_is_no_image(small_upscaler: Upscaler, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4")
    with pytest.raises(UsageError, match="a clip does not fit one image") as caught:
        small_upscaler.upscale_file(source, tmp_path / "out.png")
    assert "%05d" in str(caught.value.hint)
    assert os.listdir(tmp_path) == ["in.mp4"]


def test_many_pictures_in_one_file_are_no_image(small_upscaler: Upscaler, tmp_path: Path) -> None:
    """An animated PNG does not say beforehand how many there are."""
    first, *others = (Image.fromarray(picture(index, (32, 24))) for index in range(5))
    first.save(tmp_path / "in.png", save_all=True, append_images=others, duration=100)
    with pytest.raises(UsageError, match="a clip does not fit one image"):
        small_upscaler.upscale_file(tmp_path / "in.png", tmp_path / "out.png")
    assert os.listdir(tmp_path) == ["in.png"]


@pytest.mark.parametrize(
    ("start", "end", "frame"),
    [
        ("3f", "4f", 3),
        ("0.12", "0.16", 3),
        ("0.1", "0.15", 3),
        ("11f", "99f", 11),
        ("11f", None, 11),
        (None, "1f", 0),
        ("0", "1f", 0),
        ("0.43", None, 11),
        ("10f", "99f", None),
    ],
)
def test_a_piece_of_one_frame_is_an_image(
    small_upscaler: Upscaler, tmp_path: Path, start: str | None, end: str | None, frame: int | None
) -> None:
    source, target = write_clip(tmp_path / "in.mp4"), tmp_path / "out.png"
    options = UpscaleOptions(
        scale=2,
        start=None if start is None else Position.parse(start),
        end=None if end is None else Position.parse(end),
    )
    if frame is None:
        with pytest.raises(UsageError, match="a clip does not fit one image"):
            small_upscaler.upscale_file(source, target, options)
        return
    small_upscaler.upscale_file(source, target, options)
    (found,) = frames_of(target)
    assert (found == restored(small_upscaler, [frames_of(source)[frame]])[0]).all()


@pytest.mark.parametrize(
    ("start", "end", "frames"),
    [(None, None, 12), ("3f", "5f", 2), ("10f", "99f", 2), ("0.1", "0.2", 2), (None, "0.41", 11), ("0.4", None, 2)],
)
def test_the_frames_of_a_piece_are_counted_beforehand(
    small_upscaler: Upscaler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: str | None,
    end: str | None,
    frames: int,
) -> None:
    """For the progress, and for the space on the disk."""
    source = write_clip(tmp_path / "in.mp4")
    options = UpscaleOptions(
        scale=2,
        codec="ffv1",
        start=None if start is None else Position.parse(start),
        end=None if end is None else Position.parse(end),
    )
    free = 2 * (frames * 128 * 96 // 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    reports: list[Progress] = []
    small_upscaler.upscale_file(source, tmp_path / "out.mkv", options, reports.append)
    assert reports[-1] == Progress(frames, frames)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free - 1))
    with pytest.raises(NoSpaceError):
        small_upscaler.upscale_file(source, tmp_path / "2.mkv", options)


@pytest.mark.parametrize("codec", [None, "ffv1"])
def test_a_pipe_takes_the_frames(
    small_upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str | None
) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 9 * 512, 512)))
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=pipe))
    report = small_upscaler.upscale_file(source, "-", UpscaleOptions(scale=2, codec=codec))
    data = pipe.getvalue()
    assert report.frames == 9
    assert data.startswith(b"YUV4MPEG2 W128 H96" if codec is None else b"nut/multimedia")
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = restored(small_upscaler, frames_of(source))
    assert len(frames) == 9
    errors = [np.abs(found.astype(int) - frame).mean() for found, frame in zip(frames, expected, strict=True)]
    assert max(errors) < (20 if codec is None else 1e-9), "y4m has the noisy colours at half resolution"
    assert os.listdir(tmp_path) == ["in.mp4"]


def test_what_comes_through_a_pipe(small_upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_clip(tmp_path / "in.y4m", Clip(codec="rawvideo", pix_fmt="yuv420p"), "yuv4mpegpipe")
    small_upscaler.upscale_file(source, tmp_path / "file.mkv", LOSSLESS)
    with source.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file, isatty=lambda: False))
        small_upscaler.upscale_file("-", tmp_path / "pipe.mkv", LOSSLESS)
    assert frame_hashes(tmp_path / "pipe.mkv") == frame_hashes(tmp_path / "file.mkv")
    assert not list(tmp_path.glob("*.duovsr"))


@pytest.mark.parametrize(("start", "end"), [("10f", "30f"), ("0.4", "1.2"), ("30f", None), (None, "5f")])
def test_a_piece_of_a_clip_has_its_sound(
    small_upscaler: Upscaler, tmp_path: Path, start: str | None, end: str | None
) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 50 * 512, 512), audio=["aac"]))
    options = UpscaleOptions(
        scale=2,
        codec="ffv1",
        start=None if start is None else Position.parse(start),
        end=None if end is None else Position.parse(end),
    )
    small_upscaler.upscale_file(source, tmp_path / "out.mp4", options)
    first = 0 if start is None else 30 if start == "30f" else 10
    last = 50 if end is None else 5 if end == "5f" else 30
    expected = restored(small_upscaler, frames_of(source)[first:last])
    assert all((a == b).all() for a, b in zip(frames_of(tmp_path / "out.mp4"), expected, strict=True))
    assert video_times(tmp_path / "out.mp4") == [Fraction(index, 25) for index in range(last - first)]
    kept = packet_hashes(tmp_path / "out.mp4", "audio")
    everything = packet_hashes(source, "audio")
    offset = everything.index(kept[0])
    assert everything[offset : offset + len(kept)] == kept
    moved = start_time(tmp_path / "out.mp4", "audio") + Fraction(first, 25)
    assert abs(moved - (start_time(source, "audio") + Fraction(1024 * offset, 48000))) <= Fraction(1, 1000)
    assert abs(len(kept) * Fraction(1024, 48000) - Fraction(last - first, 25)) <= Fraction(3 * 1024, 48000)


def test_nothing_bleeds_across_a_cut(small_upscaler: Upscaler, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 80, (2, 24, 32, 3), dtype=np.uint8).repeat(2, 1).repeat(2, 2)
    scenes = [texture[0], texture[1] + np.uint8(150)]
    frames = [scenes[0]] * 7 + [scenes[1]] * 6
    together = restored(small_upscaler, frames)
    alone = restored(small_upscaler, frames[7:])
    assert all((a == b).all() for a, b in zip(together[7:], alone, strict=True))
    joined = restored(small_upscaler, frames, UpscaleOptions(scale=2, scene_cuts=False))
    assert not (joined[7] == alone[0]).all(), "with --no-scene-cuts the scene before shows"

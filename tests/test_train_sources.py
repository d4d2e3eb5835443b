"""Training footage: what is found, where it is read, and pools that are the same however they are made."""

from __future__ import annotations

import csv
import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from duovsr.errors import InputError, UsageError
from duovsr.train import pool as pools
from duovsr.train.options import PoolConfig
from duovsr.train.pool import build_pool
from duovsr.train.sources import find_sources, measure, open_footage, sharpness
from duovsr.video.reader import VideoReader
from tests.clips import Clip, write_clip

POOL = PoolConfig(samples=10, frames=3, side=48)
ARRAYS = ("hq.npy", "lq.npy", "scale.npy")


def numbered(count: int) -> list[np.ndarray]:
    """Pictures (48, 64, 3) that show their number in eight bars, one for each bit."""
    bits = [[255 * (number >> bar & 1) for bar in range(8)] for number in range(count)]
    return [np.tile(np.repeat(row, 8)[None, :, None], (48, 1, 3)).astype(np.uint8) for row in bits]


def numbers(frames: torch.Tensor) -> list[int]:
    bars = frames[:, 0].float().unflatten(2, (8, 8)).mean((1, 3)) > 128
    return (bars * 2 ** torch.arange(8)).sum(1).tolist()


def noise(size: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


def write_image(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    image = Clip(size=size, pts=[0], codec="png", pix_fmt="rgb24", pictures=[noise(size, seed)], color=(2, 2, 0, 0))
    return write_clip(path, image, "image2")


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as people have them: three clips, one in a subfolder, two images, and files of no use."""
    folder = tmp_path_factory.mktemp("footage")
    (folder / "holiday").mkdir()
    write_clip(folder / "a.mp4", Clip(size=(96, 80)))
    write_clip(folder / "holiday" / "b.MKV", Clip(size=(120, 72), pix_fmt="yuv420p"), "matroska")
    write_image(folder / "c.png", (128, 96), 1)
    write_image(folder / "d.png", (64, 100), 2)
    write_clip(folder / "small.mp4", Clip(size=(64, 32)))
    (folder / "broken.mp4").write_text("no video")
    (folder / "notes.txt").write_text("no footage")
    return folder


@pytest.fixture(scope="module")
def made(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    build_pool([footage], folder, POOL)
    return folder


def write_manifest(folder: Path, rows: dict[str, str]) -> None:
    """A manifest of files and their kinds."""
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "repo", "path", "kind", "lapvar"])
        writer.writerows([name, "ours", f"{name}/1", kind, 900] for name, kind in rows.items())


def assert_same_pool(one: Path, other: Path) -> None:
    for name in ARRAYS:
        assert np.array_equal(np.load(one / name), np.load(other / name)), name
    assert (one / "pool.json").read_text() == (other / "pool.json").read_text()


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    frame = torch.randint(0, 256, (3, 7, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grey = np.rint(np.array([0.299, 0.587, 0.114]) @ frame.numpy().reshape(3, -1).astype(np.float64)).reshape(7, 9)
    mirrored = [[1, *range(7), 5], [1, *range(9), 7]]
    laplacian = []
    for y in range(7):
        for x in range(9):
            near = [
                grey[mirrored[0][y + 1 + dy], mirrored[1][x + 1 + dx]] for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
            ]
            laplacian.append(sum(near) - 4 * grey[y, x])
    assert math.isclose(sharpness(frame), np.var(laplacian), rel_tol=1e-9)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_long_clip_is_read_from_any_frame(tmp_path: Path, suffix: str) -> None:
    options = {"g": "30", "bf": "3", "preset": "ultrafast", "x264-params": "open-gop=1"}
    write_clip(tmp_path / f"long{suffix}", Clip(range(0, 512 * 160, 512), options=options, pictures=numbered(160)))
    (source,) = find_sources([tmp_path])
    for start in (0, 1, 14, 29, 30, 31, 77, 120, 153):
        for step in (1, 2):
            with open_footage(source, 48) as clip:
                assert clip.length == 160
                assert numbers(clip.read(start, 3, step)) == [start, start + step, start + 2 * step]
    with open_footage(source, 48) as clip:
        assert numbers(clip.read(158, 5)) == [158, 159]
    with open_footage(source, 48) as clip, pytest.raises(InputError, match="no frame 400"):
        clip.read(400, 1)


def test_seeking_decodes_no_more_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "long.mp4", Clip(range(0, 512 * 160, 512), options={"g": "20"}, pictures=numbered(160)))
    seen = []
    with open_footage(find_sources([tmp_path])[0], 48) as clip:
        decode = clip._container.decode
        container = clip._container

        class Counting:
            def decode(self, stream: object) -> object:
                return (seen.append(picture) or picture for picture in decode(stream))

            def __getattr__(self, name: str) -> object:
                return getattr(container, name)

        monkeypatch.setattr(clip, "_container", Counting())
        clip.read(135, 3)
    assert len(seen) <= 20 + 3


def test_a_folder_and_a_shard_of_it_give_the_same_footage(footage: Path, tmp_path: Path) -> None:
    shard = tmp_path / "shards" / "0000.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as archive:
        for file in sorted(footage.rglob("*")):
            archive.add(file, file.relative_to(footage), recursive=False)
    loose = find_sources([footage])
    assert [s.name.removeprefix(f"{footage}/") for s in loose] == [
        "a.mp4", "broken.mp4", "c.png", "d.png", "holiday/b.MKV", "small.mp4"
    ]  # fmt: skip
    assert [s.still for s in loose] == [False, False, True, True, False, False]
    packed = find_sources([shard])
    assert packed == find_sources([shard.parent, shard])
    assert sorted(s.name for s in packed) == sorted(s.name.replace(str(footage), str(shard)) for s in loose)
    for source in loose:
        same = next(s for s in packed if s.name.removeprefix(str(shard)) == source.name.removeprefix(str(footage)))
        if source.path.stem in "abcd":
            with open_footage(source, 48) as one, open_footage(same, 48) as other:
                assert_close(one.read(1 - source.still, 2), other.read(1 - source.still, 2), rtol=0, atol=0)
        else:
            for broken in (source, same):
                with pytest.raises(InputError, match=r"not a video|smaller than 48 pixels"):
                    measure(broken, 48)


def test_frames_are_upright_and_of_bearable_size(tmp_path: Path) -> None:
    write_clip(tmp_path / "phone.mp4", Clip(size=(96, 64), rotation=90, pix_fmt="yuv420p"))
    write_image(tmp_path / "photo.png", (900, 640))
    clip, photo = find_sources([tmp_path])
    with open_footage(clip, 48) as opened:
        frame = opened.read(0, 1)[0].float()
    assert frame.shape == (3, 96, 64)
    assert frame[0].std(1).max() < 2  # the gradient along the coded width now runs along the height
    with open_footage(photo, 48) as opened:
        assert opened.read(0, 1).shape == (1, 3, 12 * 48, 810)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("orientation", [1, 5, 6])
def test_photos_are_seen_as_upscale_sees_them(tmp_path: Path, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise((96, 64), 0)).convert(mode).save(tmp_path / "photo.jpg", exif=exif)
    with VideoReader(tmp_path / "photo.jpg") as reader:
        expected = next(iter(reader)).pixels
    (photo,) = find_sources([tmp_path])
    with open_footage(photo, 48) as opened:
        assert np.array_equal(opened.read(0, 1)[0].permute(1, 2, 0), expected)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder") as raised:
        find_sources([tmp_path / "missing"])
    assert raised.value.hint
    with pytest.raises(InputError, match="no sources in"):
        find_sources([tmp_path])
    (tmp_path / "cut.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(InputError, match="not a readable tar file"):
        find_sources([tmp_path / "cut.tar"])
    (tmp_path / "manifest.csv").write_text("file,repo,kind\na.mp4,ours,camera\n")
    with pytest.raises(InputError, match="no column `path`"):
        find_sources([tmp_path])
    (tmp_path / "manifest.csv").write_text("file,repo,path,kind,lapvar\na.mp4,ours,a,camera,sharp\n")
    with pytest.raises(InputError, match="not a number"):
        find_sources([tmp_path])


def test_held_out_sources_are_a_part_that_stays(tmp_path: Path) -> None:
    names = [f"{number:03d}.png" for number in range(240)]
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    held_out = [{s.path.name for s in find_sources([tmp_path / f]) if s.validation} for f in ("here", "there")]
    assert held_out[0] == held_out[1]
    assert 10 < len(held_out[0]) < 30
    write_manifest(tmp_path / "here", dict.fromkeys(names, "still"))
    listed = find_sources([tmp_path / "here"])
    assert {s.validation for s in listed} == {True, False}
    assert {s.weight for s in listed} == {30.0}


def test_a_pool_has_what_its_record_says(footage: Path, made: Path) -> None:
    record = json.loads((made / "pool.json").read_text())
    assert {Path(name).name for name in record["sources"]} == {"a.mp4", "b.MKV", "c.png", "d.png"}
    reasons = {Path(name).name: reason for name, reason in record["skipped"].items()}
    assert reasons.keys() == {"broken.mp4", "small.mp4"}
    assert "smaller than 48" in reasons["small.mp4"]
    hq, lq, scale = (np.load(made / name) for name in ARRAYS)
    assert hq.shape == (10, 3, 48, 48, 3)
    assert lq.shape == (10, 3, 32, 32, 3)
    assert scale.dtype == np.float32 and set(scale.tolist()) <= {4.0, 3.0, 2.0, 1.5}
    for row, small in enumerate((48 / scale).astype(int)):
        assert not lq[row, :, small:].any() and not lq[row, :, :, small:].any()
        assert abs(lq[row, :, :small, :small].mean() - hq[row].mean()) < 12
    assert not (made / "scale.partial.npy").exists()


def test_two_workers_make_the_pool_of_one(footage: Path, made: Path, tmp_path: Path) -> None:
    build_pool([footage], tmp_path, replace(POOL, workers=2))
    assert_same_pool(tmp_path, made)


def test_an_interrupted_pool_is_finished_as_if_it_never_was(
    footage: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    degrade = pools.degrade

    def dies_in_row_6(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return degrade(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pools, "_TASK_ROWS", 2)
    monkeypatch.setattr(pools, "degrade", dies_in_row_6)
    with pytest.raises(KeyboardInterrupt):
        build_pool([footage], tmp_path, POOL)
    assert not (tmp_path / "scale.npy").exists()
    finished = np.load(tmp_path / "scale.partial.npy") > 0
    assert 0 < finished.sum() < 6
    with pytest.raises(UsageError, match="other settings: seed"):
        build_pool([footage], tmp_path, replace(POOL, seed=1))
    with pytest.raises(UsageError, match="other sources"):
        build_pool([footage / "holiday"], tmp_path, POOL)
    calls = 100
    build_pool([footage], tmp_path, POOL)
    assert calls == 100 + POOL.samples - finished.sum()
    assert_same_pool(tmp_path, made)
    monkeypatch.setattr(pools, "find_sources", lambda _: 1 / 0)
    build_pool([footage], tmp_path, POOL)  # finished: nothing to do


def test_a_live_pool_has_the_windows_alone(footage: Path, made: Path, tmp_path: Path) -> None:
    build_pool([footage], tmp_path, replace(POOL, live=True))
    assert not (tmp_path / "lq.npy").exists()
    for name in ("hq.npy", "scale.npy"):
        assert np.array_equal(np.load(tmp_path / name), np.load(made / name))


def test_rows_of_bad_files_are_marked_unusable(footage: Path, tmp_path: Path) -> None:
    sources, out = tmp_path / "sources", tmp_path / "pool"
    sources.mkdir()
    for name in ("broken.mp4", "holiday/b.MKV"):
        (sources / Path(name).name).write_bytes((footage / name).read_bytes())
    write_manifest(sources, {"broken.mp4": "camera", "b.MKV": "camera"})
    assert not any(source.validation for source in find_sources([sources]))
    config = replace(POOL, stills=0.0, live=True)
    build_pool([sources], out, config)
    assert {scale > 0 for scale in np.load(out / "scale.npy")} == {True, False}
    assert "broken.mp4" in str(json.loads((out / "pool.json").read_text())["skipped"])
    write_manifest(sources, {"broken.mp4": "camera"})
    with pytest.raises(InputError, match="no usable"):
        build_pool([sources], tmp_path / "none", config)
    assert not (tmp_path / "none" / "scale.npy").exists()


@pytest.mark.parametrize(("skip_frames", "skip", "step"), [(0.0, 2, 1), (1.0, 2, 2), (1.0, 3, 3), (1.0, 30, 1)])
def test_clips_are_shown_at_several_speeds(tmp_path: Path, skip_frames: float, skip: int, step: int) -> None:
    grey = [np.full((48, 64, 3), 4 * number, np.uint8) for number in range(40)]
    write_clip(tmp_path / "x.mp4", Clip(range(0, 512 * 40, 512), options={"qp": "0", "g": "12"}, pictures=grey))
    write_manifest(tmp_path, {"x.mp4": "camera"})
    config = replace(POOL, stills=0.0, skip_frames=skip_frames, skip=skip, live=True, samples=6)
    build_pool([tmp_path], tmp_path / "pool", config)
    shown = np.rint(np.load(tmp_path / "pool" / "hq.npy")[..., 0].mean((2, 3)) / 4)
    assert (np.diff(shown, axis=1) == step).all()
    assert len(set(shown[:, 0])) > 1


def test_settings_that_cannot_work_are_refused() -> None:
    for changes in ({"side": 100}, {"side": 0}, {"workers": 0}, {"scale_weights": (0.0, 0.0, 0.0, 0.0)}):
        with pytest.raises(UsageError):
            replace(POOL, **changes)  # type: ignore[arg-type]

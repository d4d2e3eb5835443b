"""Where the clips of a model without state meet: the cross-fade, resuming in it, and memory that runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from duovsr import Progress, UpscaleOptions
from duovsr.engine import files, phases, plan, upscaler
from duovsr.engine.bench import StageTimes
from duovsr.engine.blend import Tail, cross_fade
from duovsr.engine.upscaler import Upscaler
from duovsr.errors import OutOfMemoryError
from duovsr.model.one_step import OneStepModel
from duovsr.model.wan_vae import WanVAE
from tests.clips import Clip, frame_hashes, write_clip
from tests.wan import PLAIN, lq_frames, moving, saved, upscaled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with saved(tmp_path_factory.mktemp("models") / "wan") as path:
        yield path


@pytest.fixture
def wan(folder: Path) -> Upscaler:
    return Upscaler.from_preset(str(folder), device="cpu", dtype="float32")


# A model that is smooth within a clip, and draws another picture for each


def drawn(latent: int, height: int, width: int) -> Tensor:
    """What the clip that begins at this latent draws."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(latent)) * 0.4 - 0.2
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[:, :, None]


@pytest.fixture
def smooth(wan: Upscaler, monkeypatch: pytest.MonkeyPatch) -> Upscaler:
    def restore(model: OneStepModel, lq: Tensor, *_: object, origin: tuple[int, int, int], **__: object) -> Tensor:
        return lq * 0.5 + drawn(origin[0], *lq.shape[3:])

    monkeypatch.setattr(upscaler, "restore_clip", restore)
    return wan


def expected(frames: list[np.ndarray], length: int, overlap: int) -> np.ndarray:
    """The definition: every clip's frames, and from one to the next in equal steps."""
    lq = lq_frames(frames)[0].permute(1, 2, 3, 0).numpy() * 0.5
    pictures = {}
    for start in range(0, len(frames), length):  # since frame 0 of each clip
        pictures[start] = drawn(start // 4, *lq.shape[1:3])[0, :, 0].permute(1, 2, 0).numpy()
    result, n = [], overlap + 1
    for t in range(len(frames)):
        picture = pictures[0]
        for start in sorted(pictures)[1:]:
            if start + n <= len(frames) - 1 and t >= start:  # the clip has frames of its own
                share = min((t - start + 1) / (n + 1), 1.0)
                picture = picture + share * (pictures[start] - picture)
        result.append((lq[t] + picture) / 2 + 0.5)
    return np.stack(result)


@pytest.mark.parametrize("count", [1, 4, 13, 14, 21, 22, 37])
@pytest.mark.parametrize(("length", "overlap"), [(8, 4), (8, 0), (4, 8), (4, 12)])
def test_clips_meet_in_equal_steps(smooth: Upscaler, count: int, length: int, overlap: int) -> None:
    """First and last frames whole; also of clips shorter than what they have in common, whose fades overlap."""
    frames = moving(count)
    result = upscaled(smooth, frames, replace(PLAIN, chunk=length, overlap=overlap))
    assert_close(result, expected(frames, length, overlap).astype(np.float32), rtol=0, atol=1e-6)


def test_a_border_jumps_by_no_more_than_its_share(smooth: Upscaler) -> None:
    """The stated bound, for every pixel: where two clips differ by d, a step from frame to frame is at most
    d / (overlap + 2) more than the steps inside clips. At the default overlap of 4 that is a sixth."""
    frames = moving(37)
    faded, still = upscaled(smooth, frames), upscaled(smooth, frames[:1] * 37)
    difference = (drawn(0, 48, 64) - drawn(4, 48, 64)).abs()[0, :, 0].permute(1, 2, 0).numpy() / 2
    content = np.abs(np.diff(lq_frames(frames)[0].permute(1, 2, 3, 0).numpy(), axis=0)) / 4
    first = slice(14, 22)  # the first border, and steps on both sides of it
    assert (np.abs(np.diff(faded, axis=0))[first] <= content[first] + difference / 6 + 1e-6).all()
    steps = np.abs(np.diff(still, axis=0))
    assert_close(steps[15:21], np.stack([difference / 6] * 6), rtol=0, atol=1e-6)
    assert steps[:15].max() == steps[21:31].max() == 0
    without = replace(smooth.plan(32, 24, PLAIN), fade=0)
    abrupt = np.stack(list(smooth.restore(frames[:1] * 37, without, PLAIN, StageTimes(), [])))
    assert_close(np.abs(np.diff(abrupt, axis=0))[20], difference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", [3, 16, 20, 21, 22, 24])
def test_scenes_are_whole_up_to_their_cut(smooth: Upscaler, first: int) -> None:
    """Each as if it were alone: no fade over a cut."""
    scenes = [moving(first), [1 - frame[::-1, ::-1] for frame in moving(23)]]
    both = upscaled(smooth, [frame for scene in scenes for frame in scene])
    assert_close(both, np.concatenate([upscaled(smooth, scene) for scene in scenes]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_fade_rounds_once(dtype: type[np.unsignedinteger]) -> None:
    before, after = np.full((2, 1, 1, 3), 100, dtype), [np.full((1, 1, 3), value, dtype) for value in (110, 104)]
    faded = cross_fade(Tail(torch.from_numpy(before)), after)
    assert [int(frame[0, 0, 0]) for frame in faded] == [103, 103]
    assert all(frame.dtype == dtype for frame in faded)


# Files


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "in.mp4"
    return write_clip(path, Clip(pts=range(0, 512 * 45, 512), size=(32, 24)))


class Crash(Exception):
    pass


def crash_after(frames: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.done > frames:
            raise Crash

    return report


@pytest.mark.parametrize("damage", [None, "state", "piece"])
def test_a_job_goes_on_inside_a_fade(
    wan: Upscaler, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None
) -> None:
    """Pieces end where a fade begins: the tail is kept with them, and resumed is as uninterrupted."""
    monkeypatch.setattr(files, "PIECE_FRAMES", 8)
    options = UpscaleOptions(scale=2, codec="ffv1", chunk=8)
    wan.upscale_file(clip, tmp_path / "whole.mkv", options)
    target = tmp_path / "out.mkv"
    with pytest.raises(Crash):
        wan.upscale_file(clip, target, options, crash_after(30))
    job = target.with_name("out.mkv.duovsr")
    assert list(job.glob("state_*.pt")), "the tail was kept"
    if damage == "state":
        for path in job.glob("state_*.pt"):
            path.unlink()
    elif damage == "piece":
        (job / "piece_000001.mkv").unlink()
    report = wan.upscale_file(clip, target, options)
    assert report.reused >= (0 if damage == "state" else 8)
    assert frame_hashes(target) == frame_hashes(tmp_path / "whole.mkv")


# Memory that runs out


def limited_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[tuple[int, int, int]]:
    """Let the decoder fail as torch's CPU allocator does, for latents of more than `most` places; returns the calls:
    how many frames at a time, and the latents' height and width."""
    decode, calls = WanVAE.decode, []

    def failing(self: WanVAE, latents: Tensor, *args: object) -> object:
        calls.append((self.frames_at_once, latents.shape[3], latents.shape[4]))
        if latents[0, 0, 0].numel() > most:
            torch.empty(2**60, dtype=torch.uint8)  # fails as torch itself fails
        return decode(self, latents, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(plan, "VAE_TILES", (64, 48))
    monkeypatch.setattr(phases, "VAE_TILE_OVERLAP", 16)
    monkeypatch.setattr(WanVAE, "decode", failing)
    return calls


def test_out_of_memory_takes_smaller_pieces_and_says_so(wan: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = moving(5, 48, 32)  # latents of 12 x 8
    options = replace(PLAIN, color="wavelet")
    whole = upscaled(wan, frames, options)
    calls = limited_memory(monkeypatch, 8 * 8)
    notices: list[str] = []
    planned = wan.plan(48, 32, options)
    result = np.stack(list(wan.restore(frames, planned, options, StageTimes(), notices)))
    assert calls[:5] == [(8, 8, 12), (4, 8, 12), (2, 8, 12), (1, 8, 12), (1, 8, 8)]
    assert max(h * w for _, h, w in calls[4:]) <= 64
    assert notices == [
        "memory ran out: the autoencoder went on with 4 frames at a time, whole frames",
        "memory ran out: the autoencoder went on with 2 frames at a time, whole frames",
        "memory ran out: the autoencoder went on with 1 frame at a time, whole frames",
        "memory ran out: the autoencoder went on with 1 frame at a time, tiles of 64 pixels",
    ]
    other = upscaled(wan, frames, replace(options, seed=1))
    assert 0 < np.abs(result - whole).mean() < 0.5 * np.abs(other - whole).mean()


def test_the_clips_after_begin_with_what_was_found(wan: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = limited_memory(monkeypatch, 8 * 8)
    notices: list[str] = []
    planned = wan.plan(48, 32, PLAIN)
    for n in range(2):  # the second clip says it again, once
        list(wan.restore(moving(40, 48, 32), planned, PLAIN, StageTimes(), notices := []))
        assert len(notices) == (1 if n else 4)
        assert notices[-1].endswith("1 frame at a time, tiles of 64 pixels")
    assert [call for call in calls if call[1] * call[2] > 64] == [(n, 8, 12) for n in (8, 4, 2, 1)]


def test_out_of_memory_after_every_step_is_an_error(wan: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        limited_memory(patch, 0)
        with pytest.raises(OutOfMemoryError, match="out of cpu memory"):
            upscaled(wan, moving(5, 48, 32))
    limited_memory(monkeypatch, 2**30)
    notices: list[str] = []
    list(wan.restore(moving(5, 48, 32), wan.plan(48, 32, PLAIN), PLAIN, StageTimes(), notices))
    assert notices == [], "the next clip tries anew"

"""The paper's system at reduced width, from file to file: full attention over clips that overlap, Wan2.1's VAE in
pieces, memory that runs out, and its workload."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import seeded
import torch
from torch import Tensor
from torch.testing import assert_close

from duovsr.engine import bench, phases, plan
from duovsr.engine.memory import lent
from duovsr.engine.phases import restore_clip
from duovsr.engine.plan import Plan
from duovsr.engine.upscaler import Upscaler, with_window
from duovsr.errors import OutOfMemoryError, UsageError
from duovsr.model.one_step import OneStepModel
from duovsr.model.prompt import Prompt
from duovsr.model.resize import resize_frames
from duovsr.model.transformer import Transformer
from duovsr.model.wan_vae import WanVAE
from duovsr.options import PRESETS, Preset, TransformerConfig, UpscaleOptions, WanVAEConfig
from duovsr.repository import FILES
from duovsr.video.reader import VideoReader
from duovsr.weights import save_model
from tests.clips import Clip, write_clip
from tests.command_line import Run, running

WAN = Preset(
    name="wan",
    transformer=TransformerConfig(dim=48, ffn_dim=64, heads=2, layers=3, text_dim=16, text_length=8),
    vae=WanVAEConfig(dim=4),
    learned_prompt=False,
)
PLAIN = UpscaleOptions(scale=2, color="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model folder of random weights."""
    transformer, vae, prompt = Transformer(WAN.transformer), WanVAE(WanVAEConfig(dim=4)), Prompt(WAN.transformer)
    for module in (transformer, vae):
        seeded.fill(module)
    prompt.positive.data, prompt.null.data = seeded.normal(7, 2, 8, 16)
    path = tmp_path_factory.mktemp("models") / "wan"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, WAN.name, WAN)
        save_model(path, WAN.name, dict(zip(FILES, (m.state_dict() for m in (transformer, vae, prompt)), strict=True)))
        yield path


@pytest.fixture(scope="module")
def upscaler(folder: Path) -> Upscaler:
    return Upscaler.from_preset(str(folder), device="cpu", dtype="float32")


def moving(count: int, width: int = 32, height: int = 24) -> list[np.ndarray]:
    """Smooth texture that drifts by a pixel a frame, float32 in [0, 1]."""
    canvas = torch.rand(1, 3, height // 4 + 3, (width + count) // 4 + 3, generator=torch.Generator().manual_seed(0))
    canvas = torch.nn.functional.interpolate(canvas, scale_factor=4, mode="bilinear")[0].permute(1, 2, 0)
    return [np.ascontiguousarray(canvas[:height, i : i + width].numpy()) for i in range(count)]


def lq_frames(frames: list[np.ndarray]) -> Tensor:
    """As the model gets them, at twice the size."""
    x = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None] * 2 - 1
    return resize_frames(x, 2 * x.shape[3], 2 * x.shape[4])


def as_pixels(frames: Tensor) -> np.ndarray:
    return (frames[0].permute(1, 2, 3, 0).clamp(-1, 1) * 0.5 + 0.5).numpy()


def upscaled(upscaler: Upscaler, frames: list[np.ndarray], options: UpscaleOptions) -> np.ndarray:
    return np.stack(list(upscaler.stream(frames, options)))


# Files and clips


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_upscaler: Upscaler) -> Iterator[Run]:
    load = Upscaler.from_preset
    for command in running(monkeypatch, capsys, small_upscaler):
        monkeypatch.setattr(Upscaler, "from_preset", load)
        yield command


def test_a_video_goes_through(run: Run, folder: Path, tmp_path: Path) -> None:
    pts = [512 * i + (256 if i % 3 == 1 else 0) for i in range(25)]
    source = write_clip(tmp_path / "in.mp4", Clip(pts=pts, size=(32, 24), audio=("aac",)))
    target = tmp_path / "out.mp4"
    assert run("upscale", source, target, "--model", folder, "--scale", 2, "--dtype", "float32", "--json") == 0
    report = json.loads(run.out)
    assert report["frames"] == 25
    assert (report["plan"]["chunk"], report["plan"]["overlap"], report["plan"]["vae_latents"]) == (16, 4, 2)
    with VideoReader(source) as before, VideoReader(target) as after:
        assert (after.info.width, after.info.height) == (64, 48)
        assert [f.pts * f.time_base for f in after] == [f.pts * f.time_base for f in before]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_every_call_is_a_clip_of_its_own(upscaler: Upscaler) -> None:
    """21 frames, then the last 5 of them again with what is new: noise in place, warm-up dropped, pieces = at once."""
    frames = moving(25)
    lq = lq_frames(frames)
    first, _ = upscaler.model.restore(lq[:, :, :21], None, seed=0)
    second, _ = upscaler.model.restore(lq[:, :, 16:], None, seed=0, origin=(4, 0, 0))
    expected = np.concatenate([as_pixels(first), as_pixels(second)[5:]])
    assert_close(upscaled(upscaler, frames, PLAIN), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - as_pixels(lq)).mean() > 0.05, "the result is more than the resized source"


def test_strength_mixes_with_the_bicubic_frames(upscaler: Upscaler) -> None:
    frames = moving(5)
    zero, half, full = (upscaled(upscaler, frames, replace(PLAIN, strength=s)) for s in (0.0, 0.5, 1.0))
    assert_close(zero, as_pixels(lq_frames(frames)), rtol=0, atol=1e-6)
    inner = (zero > 0) & (zero < 1) & (full > 0) & (full < 1)
    assert_close(half[inner], ((zero + full) / 2)[inner], rtol=0, atol=1e-5)


def test_clips_that_overlap_more_differ_less_at_their_borders(upscaler: Upscaler) -> None:
    """The stated bound: a border is no steeper than 1.1 times other steps from frame to frame, and the frames after it
    come closer to those of one call over everything, the longer the warm-up is. (Weights are random here, whose frames
    differ a good deal anyway; what trained ones do has not been measured.)"""
    frames = moving(37)
    whole = upscaled(upscaler, frames, replace(PLAIN, chunk=36, overlap=0))
    differences = []
    for overlap in (0, 4, 12):
        result = upscaled(upscaler, frames, replace(PLAIN, chunk=20 - overlap, overlap=overlap))
        steps = np.abs(np.diff(result, axis=0)).mean((1, 2, 3))
        assert steps[20] <= 1.1 * np.median(steps)
        differences.append(np.abs(result - whole)[21:25].mean())
    assert differences[1] < 0.95 * differences[0]
    assert differences[2] < 0.75 * differences[0]


# Attention


def test_a_window_of_the_whole_frame_is_full_attention(upscaler: Upscaler) -> None:
    lq = lq_frames(moving(5, 48, 32))  # 6 x 4 tokens
    full, whole, local = (
        model.restore(lq, None, seed=0)[0]
        for model in (upscaler.model, with_window(upscaler.model, 96), with_window(upscaler.model, 32))
    )
    assert_close(whole, full, rtol=0, atol=1e-5)
    assert (local - full).abs().mean() > 1e-4


def test_a_local_window_does_not_see_beyond_itself(upscaler: Upscaler) -> None:
    """In three layers with windows of 2 tokens, a token sees no further than 3 tokens; in time, all frames."""
    transformer = with_window(upscaler.model, 32).transformer
    noisy, lq = seeded.normal(3, 2, 1, 16, 3, 4, 32)
    changed = lq.clone()
    changed[:, :, 2, :, 24:] += 1
    timestep, text = torch.tensor([1000.0]), seeded.normal(4, 1, 8, 16)
    difference = (transformer(noisy, lq, timestep, text)[0] - transformer(noisy, changed, timestep, text)[0]).abs()
    assert difference[..., : 24 - 2 * 4].max() == 0
    assert difference[:, :, 0, :, 24:].max() > 1e-3, "earlier frames see later ones"


def test_a_window_is_part_of_the_models_fingerprint(upscaler: Upscaler) -> None:
    assert with_window(upscaler.model, 32).fingerprint() != upscaler.model.fingerprint()


def test_windows_that_cannot_be_are_refused(upscaler: Upscaler, small_model: OneStepModel) -> None:
    with pytest.raises(UsageError, match="window: `40`"):
        with_window(upscaler.model, 40)
    with pytest.raises(UsageError, match="windows of its own"):
        with_window(small_model, 64)


# Pieces


def plan_of(upscaler: Upscaler, **changes: int | bool) -> Plan:
    return replace(upscaler.plan(96, 64, PLAIN), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("latents", [0, 1, 2, 3])
def test_calls_of_any_length_give_the_same(upscaler: Upscaler, latents: int) -> None:
    lq = lq_frames(moving(13))
    expected, _ = upscaler.model.restore(lq, None, seed=1, strength=0.7)
    result = restore_clip(
        upscaler.model, lq, plan_of(upscaler, vae_latents=latents), seed=1, strength=0.7, origin=(0, 0, 0)
    )
    assert_close(result, expected, rtol=0, atol=1e-5)


def test_tiles_of_the_autoencoder_stay_within_their_bound(upscaler: Upscaler) -> None:
    """The stated bound, for random weights: 5 % of the result's deviation in the mean; at seams no steep steps."""
    lq = lq_frames(moving(1, 160, 128))
    whole, tiled = (
        restore_clip(upscaler.model, lq, plan_of(upscaler, vae_tile=tile), seed=1, strength=1, origin=(0, 0, 0))
        for tile in (0, 256)
    )
    error = (tiled - whole).abs().mean() / whole.std()
    assert 0 < error < 0.05
    for axis, seams in ((4, [127, 255]),):
        other = [i for i in range(5) if i != axis]
        steps, expected = (x.diff(dim=axis).abs().mean(other) for x in (tiled, whole))
        assert max((steps / expected)[seams]) < 1.1


def test_weights_are_lent_to_the_device_and_not_copied_back() -> None:
    module = torch.nn.BatchNorm1d(3)
    homes = [tensor.data_ptr() for tensor in module.state_dict().values()]
    with torch.inference_mode(), lent(module, torch.device("meta")):
        assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == homes


def test_parts_take_turns_on_the_device(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    monkeypatch.setattr(phases, "to_host", lambda module: moved.append(type(module)))
    lq = lq_frames(moving(1))
    restore_clip(upscaler.model, lq, plan_of(upscaler, offload=True), seed=0, strength=1, origin=(0, 0, 0))
    assert moved == [Transformer, WanVAE]


# Memory that runs out


def limited_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[tuple[int, int, int]]:
    """Let the decoder fail as torch's CPU allocator does, for calls of more than `most` values; returns the calls."""
    decode, calls = WanVAE.decode, []

    def failing(self: WanVAE, latents: Tensor, *args: object) -> object:
        calls.append((latents.shape[2], latents.shape[3], latents.shape[4]))
        if latents[0, 0].numel() > most:
            torch.empty(2**60, dtype=torch.uint8)  # fails as torch itself fails
        return decode(self, latents, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(WanVAE, "decode", failing)
    return calls


def test_out_of_memory_takes_smaller_pieces_and_says_so(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "VAE_TILES", (64, 48))
    monkeypatch.setattr(phases, "VAE_TILE_OVERLAP", 16)
    frames = moving(5, 48, 32)  # latents of 12 x 8
    options = replace(PLAIN, color="wavelet")
    whole = upscaled(upscaler, frames, options)
    calls = limited_memory(monkeypatch, 8 * 8)
    notices: list[str] = []
    planned = upscaler.plan(48, 32, options)
    result = np.stack(list(upscaler.restore(frames, planned, options, bench.StageTimes(), notices)))
    assert calls[:3] == [(2, 8, 12), (1, 8, 12), (1, 8, 8)]
    assert max(h * w for _, h, w in calls[2:]) <= 64
    assert notices == [
        "memory ran out: the autoencoder went on with 1 latents a call, whole frames",
        "memory ran out: the autoencoder went on with 1 latents a call, tiles of 64 pixels",
    ]
    other = upscaled(upscaler, frames, replace(options, seed=1))
    assert 0 < np.abs(result - whole).mean() < 0.5 * np.abs(other - whole).mean()


def test_out_of_memory_after_every_step_is_an_error(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "VAE_TILES", (64, 48))
    monkeypatch.setattr(phases, "VAE_TILE_OVERLAP", 16)
    limited_memory(monkeypatch, 0)
    with pytest.raises(OutOfMemoryError, match="out of cpu memory"):
        upscaled(upscaler, moving(5, 48, 32), PLAIN)


# The paper's workload


def test_the_workload_runs_at_a_small_size_on_a_cpu(folder: Path) -> None:
    result = bench.run_workload("wan", (64, 48), 5, device="cpu", dtype="float32", window=None, repeat=1)
    stages = {"encode", "transformer", "decode", "color", "copies"}
    assert result["seconds"].keys() == stages | {"total"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert sum(result["seconds"][stage] for stage in stages) <= result["seconds"]["total"]
    assert result["tflop"].keys() == result["tflop_per_second"].keys() == {"encode", "transformer", "decode"}
    assert result["peak_rss_gib"] > 0
    assert result["plan"]["target_size"] == (64, 48)
    json.dumps(result)
    with pytest.raises(UsageError, match="number of frames: `6`"):
        bench.run_workload("wan", (64, 48), 6, device="cpu", dtype="float32", window=None, repeat=1)
    with pytest.raises(UsageError, match="unknown preset: `other`"):
        bench.run_workload("other", (64, 48), 5, device="cpu", dtype="float32", window=None, repeat=1)


def test_bench_takes_the_workload(run: Run, folder: Path) -> None:
    workload = ("--model", "wan", "--random-weights", "--dtype", "float32", "--repeat", 1, "--json")
    assert run("bench", *workload, "--size", "48x32", "--frames", 1, "--window", 32) == 0
    result = json.loads(run.out)
    assert result["workload"] == "wan, random weights, 1 frames of 48x32"
    assert result["seconds"]["transformer"] > 0
    run.fails(2, "are for --random-weights", "bench", "--frames", 5)
    run.fails(2, "a clip of its own", "bench", "clip.mp4", *workload)

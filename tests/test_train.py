"""The trainer: operators, pools, and a chain of stages that resumes to the same bits."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from duovsr.errors import InputError, TrainError, UsageError
from duovsr.options import PRESETS
from duovsr.train import degradation as ops
from duovsr.train.data import Pool, PoolConfig, build_pool, camera_move, find_sources
from duovsr.train.loop import LoopConfig, optimizer_step, run_loop
from duovsr.train.losses import gradient_loss, temporal_loss
from duovsr.train.one_step import ode_solution
from duovsr.train.stages import CONFIGS, resolve, run_stage
from duovsr.weights import check_files, load_model
from tests.clips import Clip, write_clip
from tests.conftest import SMALL

POOL = PoolConfig(samples=12, frames=5, side=72)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two clips and a still as the manifests describe them, and one file that is no video."""
    folder = tmp_path_factory.mktemp("sources")
    write_clip(folder / "a.mp4", Clip(size=(96, 80)))
    write_clip(folder / "b.mp4", Clip(size=(120, 72)))
    write_clip(folder / "c.mkv", Clip(size=(128, 96), pts=[0], codec="ffv1", pix_fmt="bgr0"))
    (folder / "broken.mp4").write_text("no video")
    with (folder / "manifest.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "repo", "path", "kind", "lapvar"])
        for name, kind in (("a.mp4", "camera"), ("b.mp4", "camera"), ("c.mkv", "still"), ("broken.mp4", "camera")):
            rows.writerow([name, "ours", f"{name}3", kind, 900])
    return folder


@pytest.fixture(scope="module")
def pool(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    build_pool([sources], folder, POOL)
    return folder


def test_kernels_sum_to_one_and_blur_keeps_constants() -> None:
    generator = seeded()
    for _ in range(50):
        kernel = ops.random_kernel(0.2, 3.0, generator)
        assert kernel.shape[0] % 2 == 1
        assert abs(kernel.sum() - 1) < 1e-5
    frames = torch.full((2, 3, 40, 48), 0.3)
    assert_close(ops.blur(frames, kernel), frames)


def test_gaussian_kernel_has_its_deviation() -> None:
    kernel = ops.gaussian_kernel(1.5, 1.5, 0.0)
    axis = torch.arange(kernel.shape[0]) - kernel.shape[0] // 2
    assert abs((kernel.sum(0) * axis.square()).sum().sqrt() - 1.5) < 0.05


def test_sinc_kernel_passes_low_and_stops_high() -> None:
    kernel = ops.sinc_kernel(math.pi / 3, 21)
    x = torch.arange(64.0)
    low, high = (torch.cos(omega * x).expand(1, 3, 64, 64) for omega in (0.2, 2.5))
    inner = (..., slice(16, 48), slice(16, 48))
    assert ops.blur(low, kernel)[inner].std() / low[inner].std() > 0.9
    assert ops.blur(high, kernel)[inner].std() / high[inner].std() < 0.1


@pytest.mark.parametrize("gray", [0.0, 1.0])
def test_noise_is_new_in_every_frame_and_gray_if_asked(gray: float) -> None:
    config = ops.DegradationConfig(gray_noise=gray)
    frames = torch.full((3, 3, 64, 64), 0.5)
    noise = ops.add_random_noise(frames, 1.0, config, seeded(1)) - frames
    assert noise.std() > 1e-3
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[:, 0], noise[:, 1]) == (gray == 1.0)


def test_codecs_lose_more_at_lower_quality_and_keep_the_length() -> None:
    frames = camera_move(torch.rand(1, 3, 80, 80, generator=seeded()), 5, 48, seeded())
    assert torch.equal(ops.h264(frames, 25), ops.h264(frames, 25))
    for codec, fine, coarse in ((ops.jpeg, 95, 30), (ops.h264, 18, 40)):
        errors = [(codec(frames, quality) - frames).abs().mean() for quality in (fine, coarse)]
        assert 0 < errors[0] < errors[1]
        assert codec(frames, fine).shape == frames.shape


def test_degradation_depends_on_the_generator_alone() -> None:
    frames = torch.rand(5, 3, 64, 64, generator=seeded())
    config = ops.DegradationConfig()
    for seed in range(8):
        first, again = (ops.degrade(frames, 16, 16, config, seeded(seed)) for _ in range(2))
        assert torch.equal(first, again)
        assert first.shape == (5, 3, 16, 16)
        assert_close(first * 255, (first * 255).round(), rtol=0, atol=1e-4)


def test_camera_move_moves_smoothly() -> None:
    still = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 16, generator=seeded()), (96, 128), mode="bicubic")
    window = camera_move(still.clamp(0, 1), 9, 64, seeded(3))
    steps = (window[1:] - window[:-1]).abs().mean((1, 2, 3))
    assert window.shape == (9, 3, 64, 64)
    assert 0 < steps.max() < 0.2


def test_held_out_sources_are_chosen_by_origin(sources: Path) -> None:
    held_out = {source.path.name: source.validation for source in find_sources([sources])}
    assert held_out == {"a.mp4": True, "b.mp4": False, "c.mkv": False, "broken.mp4": False}
    with pytest.raises(InputError, match=r"no manifest\.csv"):
        find_sources([sources / "missing"])


def test_a_pool_skips_and_counts_bad_files_and_repeats_batches(pool: Path) -> None:
    record = json.loads((pool / "pool.json").read_text())
    assert any("broken.mp4" in line for line in record["skipped"])
    data = Pool([pool], seed=1)
    hq, lq = data.batch(3, 4, 32, 5)
    assert hq.shape == lq.shape == (4, 3, 5, 32, 32)
    assert hq.min() >= -1
    assert hq.max() <= 1
    assert torch.equal(hq, data.batch(3, 4, 32, 5)[0])
    assert not torch.equal(hq, data.batch(4, 4, 32, 5)[0])
    # HQ and LQ show the same place: after smoothing they are alike.
    smooth = torch.nn.functional.avg_pool3d
    assert (smooth(hq, (1, 16, 16)) - smooth(lq, (1, 16, 16))).abs().mean() < 0.15
    with pytest.raises(InputError, match="not a finished training pool"):
        Pool([pool / "missing"], seed=0)


def test_a_pool_is_the_same_when_made_again(sources: Path, pool: Path, tmp_path: Path) -> None:
    build_pool([sources], tmp_path, POOL)
    for name in ("hq.npy", "lq.npy", "scale.npy"):
        assert np.array_equal(np.load(tmp_path / name), np.load(pool / name))


def test_difference_losses_see_only_differences() -> None:
    target = torch.rand(1, 3, 4, 16, 16)
    assert gradient_loss(target + 0.1, target) < 1e-6
    assert temporal_loss(target + 0.1, target) < 1e-6
    assert gradient_loss(target.flip(3), target) > 0.1
    assert temporal_loss(target.flip(2), target) > 0.1


class StraightTeacher(torch.nn.Module):
    """The exact velocity field of a single data point: straight lines from every noise to `x0`."""

    def __init__(self, x0: torch.Tensor) -> None:
        super().__init__()
        self.x0 = x0

    def forward(self, noisy: torch.Tensor, lq: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (noisy - self.x0) / sigma.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_ode_of_a_straight_flow_ends_in_the_data(steps: int) -> None:
    x0, eps = torch.randn(2, 2, 4, 3, 5, 5)
    solution = ode_solution(StraightTeacher(x0), eps, x0, steps, shift=2.0)  # type: ignore[arg-type]
    assert_close(solution, x0, rtol=0, atol=1e-5)


def short(stage: str, steps: int = 3, **changes: object) -> object:
    config = CONFIGS[stage]
    loop = replace(config.loop, steps=steps, warmup=1, log_every=1, save_every=2)
    return replace(config, loop=loop, batch=2, crop=32, frames=5, **changes)


def test_the_chain_trains_and_its_model_loads(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    run_stage("vae", [pool], None, tmp_path / "vae", short("vae", latent_free=1))
    for stage, init in (("base", "vae"), ("onestep", "base"), ("refine", "onestep")):
        changes = {"adversarial_start": 1} if stage == "refine" else {}
        run_stage(stage, [pool], tmp_path / init, tmp_path / stage, short(stage, **changes))
        losses = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in losses] == [0, 1, 2]
    run_stage("export", [], tmp_path / "refine", tmp_path / "weights" / "tiny", None)
    monkeypatch.setattr("duovsr.weights.weights_folder", lambda: tmp_path / "weights")
    assert all(status.verified for status in check_files("tiny"))
    model = load_model("tiny", torch.device("cpu"), torch.float32)
    assert model.prompt.shape == (1, 4, 16)
    with pytest.raises(InputError, match="it has vae"):
        run_stage("onestep", [pool], tmp_path / "vae", tmp_path / "wrong", short("onestep"))


def test_a_resumed_run_equals_an_uninterrupted_one(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    config = short("vae", steps=5, latent_free=1)
    run_stage("vae", [pool], None, tmp_path / "whole", config)

    class Killed(Exception):
        pass

    original = Pool.batch

    def dies_at_step_3(self: Pool, step: int, *rest: int) -> object:
        if step == 3:
            raise Killed
        return original(self, step, *rest)

    monkeypatch.setattr(Pool, "batch", dies_at_step_3)
    with pytest.raises(Killed):
        run_stage("vae", [pool], None, tmp_path / "killed", config)
    monkeypatch.setattr(Pool, "batch", original)
    run_stage("vae", [pool], None, tmp_path / "killed", config)
    whole, resumed = (torch.load(tmp_path / run / "final.pt", weights_only=True)["vae"] for run in ("whole", "killed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    module = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)

    def step(n: int) -> dict[str, torch.Tensor]:
        loss = module(torch.ones(1)).sum() * (math.inf if n == 2 else 1)
        return {"loss": loss.detach(), "norm": optimizer_step(loss, optimizer, 1.0)}

    with pytest.raises(TrainError, match="not finite at step 2"):
        run_loop(tmp_path, LoopConfig(steps=4), {"m": module}, {"o": optimizer}, step, {}, ema_of=("m",))
    assert not (tmp_path / "final.pt").exists()


def test_settings_reach_their_places() -> None:
    config = resolve("vae", ["loop.steps=7", "learning_rate=0.5"])
    assert (config.loop.steps, config.learning_rate) == (7, 0.5)
    assert resolve("pool", ["scale_weights=1,0,0", "validation=true"]).scale_weights == (1.0, 0.0, 0.0)
    for stage, setting, words in (
        ("vae", "steps=7", "unknown setting"),
        ("vae", "loop.steps=many", "unsupported value"),
        ("vae", "loop.steps", "not a setting"),
        ("gan", "a=b", "unknown stage"),
    ):
        with pytest.raises(UsageError, match=words):
            resolve(stage, [setting])


def test_a_run_is_not_resumed_with_other_settings(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    run_stage("vae", [pool], None, tmp_path, short("vae", latent_free=1))
    with pytest.raises(UsageError, match="other settings: learning_rate"):
        run_stage("vae", [pool], None, tmp_path, short("vae", latent_free=1, learning_rate=9.0))
    with pytest.raises(UsageError, match="other settings"):
        run_stage("base", [pool], tmp_path, tmp_path, short("base"))


def test_an_unfinished_pool_is_no_pool(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_pool([sources], tmp_path, POOL)
    monkeypatch.setattr("duovsr.train.data.degrade", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_pool([sources], tmp_path, POOL)
    with pytest.raises(InputError, match="not a finished training pool"):
        Pool([tmp_path], seed=0)


def test_sources_without_stills_say_so(tmp_path: Path, sources: Path) -> None:
    rows = (sources / "manifest.csv").read_text().splitlines()
    write_clip(tmp_path / "b.mp4", Clip(size=(120, 72)))
    (tmp_path / "manifest.csv").write_text("\n".join([rows[0], rows[2]]))
    with pytest.raises(TrainError, match="no stills"):
        build_pool([tmp_path], tmp_path / "pool", POOL)

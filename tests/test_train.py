"""The trainer: batches, and a chain of stages from pixels to a model that loads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from duovsr.errors import InputError, UsageError
from duovsr.model import flow
from duovsr.options import PRESETS
from duovsr.train.data import Pool, sharpness
from duovsr.train.distributed import World
from duovsr.train.draws import Draws
from duovsr.train.journal import note_settings
from duovsr.train.loop import Run
from duovsr.train.options import BaseConfig, DualConfig, ExportConfig, ProgressiveConfig, StageConfig, VAEConfig
from duovsr.train.recipes import RECIPES
from duovsr.train.roles import guided_velocity, ode_solution
from duovsr.train.runs import load_weights
from duovsr.train.sources import sharpness as exact_sharpness
from duovsr.train.stages import Job, resolve, run_job
from duovsr.weights import load_model
from tests.clips import Clip, write_clip
from tests.conftest import SMALL, write_pool

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
SHORT = ["batch=2", "crop=32", "steps=3", "warmup=1", "log_every=1", "save_every=2", "validate_every=2"]


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", SMALL)


def draws(*indices: int, step: int = 0) -> Draws:
    return Draws.of(range(indices[0], indices[-1] + 1), seed=0, step=step, part=0, device=CPU)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_stage(stage: str, out: Path, *settings: str, **job: Any) -> None:
    described = Job(stage, out, **job)
    run_job(described, resolve(described, [*SHORT, *settings]))


# Random numbers and data


def test_a_sample_is_the_same_in_any_company() -> None:
    x = torch.zeros(4, 3, 2, 5, 5)
    together = draws(0, 1, 2, 3)
    apart = [draws(i) for i in range(4)]
    for shared in (0.0, 0.8):
        assert torch.equal(together.normal_like(x, shared), torch.cat([d.normal_like(x[:1], shared) for d in apart]))
    assert torch.equal(together.uniform(), torch.cat([d.uniform() for d in apart]))
    assert not torch.equal(draws(0).uniform(), draws(0, step=1).uniform())


def test_noise_in_training_has_the_statistics_of_inference() -> None:
    shape = (8, 5, 24, 24)
    here = Draws([7], CPU).normal_like(torch.zeros(1, *shape), 0.8)[0]
    there = flow.noise(7, shape, shared=0.8)[0]
    for noise in (here, there):
        assert abs(noise.std() - 1) < 0.03
        correlation = (noise[:, 1:] * noise[:, :-1]).mean()
        assert abs(correlation - 0.8) < 0.04


def test_pools_take_turns_in_validation(training_pool: Path, tmp_path: Path) -> None:
    pools = Pool([training_pool, write_pool(tmp_path, samples=2)])
    pools.hq[1] = np.full_like(pools.hq[1], 255)
    white = (pools.fixed(range(6), 32, 5, torch.device("cpu")).hq == 1).flatten(1).all(1)
    assert white.tolist() == [False, True, False, True, False, False]  # as long as there are any


def test_updates_of_both_kinds_are_noted() -> None:
    config = VAEConfig()
    free = [step % config.free_every == config.free_every - 1 for step in range(0, config.steps, config.log_every)]
    assert np.mean(free) == pytest.approx(1 / config.free_every, abs=0.01)


@pytest.mark.parametrize("live", [False, True])
def test_batches_repeat_and_show_the_same_place(tmp_path: Path, live: bool) -> None:
    pool = Pool([write_pool(tmp_path, live=live)])
    hq, lq, _ = pool.frames(draws(0, 1, 2, 3), 32, 5)
    assert hq.shape == lq.shape == (4, 3, 5, 32, 32)
    assert -1 <= hq.min() < hq.max() <= 1
    assert torch.equal(lq, pool.frames(draws(0, 1, 2, 3), 32, 5)[1])
    assert torch.equal(hq[2:3], pool.frames(draws(2), 32, 5)[0])
    assert not torch.equal(hq, pool.frames(draws(0, 1, 2, 3, step=1), 32, 5)[0])
    assert pool.fixed(range(4), 32, 5, torch.device("cpu")).scale.tolist() == [4, 2, 4, 2]
    smooth = torch.nn.functional.avg_pool3d
    assert (smooth(hq, (1, 16, 16)) - smooth(lq, (1, 16, 16))).abs().mean() < 0.1


def test_a_pool_must_be_finished_and_large_enough(training_pool: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a finished training pool"):
        Pool([tmp_path])
    with pytest.raises(InputError, match=r"asks for 5 frames of 96 pixels, `.*pool` has 9 of 72"):
        Pool([training_pool]).require(96, 5)


def test_sharpness_is_that_of_the_sources(training_pool: Path) -> None:
    hq, _, _ = Pool([training_pool]).frames(draws(0), 64, 1)
    pixels = (hq[0, :, 0] + 1) / 2 * 255
    assert sharpness(hq).item() == pytest.approx(exact_sharpness(pixels.round().byte()), rel=0.05)


class StraightFlow(nn.Module):
    """The exact velocity field of a single data point: straight lines from every noise to `x0`."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = x0

    def forward(self, noisy: Tensor, lq: Tensor, sigma: Tensor, dropped: Tensor | None = None) -> Tensor:
        return (noisy - self.x0) / sigma.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_ode_of_a_straight_flow_ends_in_the_data(steps: int) -> None:
    x0, eps = torch.randn(2, 2, 4, 3, 5, 5)
    for guidance in (0.0, 1.5):
        guided = partial(guided_velocity, StraightFlow(x0), guidance=guidance)
        solution = ode_solution(guided, eps, x0, steps, shift=2.0)
        torch.testing.assert_close(solution, x0, rtol=0, atol=1e-5)


# The stages


class Killed(Exception):
    pass


def test_the_chain_trains_and_its_model_loads(
    training_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = (training_pool,)
    held_out = {"held_out": (write_pool(tmp_path / "held_out"),)}
    run_stage("vae", tmp_path / "vae", "free_every=2", data=pool, **held_out)
    run_stage("base", tmp_path / "base", data=pool, init=tmp_path / "vae", **held_out)
    run_stage("cfg", tmp_path / "cfg", data=pool, init=tmp_path / "base", **held_out)
    run_stage("progressive", tmp_path / "one", "start=4", data=pool, init=tmp_path / "cfg", **held_out)
    run_stage("dual", tmp_path / "dual", "head_width=8", data=pool, init=tmp_path / "one", **held_out)
    run_stage("prefs", tmp_path / "prefs", "pairs=3", "rankers=psnr,ssim", data=pool, init=tmp_path / "dual")
    run_stage("dpo", tmp_path / "dpo", data=(tmp_path / "prefs",), init=tmp_path / "dual", **held_out)
    run_stage("refine", tmp_path / "refine", "adversarial_start=1", data=pool, init=tmp_path / "dpo", **held_out)
    for stage, count in (("vae", 3), ("base", 3), ("cfg", 3), ("one", 6), ("dual", 3), ("dpo", 3), ("refine", 3)):
        steps = [record["step"] for record in records(tmp_path / stage) if "grad_norm" in record]
        assert steps == list(range(count)), stage
        assert any("validation_score" in record for record in records(tmp_path / stage)), stage
        strip = Image.open(sorted((tmp_path / stage / "samples").glob("*.png"))[0])
        assert strip.size == (3 * 32, 2 * 32) or strip.size == (3 * 32, 4 * 32), stage
    assert {"vae", "model", "score"} <= set(load_weights(tmp_path / "one"))
    run_job(Job("export", tmp_path / "weights" / "tiny", init=tmp_path / "refine"), ExportConfig())
    monkeypatch.setattr("duovsr.repository.weights_folder", lambda: tmp_path / "weights")
    assert load_model("tiny", CPU, torch.float32).prompt.shape == (1, 4, 16)
    with pytest.raises(InputError, match="it has vae"):
        run_stage("cfg", tmp_path / "wrong", data=pool, init=tmp_path / "vae")


@pytest.mark.parametrize("stage", ["progressive", "dual"])
def test_a_stage_resumes_in_the_middle(
    training_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    pool = (training_pool,)
    run_stage("vae", tmp_path / "vae", "steps=1", data=pool)
    run_stage("base", tmp_path / "base", "steps=1", data=pool, init=tmp_path / "vae")
    settings = {"progressive": ("start=8", "dtype=float32"), "dual": ("head_width=8", "dtype=float32")}[stage]
    run_stage(stage, tmp_path / "whole", *settings, data=pool, init=tmp_path / "base")
    original = Run.micro_batches
    fatal = {"progressive": 5, "dual": 2}[stage]

    def dies(self: Run, step: int, part: int = 0) -> Any:
        if step == fatal:
            raise Killed
        return original(self, step, part)

    monkeypatch.setattr(Run, "micro_batches", dies)
    with pytest.raises(Killed):
        run_stage(stage, tmp_path / "killed", *settings, data=pool, init=tmp_path / "base")
    monkeypatch.setattr(Run, "micro_batches", original)
    run_stage(stage, tmp_path / "killed", *settings, data=pool, init=tmp_path / "base")
    whole, resumed = (load_weights(tmp_path / run)["model"] for run in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_cached_latents_train_without_the_frames(training_pool: Path, tmp_path: Path) -> None:
    run_stage("vae", tmp_path / "vae", "steps=1", data=(training_pool,))
    run_stage("latents", tmp_path / "latents", "samples=6", data=(training_pool,), init=tmp_path / "vae")
    assert np.load(tmp_path / "latents" / "latents.npy").shape == (6, 2, 16, 2, 4, 4)
    run_stage("base", tmp_path / "base", data=(tmp_path / "latents",), init=tmp_path / "vae")
    assert len(records(tmp_path / "base")) == 3
    with pytest.raises(UsageError, match="trains on frames"):
        run_stage("vae", tmp_path / "wrong", data=(tmp_path / "latents",))


def test_a_recipe_runs_to_its_end_and_passes_over_what_is_done(training_pool: Path, tmp_path: Path) -> None:
    job = Job("recipe", tmp_path, data=(training_pool,), name="tiny")
    short = [f"{stage}.{setting}" for stage in RECIPES["tiny"].stages for setting in SHORT[:4]]
    extra = ["progressive.start=2", "prefs.pairs=2", "prefs.rankers=psnr", "dual.head_width=8", "refine.ssim_scales=1"]
    config = resolve(job, [*short, *extra])
    assert isinstance(config["base"], BaseConfig) and config["base"].sharpness > 0  # or guidance would mean nothing
    run_job(job, config)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/final.pt")}
    assert {path.parent.name for path in times} == set(RECIPES["tiny"].stages) - {"prefs"}
    run_job(job, config)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/final.pt")}


def test_export_blends_two_runs_of_a_model(training_pool: Path, tmp_path: Path) -> None:
    run_stage("vae", tmp_path / "vae", "steps=1", data=(training_pool,))
    for name, seed in (("a", 1), ("b", 2)):
        run_stage("base", tmp_path / name, "steps=1", f"seed={seed}", data=(training_pool,), init=tmp_path / "vae")
    job = Job("export", tmp_path / "weights" / "tiny", init=tmp_path / "a")
    run_job(job, resolve(job, [f"blend={tmp_path / 'b'}", "share=0.25"]))
    a, b, mixed = (load_weights(path)["model"] for path in (tmp_path / "a", tmp_path / "b", job.out))
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.75 * a[name] + 0.25 * b[name], rtol=0.01, atol=1e-3)
    with pytest.raises(UsageError, match="unsupported share"):
        resolve(job, ["share=2"])
    runs = {name: torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("a", "b")}
    runs["a"]["vae"]["decoder.scale_8.weight"].fill_(1)
    del runs["b"]["vae"]["decoder.scale_8.weight"]  # as before there was such a one
    for name, weights in runs.items():
        torch.save(weights, tmp_path / name / "final.pt")
    run_job(job, resolve(job, [f"blend={tmp_path / 'b'}", "share=0.25"]))
    assert (load_weights(job.out)["vae"]["decoder.scale_8.weight"] == 0.75).all()
    run_job(job, resolve(job, [f"blend={tmp_path / 'b'}", "share=1", "only=vae"]))
    assert (load_weights(job.out)["vae"]["decoder.scale_8.weight"] == 0).all()
    a, mixed = (load_weights(path)["model"] for path in (tmp_path / "a", job.out))
    torch.testing.assert_close(mixed, {name: a[name] for name in mixed}, rtol=0.01, atol=1e-3)


def test_tune_adapts_a_model_to_somebodys_clips(training_pool: Path, tmp_path: Path) -> None:
    run_stage("vae", tmp_path / "vae", "steps=1", data=(training_pool,))
    run_stage("base", tmp_path / "base", "steps=1", data=(training_pool,), init=tmp_path / "vae")
    run_job(Job("export", tmp_path / "weights" / "tiny", init=tmp_path / "base"), ExportConfig())
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("a", "b"):
        write_clip(clips / f"{name}.mp4", Clip(size=(96, 80)))
    settings = ("samples=4", "side=72", "adversarial_start=1", "discriminator_lead=1")
    run_stage("tune", tmp_path / "mine", *settings, data=(clips,), init=tmp_path / "weights" / "tiny")
    tuned, before = (load_weights(path)["vae"] for path in (tmp_path / "mine" / "model", tmp_path / "weights" / "tiny"))
    assert any(not torch.equal(tuned[name], before[name]) for name in tuned)
    assert {name for name in tuned if not torch.equal(tuned[name], before[name])} <= {
        name for name in tuned if name.startswith("decoder.")
    }


def test_settings_reach_their_places(tmp_path: Path) -> None:
    def settings(stage: str, *values: str) -> Any:
        return resolve(Job(stage, tmp_path, name="paper" if stage == "recipe" else None), list(values))

    config = settings("vae", "steps=7", "learning_rate=0.5", "checkpointing=true")
    assert (config.steps, config.learning_rate, config.checkpointing) == (7, 0.5, True)
    assert settings("dual", "sigma_range=0.1,0.9").sigma_range == (0.1, 0.9)
    assert settings("prefs", "rankers=psnr").rankers == ("psnr",)
    assert settings("recipe", "dual.steps=3")["dual"].steps == 3
    assert "dual" not in settings("recipe", "dual=off")
    assert settings("pool", "degradation.clean=0.5").degradation.clean == 0.5
    for stage, setting, words in (
        ("vae", "stepz=7", "unknown setting"),
        ("vae", "steps=many", "unsupported value"),
        ("vae", "steps", "not a setting"),
        ("vae", "batch=0", "unsupported batch: `0`"),
        ("vae", "frames=4", "unsupported frames: `4`"),
        ("dual", "streams=triple", "unsupported streams: `triple`"),
        ("progressive", "start=48", "unsupported start: `48`"),
        ("refine", "ssim_scales=5", "unsupported ssim_scales: `5`"),
        ("gan", "a=b", "unknown stage"),
    ):
        with pytest.raises(UsageError, match=words):
            settings(stage, setting)


def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    note_settings(tmp_path, "base", "1.3b", StageConfig(), {})  # a first try that did nothing
    note_settings(tmp_path, "vae", "tiny", StageConfig(), {})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000002")
    note_settings(tmp_path, "vae", "tiny", StageConfig(threads=3), {})
    with pytest.raises(UsageError, match="other settings: learning_rate"):
        note_settings(tmp_path, "vae", "tiny", StageConfig(learning_rate=9.0), {})
    with pytest.raises(UsageError, match="other settings: stage"):
        note_settings(tmp_path, "base", "tiny", StageConfig(), {})


def test_the_paper_recipe_has_the_papers_numbers() -> None:
    stages = RECIPES["paper"].stages
    assert RECIPES["paper"].preset == "1.3b"
    assert [(stages[name].steps, stages[name].batch) for name in ("base", "cfg", "dual")] == [
        (10_000, 64),
        (500, 32),
        (2000, 32),
    ]
    progressive, dual = stages["progressive"], stages["dual"]
    assert isinstance(progressive, ProgressiveConfig)
    assert (progressive.start, progressive.rounds, progressive.steps, progressive.batch) == (64, 6, 500, 32)
    assert isinstance(dual, DualConfig)
    assert (dual.auxiliary, dual.dmd_weight, dual.gan_weight, dual.matching_weight) == (3, 1.0, 0.1, 0.05)

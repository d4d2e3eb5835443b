"""The training loop: what it promises of resuming, micro-batches, signals, checkpoints and validation."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from duovsr.errors import TrainError
from duovsr.train.distributed import World
from duovsr.train.draws import Draws
from duovsr.train.loop import Ema, Interrupted, Metrics, Run, Trained, learning_rate_factor, run_loop
from duovsr.train.options import StageConfig
from duovsr.train.runs import load_weights

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fit_line(out: Path, hook: Callable[[int], None] = lambda n: None, **settings: Any) -> Tensor:
    """A run of the loop on a linear model; its averaged weight."""
    config = StageConfig(steps=9, batch=4, save_every=2, log_every=1, warmup=2, ema=0.9)
    run = Run(out, replace(config, **settings), ALONE)
    torch.manual_seed(0)
    line = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(line.parameters(), 0.1)

    def loss_of(each: Draws) -> tuple[Tensor, Metrics]:
        x = torch.stack([torch.randn(3, generator=g) for g in each.generators])
        loss = (line(x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss}

    def step(n: int) -> Metrics:
        hook(n)
        return run.update([optimizer], loss_of, n)

    run_loop(run, Trained({"line": line}, {"line": optimizer}, ("line",)), step)
    return load_weights(out)["line"]["weight"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 9))
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, at: int) -> None:
    whole = fit_line(tmp_path / "whole")

    def kill(n: int) -> None:
        if n == at:
            raise Killed

    with pytest.raises(Killed):
        fit_line(tmp_path / "killed", kill)
    assert torch.equal(fit_line(tmp_path / "killed"), whole)
    traces = [[(r["step"], r["loss"]) for r in records(tmp_path / name)] for name in ("whole", "killed")]
    assert traces[0] == traces[1]


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    whole, parts = (fit_line(tmp_path / str(n), accumulate=n) for n in (1, 4))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    whole = fit_line(tmp_path / "whole")

    def terminate(n: int) -> None:
        if n == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="interrupted at step 5 of 9; saved"):
        fit_line(tmp_path / "stopped", terminate)
    assert not (tmp_path / "stopped" / "final.pt").exists()
    assert torch.equal(fit_line(tmp_path / "stopped"), whole)


def test_a_finished_checkpoint_is_named_before_the_next(tmp_path: Path) -> None:
    """A crash just before the next save goes back by one interval, not by two."""
    latest = tmp_path / "checkpoints" / "latest"
    there = []

    def look(n: int) -> None:
        if n > 30 and not latest.exists():
            time.sleep(0.1)  # for what is written in the background
        there.append(latest.exists())

    fit_line(tmp_path, look, steps=60, save_every=30)
    assert there[-1] and not there[29]


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    fit_line(tmp_path, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000008", "step_00000009"]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, StageConfig(steps=4, batch=1), ALONE)
    line = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(line.parameters(), lr=1.0)

    def step(n: int) -> Metrics:
        def loss_of(each: Draws) -> tuple[Tensor, Metrics]:
            loss = line(torch.ones(1)).sum() * (math.inf if n == 2 else 1)
            return loss, {"loss": loss}

        return run.update([optimizer], loss_of, n)

    with pytest.raises(TrainError, match=r"not finite at step 2 \(loss -?inf\)"):
        run_loop(run, Trained({"m": line}, {"o": optimizer}, ("m",)), step)
    assert line.weight.isfinite().all()
    assert not (tmp_path / "final.pt").exists()


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    config = StageConfig(steps=100, warmup=10)
    factors = [learning_rate_factor(n, 100, config) for n in range(100)]
    assert factors[0] == pytest.approx(0.1, rel=0.01)
    assert max(factors) == factors[9] or max(factors) == factors[10]
    assert factors[-1] < 0.001
    assert learning_rate_factor(99, 100, replace(config, schedule="constant")) == 1.0


def test_a_short_stage_has_a_short_warm_up() -> None:
    """Or a round of progressive distillation would end before it."""
    factors = [learning_rate_factor(n, 60, StageConfig(warmup=100)) for n in range(60)]
    assert factors[0] == pytest.approx(1 / 6) and max(factors) > 0.97
    assert learning_rate_factor(0, 9, StageConfig(warmup=100)) == 1.0


def test_the_average_can_be_worn_and_taken_off() -> None:
    line = nn.Linear(2, 2)
    ema = Ema(line, 0.5)
    before = line.weight.detach().clone()
    with torch.no_grad():
        line.weight += 1.0
    ema.update(1000)
    with ema.applied():
        torch.testing.assert_close(line.weight, before + 0.5)
    torch.testing.assert_close(line.weight, before + 1.0)


def test_a_finished_run_without_its_checkpoints_is_finished(tmp_path: Path) -> None:
    """People remove them to make room."""
    weight = fit_line(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")

    def refuse(n: int) -> None:
        raise AssertionError(f"step {n} was made again")

    assert torch.equal(fit_line(tmp_path, refuse), weight)


def test_validation_keeps_the_best_and_can_stop_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path, StageConfig(steps=20, batch=1, validate_every=2, patience=2, ema=0.0), ALONE)
    line = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(line.parameters(), lr=0.0)
    scores = iter([3.0, 1.0, 2.0, 4.0, 0.0])

    def step(n: int) -> Metrics:
        return run.update([optimizer], lambda each: (line(torch.ones(1)).sum(), {}), n)

    trained = Trained({"m": line}, {"o": optimizer}, ("m",), validate=lambda done: {"score": next(scores)})
    run_loop(run, trained, step)
    assert [r["validation_score"] for r in records(tmp_path) if "validation_score" in r] == [3.0, 1.0, 2.0, 4.0]
    assert (tmp_path / "best.pt").exists()
    assert next(scores) == 0.0


def test_only_the_last_round_has_the_best(tmp_path: Path) -> None:
    """The rounds of `progressive` before it train for more steps than the one that is validated."""
    run = Run(tmp_path, StageConfig(steps=4, batch=1, validate_every=2, patience=2, ema=0.0), ALONE)
    line = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(line.parameters(), lr=0.1)
    scores, weights = iter([1.0, 0.5, 2.0, 3.0, 2.5, 4.0]), {}

    def step(n: int) -> Metrics:
        return run.update([optimizer], lambda each: (line(torch.ones(1)).sum(), {}), n)

    def validate(done: int) -> dict[str, float]:
        weights[done] = line.weight.detach().clone()
        return {"score": next(scores)}

    trained = Trained({"m": line}, {"o": optimizer}, ("m",), validate=validate, total=12, period=4)
    run_loop(run, trained, step)
    assert len([r for r in records(tmp_path) if "validation_score" in r]) == 6
    assert torch.equal(load_weights(tmp_path / "best.pt")["m"]["weight"], weights[10])


def test_ranks_agree_on_what_is_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only some gathered the weights, they would wait for the others for good."""
    mine, others = iter([1.0, 2.0, 3.0]), {1.0: 3.0, 2.0: 0.5, 3.0: 0.1}

    def mean(value: Tensor, world: World) -> Tensor:
        return (value + others[value.item()]) / 2 if value.item() in others else value

    monkeypatch.setattr("duovsr.train.loop.mean_over_ranks", mean)
    run = Run(tmp_path, StageConfig(steps=6, batch=1, validate_every=2, patience=1, ema=0.0), ALONE)
    line = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(line.parameters(), lr=0.0)

    def step(n: int) -> Metrics:
        return run.update([optimizer], lambda each: (line(torch.ones(1)).sum(), {}), n)

    run_loop(run, Trained({"m": line}, {"o": optimizer}, ("m",), validate=lambda done: {"score": next(mine)}), step)
    noted = [r["validation_score"] for r in records(tmp_path) if "validation_score" in r]
    assert noted == [1.0, 2.0, 3.0], "2.0, 1.25, 1.55 in the mean: the second is better, the third is not"

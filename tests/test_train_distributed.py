"""A job of many processes trains as one does, and survives what kills it (gloo on the CPU)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SETTINGS = ["batch=6", "crop=32", "save_every=2", "log_every=1", "warmup=1", "dtype=float32", "device=cpu"]


WORKER = ("-m", "tests.train_worker")


def launch(
    processes: int,
    *arguments: object,
    restarts: int = 0,
    check: bool = True,
    program: tuple[str, ...] = WORKER,
    **environment: str,
) -> int:
    """Run a program on its own or under torchrun; its exit code."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}"]
    command += [*program, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done.returncode


def losses(run: Path, name: str = "loss") -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[name] for record in records if name in record}


@pytest.fixture(scope="module")
def vae(training_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "vae"
    launch(1, "vae", out, training_pool, "-", *SETTINGS, "steps=1")
    return out


@pytest.fixture(scope="module")
def alone(training_pool: Path, vae: Path) -> Path:
    """A run of one process."""
    out = vae.parent / "alone"
    launch(1, "base", out, training_pool, vae, *SETTINGS, "steps=6")
    return out


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_train_as_one(
    training_pool: Path, vae: Path, alone: Path, tmp_path: Path, accumulate: int
) -> None:
    launch(2, "base", tmp_path, training_pool, vae, *SETTINGS, "steps=6", f"accumulate={accumulate}")
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-4)
    mine, theirs = (torch.load(run / "final.pt", weights_only=True)["model"] for run in (tmp_path, alone))
    assert max((mine[name] - theirs[name]).abs().max() for name in mine) < 1e-4


def test_the_stages_in_pixels_train_as_one_too(training_pool: Path, vae: Path, alone: Path, tmp_path: Path) -> None:
    launch(2, "vae", tmp_path / "vae", training_pool, "-", *SETTINGS, "steps=1")
    assert losses(tmp_path / "vae") == pytest.approx(losses(vae), abs=1e-4)
    refine = (training_pool, alone, *SETTINGS, "steps=3", "adversarial_start=1", "noise_weight=1")
    launch(1, "refine", tmp_path / "one", *refine)
    launch(2, "refine", tmp_path / "two", *refine, "accumulate=3")
    for name in ("loss", "noise_drift", "adversarial", "discriminator"):
        assert losses(tmp_path / "two", name) == pytest.approx(losses(tmp_path / "one", name), abs=1e-4), name


@pytest.mark.parametrize("streams", ["joint", "dmd"])
def test_the_dual_streams_train_as_one_too(training_pool: Path, alone: Path, tmp_path: Path, streams: str) -> None:
    """At a rate at which an update that some parameters missed is seen in the weights."""
    given = (training_pool, alone, *SETTINGS, "steps=3", f"streams={streams}", "fake_rate=1e-3", "learning_rate=1e-3")
    for processes in (1, 2):
        launch(processes, "dual", tmp_path / str(processes), *given)
    for name in ("loss", "fake_score"):
        mine, theirs = (losses(tmp_path / processes, name) for processes in ("2", "1"))
        assert mine == pytest.approx(theirs, rel=1e-3), name
    mine, theirs = (torch.load(tmp_path / each / "final.pt", weights_only=True)["model"] for each in ("2", "1"))
    assert max((mine[name] - theirs[name]).abs().max() for name in mine) < 1e-4


def test_a_job_that_is_stopped_saves_where_it_was(training_pool: Path, vae: Path, alone: Path, tmp_path: Path) -> None:
    arguments = ("base", tmp_path / "run", training_pool, vae, *SETTINGS, "steps=6", "save_every=100")
    assert launch(2, *arguments, check=False, STOP=str(tmp_path / "stopped")) != 0
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000004"
    launch(2, *arguments, STOP=str(tmp_path / "stopped"))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-4)


def test_stages_follow_each_other_in_one_job(training_pool: Path, vae: Path, alone: Path, tmp_path: Path) -> None:
    """As in a recipe. Latents are made by the first rank alone, while the other waits."""
    script = tmp_path / "chain.py"
    script.write_text(
        "import sys\nfrom tests.train_worker import main\n"
        "out, pool, vae, *settings = sys.argv[1:]\n"
        "for job in (['latents', out + '/latents', pool, vae, 'samples=4'], ['base', out + '/base', pool, vae]):\n"
        "    sys.argv = ['worker', *job, *settings]\n    main()\n"
    )
    launch(2, tmp_path, training_pool, vae, *SETTINGS, "steps=6", program=(str(script),))
    assert losses(tmp_path / "base") == pytest.approx(losses(alone), abs=1e-4)
    launch(1, "latents", tmp_path / "alone", training_pool, vae, *SETTINGS, "steps=6", "samples=4")
    mine, theirs = (tmp_path / name / "latents.npy" for name in ("latents", "alone"))
    assert mine.read_bytes() == theirs.read_bytes()


def test_a_checkpoint_of_two_processes_is_the_same_on_one_and_three(tmp_path: Path) -> None:
    states: list[Any] = []
    for processes in (2, 1, 3):
        launch(processes, "state", tmp_path / "checkpoints", tmp_path / f"{processes}.pt")
        states.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    leaves = [torch.utils._pytree.tree_leaves(state) for state in states]
    tensors = [[leaf for leaf in each if isinstance(leaf, torch.Tensor)] for each in leaves]
    assert len(tensors[0]) > 50
    for saved, *loaded in zip(*tensors, strict=True):
        assert all(torch.equal(saved, each) for each in loaded)


def kills(count: int, folder: Path, steps: int) -> str:
    """Deaths of random ranks at random steps, each once."""
    chosen = random.Random(0)
    return ",".join(f"{chosen.randrange(steps)}:{chosen.randrange(2)}:{folder / f'died{n}'}" for n in range(count))


@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_ranks_end_at_the_target(
    training_pool: Path, vae: Path, alone: Path, tmp_path: Path, count: int
) -> None:
    deaths = kills(count, tmp_path, 6)
    arguments = ("base", tmp_path / "run", training_pool, vae, *SETTINGS, "steps=6")
    launch(2, *arguments, restarts=3 * count, DIE=deaths)
    assert len(list(tmp_path.glob("died*"))) >= 1
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-4)


def test_a_checkpoint_cut_short_is_not_picked_up(training_pool: Path, vae: Path, alone: Path, tmp_path: Path) -> None:
    arguments = ("base", tmp_path / "run", training_pool, vae, *SETTINGS, "steps=6")
    marker = tmp_path / "died"
    assert launch(1, *arguments, check=False, DIE_WRITING=str(marker)) == -9
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step_00000002"
    assert (checkpoints / "step_00000004").exists()  # the one that was being written
    launch(1, *arguments, DIE_WRITING=str(marker))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-6)

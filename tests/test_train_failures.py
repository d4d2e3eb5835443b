"""Failures of `duovsr train` that are the data's or the machine's: one line, a hint, the right exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from duovsr.cli.train import _told
from duovsr.errors import DuovsrError, InputError, NoSpaceError, OutOfMemoryError, UsageError
from duovsr.options import PRESETS
from duovsr.train import checkpoint, runs
from duovsr.train.checkpoint import Checkpoints
from duovsr.train.distributed import World, joined
from duovsr.train.journal import sole_owner
from duovsr.train.loop import Interrupted
from duovsr.train.options import ExportConfig, PoolConfig
from duovsr.train.pool import build_pool
from duovsr.train.recipes import RECIPES
from duovsr.train.sources import find_sources
from duovsr.train.stages import Job, resolve, run_job
from tests.clips import Clip, write_clip
from tests.conftest import run_stage, write_pool
from tests.test_train_loop import fit_line

COLUMNS = b"file,repo,path,kind,lapvar\n"


# Footage


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (COLUMNS + b"a.mp4,ours,a,camera,-5\n", "not a variance: `-5` .* line 2 of"),
        (COLUMNS + b"a.mp4,ours,a,camera,nan\n", "not a variance: `nan`"),
        (COLUMNS + b"a.mp4,ours,a,camera,9\nb.mp4,ours\n", "no `path` in line 3 of"),
        (COLUMNS + b",ours,a,camera,9\n", "no `file` in line 2 of"),
        (COLUMNS + b"a.mp4,ours,\xe9,camera,9\n", "not a table in UTF-8"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named_with_its_line(tmp_path: Path, table: bytes, words: str) -> None:
    (tmp_path / "manifest.csv").write_bytes(table)
    with pytest.raises(InputError, match=words):
        find_sources([tmp_path])


def test_a_manifest_may_begin_with_the_mark_that_spreadsheets_write(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_bytes(b"\xef\xbb\xbf" + COLUMNS + b"a.mp4,ours,a,camera,9\n")
    assert [source.path.name for source in find_sources([tmp_path])] == ["a.mp4"]


def test_a_source_counts_once_however_its_folder_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.png").touch()
    (tmp_path / "link").symlink_to(tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    assert len(find_sources([tmp_path / "clips", Path("clips"), tmp_path / "link"])) == 1


def test_flat_footage_makes_a_pool(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    black = [np.zeros((64, 96, 3), np.uint8)] * 6
    write_clip(tmp_path / "clips" / "a.mp4", Clip(range(0, 512 * 6, 512), size=(96, 64), pictures=black))
    build_pool([tmp_path / "clips"], tmp_path / "pool", PoolConfig(samples=2, frames=3, side=48, live=True))
    assert np.load(tmp_path / "pool" / "scale.npy").all()


# Commands


def test_export_refuses_the_weights_of_another_preset(base: Path, tmp_path: Path, small_preset: None) -> None:
    assert PRESETS["tiny"].name == "small"  # which the weights are of
    with pytest.raises(InputError, match=r"not of preset `1\.3b`"):
        run_job(Job("export", tmp_path / "model", preset="1.3b", init=base), ExportConfig())
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["base=off"], "stage `cfg` has no `model` to start from"),
        (["vae=off"], "stage `base` has no `vae` to start from"),
        (["refine.frames=21"], "asks for 21 frames .* has 9 of 72"),
        (["refine.batch=3"], "batch 3 does not divide by 2 processes"),
    ],
)
def test_a_recipe_refuses_before_its_first_stage(
    training_pool: Path,
    tmp_path: Path,
    small_preset: None,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    words: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = Job("recipe", tmp_path / "runs", data=(training_pool,), name="tiny")
    small = [f"{s}.{k}" for s in resolve(job, []) for k in ("crop=64", "frames=5") if s not in ("dpo", "prefs")]
    with pytest.raises(DuovsrError, match=words):
        run_job(job, resolve(job, [*small, "prefs=off", "dpo=off", *settings]))
    assert not (tmp_path / "runs" / "vae").exists()


def test_a_recipe_refuses_windows_to_validate_on_that_a_later_stage_finds_too_small(
    training_pool: Path, tmp_path: Path, small_preset: None
) -> None:
    held_out = write_pool(tmp_path / "held_out", samples=2, frames=5)
    job = Job("recipe", tmp_path / "runs", data=(training_pool,), held_out=(held_out,), name="tiny")
    small = [f"{stage}.{setting}" for stage in resolve(job, []) for setting in ("crop=64", "steps=1")]
    with pytest.raises(InputError, match=r"asks for 9 frames of 64 pixels, `.*held_out` has 5 of 72"):  # `refine`
        run_job(job, resolve(job, small))
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_trains_an_autoencoder_needs_a_model_on_it(
    training_pool: Path, base: Path, tmp_path: Path, small_preset: None
) -> None:
    """The model of `--init` does not know the new latents, and the stage before does not hand it on."""
    job = Job("recipe", tmp_path / "runs", data=(training_pool,), init=base, name="tiny")
    small = [f"{stage}.{setting}" for stage in RECIPES["tiny"].stages for setting in ("crop=64", "steps=1")]
    with pytest.raises(UsageError, match="stage `cfg` has no `model` to start from") as raised:
        run_job(job, resolve(job, [*small, "base=off"]))
    assert raised.value.hint == "keep `base`, or add `--set vae=off`"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stage", ["vae", "prefs", "refine"])
def test_a_recipe_on_latents_refuses_stages_in_pixels(
    training_pool: Path, base: Path, tmp_path: Path, small_preset: None, stage: str
) -> None:
    latents = run_stage("latents", tmp_path / "latents", "samples=2", data=(training_pool,), init=base)
    job = Job("recipe", tmp_path / "runs", data=(latents,), init=base, name="tiny")
    off = [f"{name}=off" for name in ("vae", "prefs", "dpo", "refine") if name != stage]
    with pytest.raises(UsageError, match=f"stage `{stage}` trains on frames, not on what `{latents}` holds"):
        run_job(job, resolve(job, off))
    assert not (tmp_path / "runs").exists()


def test_what_is_trained_on_is_no_validation(
    training_pool: Path, base: Path, tmp_path: Path, small_preset: None
) -> None:
    same = training_pool.parent / "." / training_pool.name
    with pytest.raises(UsageError, match="is both trained and validated on"):
        run_stage("vae", tmp_path / "run", data=(training_pool,), held_out=(same,))
    held_out, pool = (write_pool(tmp_path / name, samples=2) for name in ("held_out", "pool"))
    spelt_otherwise = str(tmp_path / "other" / ".." / "footage" / "b")
    for folder, sources in ((pool, ["footage/a", "footage/b"]), (held_out, [spelt_otherwise, "c"])):
        record = {"config": {"degradation": {}}, "directory": str(tmp_path), "sources": dict.fromkeys(sources, 9.0)}
        (folder / "pool.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="/footage/b` is both trained and validated on"):
        run_stage("vae", tmp_path / "run", data=(pool,), held_out=(held_out,))
    recipe = Job("recipe", tmp_path / "runs", data=(pool,), held_out=(held_out,), name="tiny")
    with pytest.raises(UsageError, match="/footage/b` is both trained and validated on"):
        run_job(recipe, resolve(recipe, []))
    assert not (tmp_path / "runs").exists()  # not after hours of the stages before
    short = ["batch=1", "crop=32", "steps=1"]
    latents = run_stage("latents", tmp_path / "latents", "samples=1", data=(pool,), init=base)
    pairs = run_stage("prefs", tmp_path / "pairs", "pairs=1", "candidates=2", "rankers=psnr", data=(pool,), init=base)
    for stage, made in (("base", latents), ("dpo", pairs)):
        with pytest.raises(UsageError, match="/footage/b` is both trained and validated on"):
            run_stage(stage, tmp_path / stage, *short, data=(made,), init=base, held_out=(held_out,))
    (pool / "pool.json").write_text(json.dumps({"config": {"degradation": {}}, "sources": 2}))
    with pytest.raises(InputError, match="damaged training data"):
        run_stage("vae", tmp_path / "run", data=(pool,))
    run_stage("vae", tmp_path / "run", "steps=1", "validation_samples=2", data=(training_pool,), held_out=(held_out,))


# The machine


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.EDQUOT, "Quota", "runs/x/a"), NoSpaceError, "no space left to write `runs/x/a`"),
        (OSError(errno.EIO, "I/O error", "runs/x/a"), DuovsrError, "cannot write `runs/x/a`: I/O error"),
        (OSError(errno.EIO, "I/O error", "pool/hq.npy"), InputError, "cannot read `pool/hq.npy`"),
        (FileExistsError(errno.EEXIST, "File exists", "runs"), UsageError, "not a folder: `runs`"),
        (MemoryError("no room"), OutOfMemoryError, "out of memory: no room"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), OutOfMemoryError, r"memory: CUDA out of memory\. Tried"),
        (BrokenProcessPool("died"), OutOfMemoryError, "a worker was killed"),
    ],
)
def test_the_machines_failures_are_told_in_one_line(error: Exception, kind: type[DuovsrError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught, _told(Path("runs"), [Path("pool")]):
        raise error
    assert type(caught.value) is kind and caught.value.hint and "\n" not in str(caught.value)


def test_a_fault_of_the_code_stays_one() -> None:
    with pytest.raises(RuntimeError, match="shape"), _told(Path("runs"), []):
        raise RuntimeError("shape mismatch")


def test_a_checkpoint_that_fails_is_named_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, 2, World(0, 1, torch.device("cpu")))
    checkpoints.save({"step": torch.ones(1)}, 1)
    checkpoints.wait()

    def fails(*_: Any, **__: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(RuntimeError("[enforce fail at inline_container.cc:672]\n. unexpected pos 64 vs 0"))
        return future

    monkeypatch.setattr(checkpoint, "async_save", fails)
    checkpoints.save({"step": torch.ones(1)}, 2)
    with pytest.raises(DuovsrError, match=r"cannot write `.*step_00000002`: \[enforce fail") as caught:
        checkpoints.wait()
    assert caught.value.exit_code == 4
    assert checkpoints.latest() == tmp_path / "step_00000001"
    (tmp_path / "latest").write_text("step_00000001\n")  # as people write it when they go back
    assert checkpoints.latest() == tmp_path / "step_00000001"


def test_a_final_that_fails_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(runs.torch, "save", fails)
    with pytest.raises(DuovsrError, match=r"cannot write `.*final\.pt`"):
        runs.save_atomically({"a": {"w": torch.ones(1)}}, tmp_path / "final.pt", World(0, 1, torch.device("cpu")))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_saves_and_nohup_is_heeded(tmp_path: Path) -> None:
    whole = fit_line(tmp_path / "whole")

    def hang_up(n: int) -> None:
        if n == 4:
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert torch.equal(fit_line(tmp_path / "ignored", hang_up), whole)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(Interrupted, match="interrupted at step 5 of 9; saved") as caught:
            fit_line(tmp_path / "stopped", hang_up)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert caught.value.exit_code == 143
    assert torch.equal(fit_line(tmp_path / "stopped"), whole)


def test_lines_of_the_journal_that_are_damaged_go(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit_line(tmp_path, lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 4 else None)
    journal = tmp_path / "metrics.jsonl"
    journal.write_text(journal.read_text() + "garbage\n\0\0\0\n[]\n")
    fit_line(tmp_path)
    steps = [json.loads(line)["step"] for line in journal.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 8


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_PORT"])
def test_half_of_what_torchrun_tells_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - {missing}:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv(missing, raising=False)
    with pytest.raises(UsageError, match=f"WORLD_SIZE is set, and {missing} is not"), joined("cpu"):
        pass


def test_a_folder_that_another_process_writes_to_is_refused(
    small_preset: None, training_pool: Path, tmp_path: Path
) -> None:
    run, pool = tmp_path / "run", Job("pool", tmp_path / "run", data=(tmp_path / "clips",))
    with sole_owner(run), pytest.raises(UsageError, match="another process is writing to"):
        run_stage("vae", run, data=(training_pool,))
    with sole_owner(run), pytest.raises(UsageError, match="another process is writing to"):
        run_job(pool, resolve(pool, []))
    assert {path.name for path in run.iterdir()} <= {"lock"}
    run_stage("vae", run, data=(training_pool,))
    assert (run / "final.pt").is_file()

"""Commands of `duovsr train`: what they refuse, and that a folder is one command's and never half written."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from duovsr import weights
from duovsr.cli import app
from duovsr.errors import DuovsrError, InputError, UsageError
from duovsr.repository import FILES, Model
from duovsr.train.memory import describe
from duovsr.train.options import ExportConfig
from duovsr.train.runs import load_weights
from duovsr.train.sources import find_sources
from duovsr.train.stages import Job, resolve, run_job
from tests.clips import Clip, write_clip
from tests.conftest import files, run_stage, write_pool

pytestmark = pytest.mark.usefixtures("small_preset")


# Folders


def test_a_folder_is_one_commands(training_pool: Path, base: Path, tmp_path: Path) -> None:
    pool, out = (training_pool,), tmp_path / "run"
    with pytest.raises(InputError, match="asks for 5 frames of 96"):
        run_stage("vae", out, "crop=96", data=pool)
    run_stage("vae", out, data=pool)  # nothing was there but the settings of the first try
    (out / "checkpoints" / "latest").unlink()  # as of a run that was stopped before it had one
    with pytest.raises(UsageError, match="other settings: stage, init"):
        run_stage("base", out, data=pool, init=base)
    with pytest.raises(UsageError, match="other settings: batch"):
        run_stage("vae", out, "batch=4", data=pool)
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "a.mp4", Clip(size=(96, 80)))
    with pytest.raises(UsageError, match=r"holds a run: `settings\.json`"):
        run_job(Job("pool", out, data=(clips,)), resolve(Job("pool", out), ["samples=1"]))
    with pytest.raises(UsageError, match="holds a run"):
        run_job(Job("export", out, init=base), ExportConfig())
    made = tmp_path / "pool"
    small = resolve(Job("pool", made), ["samples=2", "side=48", "frames=5"])
    run_job(Job("pool", made, data=(clips,)), small)
    with pytest.raises(UsageError, match=r"holds a pool: `pool\.json`"):
        run_stage("vae", made, data=pool)
    with pytest.raises(UsageError, match="begun with other sources"):
        run_job(Job("pool", made, data=(tmp_path,)), small)
    with pytest.raises(UsageError, match="other settings: seed"):
        run_job(Job("pool", made, data=(clips,)), replace(small, seed=1))
    model = Job("export", tmp_path / "models" / "tiny", init=base)
    run_job(model, ExportConfig())
    run_job(model, ExportConfig())  # a model is replaced
    with pytest.raises(UsageError, match=r"holds a model: `config\.json`"):
        run_stage("vae", model.out, data=pool)


def test_an_export_that_fails_changes_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def fails_at_the_second(tensors: dict[str, Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    first = Job("export", tmp_path / "tiny", init=base)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", fails_at_the_second)
        with pytest.raises(OSError, match="No space"):
            run_job(first, ExportConfig())
    assert not files(tmp_path) and not files(tmp_path / "tiny")
    run_job(first, ExportConfig())
    before = files(tmp_path), files(tmp_path / "tiny")
    assert set(before[1]) == {"config.json", "manifest.json", *FILES}
    calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", fails_at_the_second)
        with pytest.raises(OSError, match="No space"):
            run_job(first, ExportConfig())
    assert (files(tmp_path), files(tmp_path / "tiny")) == before


def test_the_manifest_of_an_export_comes_last(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[str] = []
    original = os.replace

    def note(source: Path, target: Path) -> None:
        replaced.append(target.name)
        original(source, target)

    monkeypatch.setattr(weights.os, "replace", note)
    run_job(Job("export", tmp_path / "tiny", init=base), ExportConfig())
    assert len(replaced) == 5 and replaced[-1] == "manifest.json"
    Model("tiny", tmp_path / "tiny", "").require_verified()


# What is refused


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"stage": "vae", "name": "tiny"}, "stage `vae` makes no use of NAME"),
        ({"stage": "pool", "preset": "tiny"}, "stage `pool` makes no use of --preset"),
        ({"stage": "pool", "init": Path("run")}, "stage `pool` makes no use of --init"),
        ({"stage": "pool", "held_out": (Path("pool"),)}, "stage `pool` makes no use of --validation"),
        ({"stage": "latents", "held_out": (Path("pool"),)}, "stage `latents` makes no use of --validation"),
        ({"stage": "prefs", "held_out": (Path("pool"),)}, "stage `prefs` makes no use of --validation"),
        ({"stage": "export", "data": (Path("pool"),)}, "stage `export` makes no use of --data"),
        ({"stage": "export", "held_out": (Path("pool"),)}, "stage `export` makes no use of --validation"),
        ({"stage": "recipe", "name": "paper", "preset": "tiny"}, "recipe `paper` makes no use of --preset"),
        ({"stage": "recipe"}, "unknown recipe: `None`"),
        ({"stage": "refine", "preset": "1.3b"}, "trains TinyVAE, which preset `1.3b` does not have"),
    ],
)
def test_flags_without_a_use_are_refused(tmp_path: Path, job: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        resolve(Job(out=tmp_path, **job), [])
    assert caught.value.hint


def test_a_recipe_may_be_given_its_own_preset(tmp_path: Path) -> None:
    assert resolve(Job("recipe", tmp_path, "1.3b", name="paper"), []).keys() >= {"base", "dual"}


def test_devices_are_for_dry_runs_alone(tmp_path: Path, training_pool: Path) -> None:
    command = ["train", "vae", "--data", str(training_pool), "--out", str(tmp_path / "vae"), "--devices", "2"]
    assert "devices: 2" in CliRunner().invoke(app, [*command, "--dry-run"]).stdout
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, UsageError) and "--devices" in str(result.exception)
    assert not (tmp_path / "vae").exists()


def test_one_process_stages_refuse_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = Job("tune", tmp_path / "mine", data=(tmp_path,))
    with pytest.raises(UsageError, match="not for many processes"):
        run_job(job, resolve(job, []))


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        ("prefs", ["candidates=1"], "unsupported candidates: `1`"),
        ("vae", ["seed=-1"], "unsupported seed: `-1`"),
        ("vae", ["learning_rate=nan"], "unsupported learning_rate: `nan`"),
        ("vae", ["statistics_momentum=2"], "unsupported statistics_momentum: `2.0`"),
        ("dual", ["sigma_range=0.9,0.1"], "unsupported sigma_range"),
        ("pool", ["samples=0"], "unsupported samples: `0`"),
        ("pool", ["side=100"], "unsupported side: `100`"),
        ("pool", ["stills=1.5"], "unsupported stills: `1.5`"),
        ("pool", ["speed=0"], "unsupported speed: `0.0`"),
        ("pool", ["skip=0"], "unsupported skip: `0`"),
        ("pool", ["scale_weights=0,0,0,0"], "unsupported scale_weights"),
        ("pool", ["degradation.clean=2"], "unsupported clean: `2.0`"),
        ("pool", ["degradation.first.blur_sigma=3,1"], "unsupported blur_sigma"),
        ("tune", ["side=200"], "unsupported side: `200`"),
        ("tune", ["stills=-1"], "unsupported stills: `-1.0`"),
        ("tune", ["crop=256"], "unsupported crop: `256`"),
        ("tune", ["samples=0"], "unsupported samples: `0`"),
        ("export", ["share=0.5"], "`blend` and `share` go together"),
        ("export", ["blend=run"], "`blend` and `share` go together"),
        ("export", ["only=vae"], "`only` says what is blended"),
        ("recipe", ["base=on"], "not a single value"),
        ("pool", ["degradation.first=off"], "not a single value"),
        ("pool", ["seed.x=1"], "unknown setting"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, stage: str, settings: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve(Job(stage, tmp_path, name="tiny" if stage == "recipe" else None), settings)


@pytest.mark.parametrize("settings", [["batch=6", "accumulate=3"], ["accumulate=3", "batch=6"]])
def test_the_order_of_settings_does_not_matter(tmp_path: Path, settings: list[str]) -> None:
    assert resolve(Job("vae", tmp_path), settings).accumulate == 3


def test_a_dry_run_counts_what_is_made_without_training(tmp_path: Path) -> None:
    for stage, settings, samples in (("latents", ["samples=7"], 7), ("prefs", ["pairs=3", "candidates=4"], 12)):
        job = Job(stage, tmp_path)
        assert describe(job, resolve(job, settings), devices=1)["plan"] == {"samples": samples}


def test_tune_takes_the_only_clip_there_is(base: Path, tmp_path: Path) -> None:
    """A pool would hold it out for validation, as one source in twelve; with `--validation`, so does `tune`."""
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "video9.mp4", Clip(size=(96, 80)))
    assert [source.validation for source in find_sources([clips])] == [True]
    tune = ("samples=4", "side=72", "adversarial_start=1")
    run_stage("tune", tmp_path / "mine", *tune, data=(clips,), init=base)
    assert (tmp_path / "mine" / "model" / "manifest.json").exists()
    held_out = tmp_path / "held_out"
    pool = Job("pool", held_out, data=(clips,))
    run_job(pool, resolve(pool, ["samples=4", "side=72", "validation=true"]))
    with pytest.raises(InputError, match="none is on this side of the validation split"):
        run_stage("tune", tmp_path / "other", *tune, data=(clips,), init=base, held_out=(held_out,))


def test_tune_refuses_before_it_makes_a_pool(base: Path, training_pool: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    write_clip(clips / "a.mp4", Clip(size=(96, 80)))
    held_out = write_pool(tmp_path / "held_out")
    record = {"config": {"degradation": {}}, "sources": {str(clips / "a.mp4"): 9.0}}
    (held_out / "pool.json").write_text(json.dumps(record))
    other = {name: {"w": torch.zeros(1)} for name in ("vae", "model")}
    torch.save(other, tmp_path / "other.pt")
    torch.save({"vae": load_weights(base)["vae"]}, tmp_path / "vae.pt")
    for changed, words in (
        ({"init": tmp_path / "missing"}, "not a finished training run"),
        ({"init": tmp_path / "other.pt"}, "not of preset `small`"),
        ({"init": tmp_path / "vae.pt"}, "has no `model`"),
        ({"held_out": (tmp_path,)}, "not a finished training pool"),
        ({"held_out": (held_out,)}, "a.mp4` is both trained and validated on"),
    ):
        given = {"init": base, "data": (clips,), **changed}
        with pytest.raises(DuovsrError, match=words):
            run_stage("tune", tmp_path / "mine", "samples=4", "side=72", **given)
        assert not (tmp_path / "mine").exists()
    tune = ("tune", tmp_path / "mine", "samples=4", "side=72", "adversarial_start=1")
    run_stage(*tune, data=(clips,), init=base)
    with pytest.raises(UsageError, match="other settings: samples"):
        run_stage(*tune, "samples=5", data=(clips,), init=base)
    with pytest.raises(UsageError, match="other sources"):
        run_stage(*tune, data=(tmp_path,), init=base)

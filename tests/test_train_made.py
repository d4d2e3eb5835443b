"""Cached latents and preference pairs: resumed to the bit, and as many as were asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from duovsr.errors import InputError, TrainError, UsageError
from duovsr.metrics.meter import Unmeasurable
from duovsr.train import cache, stage3
from duovsr.train.data import LatentPool, PairPool
from duovsr.train.draws import Draws
from duovsr.train.options import ExportConfig
from duovsr.train.roles import EncodedFrames
from duovsr.train.stages import Job, run_job
from tests.conftest import files, run_stage

pytestmark = pytest.mark.usefixtures("small_preset")
CPU = torch.device("cpu")
CLIPS = ["pairs=6", "candidates=2", "rankers=psnr"]


class Killed(BaseException):
    """As abrupt as a test can be: nothing catches it."""


def test_latents_resume_where_they_were(
    training_pool: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"data": (training_pool,), "init": base}
    whole = run_stage("latents", tmp_path / "whole", "samples=9", **given)
    original, calls = EncodedFrames.latents, 0

    def dies_in_row_5(self: EncodedFrames, draws: Draws) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return original(self, draws)

    monkeypatch.setattr(cache, "_SAVE_EVERY", 2)
    monkeypatch.setattr(EncodedFrames, "latents", dies_in_row_5)
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        run_stage("latents", killed, "samples=9", **given)
    np.load(killed / "latents.npy", mmap_mode="r+")[4:] = np.nan  # rows that may not have reached the disk
    with pytest.raises(InputError, match="no finished latents"):
        LatentPool(killed)
    with pytest.raises(UsageError, match="other settings: seed"):
        run_stage("latents", killed, "samples=9", "seed=1", **given)
    run_stage("latents", killed, "samples=9", **given)
    assert calls == 6 + 9 - 4
    for name in ("latents.npy", "sharpness.npy"):
        assert files(killed)[name] == files(whole)[name]
    assert files(killed).keys() == files(whole).keys()
    run_stage("latents", killed, "samples=9", **given)  # finished: nothing to do
    assert calls == 6 + 9 - 4


def test_pairs_resume_where_they_were(
    training_pool: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"data": (training_pool,), "init": base}
    whole = run_stage("prefs", tmp_path / "whole", *CLIPS, **given)
    original, calls = stage3._Judge.__call__, 0

    def dies_in_clip_3(self: Any, n: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return original(self, n)

    monkeypatch.setattr(stage3, "_SAVE_EVERY", 2)
    monkeypatch.setattr(stage3._Judge, "__call__", dies_in_clip_3)
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        run_stage("prefs", killed, *CLIPS, **given)
    np.load(killed / "pairs.npy", mmap_mode="r+")[2:] = np.nan
    with pytest.raises(InputError, match="no finished preference pairs"):
        PairPool(killed)
    with pytest.raises(UsageError, match="other settings: candidates"):
        run_stage("prefs", killed, *CLIPS, "candidates=3", **given)
    run_stage("prefs", killed, *CLIPS, **given)
    assert calls == 4 + 6 - 2
    for name in ("pairs.npy", "pairs.json"):
        assert files(killed)[name] == files(whole)[name]
    assert files(killed).keys() == files(whole).keys()
    run_stage("prefs", killed, *CLIPS, **given)
    assert calls == 4 + 6 - 2


class Moody:
    """A ranker that tells the candidates of some clips apart."""

    name, higher_is_better = "moody", True

    def __init__(self, tells: set[int], fails: set[int]) -> None:
        self.tells, self.fails, self.calls = tells, fails, 0

    def __call__(self, output: Tensor, hq: Tensor) -> float:
        clip, candidate = divmod(self.calls, 2)
        self.calls += 1
        if clip in self.fails:
            self.calls += 1  # the clip is given up
            raise Unmeasurable("a black clip")
        return float(candidate) if clip in self.tells else 0.0

    def describe(self) -> dict[str, object]:
        return {}


@pytest.mark.parametrize(
    ("tells", "fails", "pairs", "clips", "notice"),
    [
        ({0, 2, 3, 5, 6, 8}, {1, 4}, 6, 9, None),
        ({0, 20}, {1}, 2, 24, "24 clips gave only 2 of 6 pairs"),
    ],
)
def test_clips_without_a_pair_are_replaced(
    training_pool: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tells: set[int],
    fails: set[int],
    pairs: int,
    clips: int,
    notice: str | None,
) -> None:
    monkeypatch.setattr(stage3, "make_rankers", lambda names, device: [Moody(tells, fails)])
    run_stage("prefs", tmp_path, *CLIPS, data=(training_pool,), init=base)
    record = json.loads((tmp_path / "pairs.json").read_text())
    assert (record["pairs"], len(record["clips"]), record["notice"]) == (pairs, clips, notice)
    assert record["clips"][0] | {"scores": []} == {"scores": [], "rank_sum": [1.0, 0.0], "chosen": 1, "rejected": 0}
    assert record["clips"][1] == {"skipped": "a black clip"}
    pool = PairPool(tmp_path)
    assert pool.pairs.shape[:2] == (pairs, 3) and all(pair.any() for pair in pool.pairs)
    z_lq, chosen, rejected = pool.batch(Draws.of(range(3), seed=0, step=0, part=0, device=CPU))
    assert z_lq.shape == chosen.shape == rejected.shape == (3, *pool.pairs.shape[2:])
    assert not torch.equal(chosen, rejected)


def test_a_student_without_pairs_is_an_error(
    training_pool: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage3, "make_rankers", lambda names, device: [Moody(set(), set())])
    with pytest.raises(TrainError, match="none of 24 clips gave a pair: the rankers see no difference"):
        run_stage("prefs", tmp_path, *CLIPS, data=(training_pool,), init=base)
    assert not (tmp_path / "pairs.json").exists()
    monkeypatch.setattr(stage3, "make_rankers", lambda names, device: [Moody(set(), set(range(24)))])
    with pytest.raises(TrainError, match="a black clip") as caught:
        run_stage("prefs", tmp_path / "black", *CLIPS, data=(training_pool,), init=base)
    assert "noise" not in str(caught.value.hint)  # nobody has seen what the student does


def test_pairs_of_another_autoencoder_are_refused(training_pool: Path, base: Path, tmp_path: Path) -> None:
    pairs = run_stage("prefs", tmp_path / "pairs", *CLIPS, data=(training_pool,), init=base)
    vae = run_stage("vae", tmp_path / "vae", "seed=1", data=(training_pool,))
    other = run_stage("base", tmp_path / "other", data=(training_pool,), init=vae)
    with pytest.raises(UsageError, match="latents of another autoencoder"):
        run_stage("dpo", tmp_path / "refused", data=(pairs,), init=other)
    run_stage("dpo", tmp_path / "dpo", data=(pairs,), init=base)


def test_latents_of_another_autoencoder_are_refused(training_pool: Path, base: Path, tmp_path: Path) -> None:
    latents = run_stage("latents", tmp_path / "latents", "samples=2", data=(training_pool,), init=base)
    other = run_stage("vae", tmp_path / "other", "seed=1", data=(training_pool,))
    with pytest.raises(UsageError, match="latents of another autoencoder"):
        run_stage("base", tmp_path / "refused", data=(latents,), init=other)
    exported = tmp_path / "exported"
    run_job(Job("export", exported, init=base), ExportConfig())
    run_stage("cfg", tmp_path / "cfg", data=(latents,), init=exported)

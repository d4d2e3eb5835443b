"""The record of a job counts as it was written, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from duovsr import Progress, UpscaleOptions, Upscaler
from duovsr.engine import files
from duovsr.engine.identity import digest_of
from duovsr.errors import Interrupted, UsageError
from tests.bicubic import bicubic
from tests.clips import Clip, frame_hashes, write_clip

OPTIONS = UpscaleOptions(scale=2, codec="h264")
DAMAGED = "the record of the unfinished job was damaged: it began anew"


class Crash(Exception):
    """As sudden as an exception can be."""


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_FRAMES", 12)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 75 * 512, 512)))


@pytest.fixture
def whole(clip: Path) -> list[str]:
    """The frames of an uninterrupted run."""
    bicubic().upscale_file(clip, clip.with_name("whole.mp4"), OPTIONS)
    return frame_hashes(clip.with_name("whole.mp4"))


@pytest.fixture
def half(clip: Path) -> Path:
    """The target of a job that crashed in the middle."""

    def crash(progress: Progress) -> None:
        if progress.done > 52:
            raise Crash

    target = clip.with_name("out.mp4")
    with pytest.raises(Crash):
        bicubic().upscale_file(clip, target, OPTIONS, crash)
    assert folder_of(target).is_dir()
    return target


def folder_of(target: Path) -> Path:
    return target.with_name(target.name + ".duovsr")


@pytest.mark.parametrize("plan", [{}, [], None, "x", {"chunk": 4}])
def test_a_damaged_record_begins_anew(half: Path, clip: Path, whole: list[str], plan: object) -> None:
    alter_record(half, plan)
    report = bicubic().upscale_file(clip, half, OPTIONS)
    assert report.reused == 0
    assert DAMAGED in report.notices
    assert DAMAGED not in report.warnings
    assert frame_hashes(half) == whole


@pytest.mark.parametrize("changes", [{"chunk": 0}, {"chunk": "4"}, {"tiles": []}, {"target_size": [64, 48]}])
def test_an_altered_plan_is_not_trusted(half: Path, clip: Path, whole: list[str], changes: dict[str, Any]) -> None:
    alter_record(half, {**read_record(half)["plan"], **changes})
    assert DAMAGED in bicubic().upscale_file(clip, half, OPTIONS).notices
    assert frame_hashes(half) == whole


def test_a_plan_that_cannot_work_fails_and_does_not_wait(half: Path, clip: Path) -> None:
    """What goes wrong in the queues beside the model, as with text for their length, is told."""
    content = {name: value for name, value in read_record(half).items() if name != "sha256"}
    content["plan"]["chunk"] = "4"
    (folder_of(half) / "job.json").write_text(json.dumps({"sha256": digest_of(content), **content}))
    with pytest.raises(TypeError):
        bicubic().upscale_file(clip, half, OPTIONS)


def read_record(target: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder_of(target) / "job.json").read_text())
    return record


def alter_record(target: Path, plan: object) -> None:
    (folder_of(target) / "job.json").write_text(json.dumps({**read_record(target), "plan": plan}))


def test_another_attention_is_refused(
    clip: Path, small_upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer, target = small_upscaler.model.transformer, tmp_path / "out.mp4"
    with pytest.raises(Interrupted):
        small_upscaler.upscale_file(clip, target, OPTIONS, should_stop=lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "backend", "triton")
        with pytest.raises(UsageError, match="had another attention"):
            small_upscaler.upscale_file(clip, target, OPTIONS)
    try:  # torch's, which `auto` is on a CPU
        transformer.attend_with("sdpa", torch.device("cpu"))
        assert small_upscaler.upscale_file(clip, target, OPTIONS).reused > 0
    finally:
        transformer.attend_with("auto", torch.device("cpu"))

"""A job that was stopped between giving its file the final name and its own end: the same command ends it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from duovsr import UpscaleOptions
from duovsr.engine import jobs
from duovsr.engine.batch import Item, upscale_items
from duovsr.errors import UsageError
from tests.bicubic import bicubic
from tests.clips import Clip, frame_hashes, write_clip

OPTIONS = UpscaleOptions(scale=2, codec="h264")
FRAMES = 60


class Crash(Exception):
    """As sudden as an exception can be."""


def crash(*_: object) -> None:
    raise Crash


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return write_clip(tmp_path / "in" / "in.mp4", Clip(pts=range(0, FRAMES * 512, 512), audio=["aac"]))


@pytest.fixture(params=["before the folder goes", "before the other name goes"])
def left(request: pytest.FixtureRequest, clip: Path, tmp_path: Path) -> Path:
    """A target that is in place."""
    target = tmp_path / "out" / "out.mp4"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "before the folder goes":
            patch.setattr(jobs.Job, "remove", crash)
        else:
            link = os.link
            patch.setattr(os, "link", lambda partial, name: crash(link(partial, name)))
        with pytest.raises(Crash):
            bicubic().upscale_file(clip, target, OPTIONS)
    assert sorted(os.listdir(target.parent)) == ["out.mp4", "out.mp4.duovsr"]
    return target


def test_the_same_command_ends_the_job(left: Path, clip: Path) -> None:
    before = frame_hashes(left)
    assert bicubic().upscale_file(clip, left, OPTIONS).reused == FRAMES
    assert frame_hashes(left) == before
    assert os.listdir(left.parent) == ["out.mp4"]
    with pytest.raises(UsageError, match="the target exists"):
        bicubic().upscale_file(clip, left, OPTIONS)


def test_a_folder_of_clips_ends_it(left: Path, clip: Path) -> None:
    item = Item(clip, left)
    assert not item.is_finished
    (outcome,) = upscale_items(bicubic(), [item], OPTIONS)
    assert outcome.report is not None
    assert outcome.report.reused == FRAMES
    assert item.is_finished
    assert os.listdir(left.parent) == ["out.mp4"]


@pytest.mark.parametrize(
    ("changes", "reason"), [({"seed": 1}, r"had another options\.seed"), ({"restart": True}, "the target exists")]
)
def test_other_work_does_not_replace_the_target(left: Path, clip: Path, changes: dict[str, Any], reason: str) -> None:
    content = left.read_bytes()
    with pytest.raises(UsageError, match=reason):
        bicubic().upscale_file(clip, left, UpscaleOptions(**{**vars(OPTIONS), **changes}))
    assert left.read_bytes() == content


def test_another_file_under_the_targets_name_stays(left: Path, clip: Path) -> None:
    left.write_bytes(b"edited")
    with pytest.raises(UsageError, match="the target exists"):
        bicubic().upscale_file(clip, left, OPTIONS)
    assert left.read_bytes() == b"edited"


def test_a_file_that_is_to_be_replaced_is_none_of_the_jobs(clip: Path, tmp_path: Path) -> None:
    """Stopped before the final name is given, a job leaves the old file, which still needs --overwrite."""
    target = tmp_path / "out" / "out.mp4"
    target.write_bytes(b"old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", stop_at(target, os.replace))
        with pytest.raises(Crash):
            bicubic().upscale_file(clip, target, UpscaleOptions(**{**vars(OPTIONS), "overwrite": True}))
    assert target.read_bytes() == b"old"
    with pytest.raises(UsageError, match="the target exists"):
        bicubic().upscale_file(clip, target, OPTIONS)
    bicubic().upscale_file(clip, target, UpscaleOptions(**{**vars(OPTIONS), "overwrite": True}))
    assert len(frame_hashes(target)) == FRAMES
    assert os.listdir(target.parent) == ["out.mp4"]


def stop_at(target: Path, replace: Any) -> Any:
    return lambda partial, name: crash() if name == target else replace(partial, name)


def test_an_image(tmp_path: Path) -> None:
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("RGB", (16, 16)).save(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.Job, "remove", crash)
        with pytest.raises(Crash):
            bicubic().upscale_file(source, target, UpscaleOptions(scale=2))
    bicubic().upscale_file(source, target, UpscaleOptions(scale=2))
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.png"]

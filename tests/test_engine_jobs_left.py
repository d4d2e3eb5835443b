"""A job that was stopped between giving its file the final name and its own end: the same command ends it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from duovsr import UpscaleOptions
from duovsr.engine import files, jobs
from duovsr.engine.batch import Item, upscale_items
from duovsr.errors import DuovsrError, Remark, UsageError
from duovsr.video import output, pictures
from duovsr.video.output import job_folder
from tests.bicubic import bicubic
from tests.clips import Clip, frame_hashes, write_clip

OPTIONS = UpscaleOptions(scale=2, codec="h264")
IMAGES = UpscaleOptions(scale=1, audio=False)
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
            patch.setattr(jobs.Job, "end", crash)
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


@pytest.fixture(params=["job.json", "journal.jsonl", "piece_000000.mkv", "owner", "lock"])
def leave_some(request: pytest.FixtureRequest, clip: Path, tmp_path: Path) -> Callable[[Path, UpscaleOptions], None]:
    """Upscales, and is stopped while it tidies up."""
    unlink = Path.unlink

    def upscale(target: Path, options: UpscaleOptions) -> None:
        with pytest.MonkeyPatch.context() as patch:

            def stop(path: Path, missing_ok: bool = False) -> None:
                unlink(path, missing_ok)
                if path.name == request.param:
                    raise Crash

            patch.setattr(Path, "unlink", stop)
            with pytest.raises(Crash):
                bicubic().upscale_file(clip, target, options)
        assert job_folder(target).exists()

    return upscale


Leave = Callable[[Path, UpscaleOptions], None]


@pytest.mark.parametrize(("name", "options"), [("out.mp4", OPTIONS), ("%04d.png", IMAGES)])
def test_stopped_while_it_tidies_up_the_same_command_ends_the_job(
    leave_some: Leave, clip: Path, tmp_path: Path, name: str, options: UpscaleOptions
) -> None:
    target = tmp_path / "out" / name
    leave_some(target, options)
    before = {path: path.stat().st_mtime_ns for path in target.parent.iterdir() if path.is_file()}
    assert not Item(clip, target).is_finished
    report = bicubic().upscale_file(clip, target, options)
    assert (report.frames, report.reused, report.warnings) == (FRAMES, FRAMES, ())
    assert {path: path.stat().st_mtime_ns for path in target.parent.iterdir()} == before
    with pytest.raises(UsageError, match="the target exists"):
        bicubic().upscale_file(clip, target, options)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"audio": False}, {"restart": True}])
def test_stopped_while_it_tidies_up_a_job_is_over_for_other_work(
    leave_some: Leave, clip: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    target = tmp_path / "out" / "out.mp4"
    leave_some(target, OPTIONS)
    content, other = target.read_bytes(), UpscaleOptions(**{**vars(OPTIONS), **changes})
    with pytest.raises(UsageError, match="the target exists"):
        bicubic().upscale_file(clip, target, other)
    assert target.read_bytes() == content
    assert bicubic().upscale_file(clip, target, replace(other, overwrite=True)).reused == 0
    assert os.listdir(target.parent) == ["out.mp4"]


def test_an_ended_job_whose_output_was_removed_begins_anew(leave_some: Leave, clip: Path, tmp_path: Path) -> None:
    for name, options, gone in [("out.mp4", OPTIONS, "out.mp4"), ("%04d.png", IMAGES, "0007.png")]:
        leave_some(tmp_path / "out" / name, options)
        (tmp_path / "out" / gone).unlink()
        if name == "%04d.png":
            options = replace(options, overwrite=True)
        assert bicubic().upscale_file(clip, tmp_path / "out" / name, options).reused == 0
    assert len(os.listdir(tmp_path / "out")) == 1 + FRAMES


def test_what_was_not_kept_is_told_again(leave_some: Leave, clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "out.mp4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_all_notices", lambda *_: ["lost", Remark("converted")])
        leave_some(target, OPTIONS)
    report = bicubic().upscale_file(clip, target, OPTIONS)
    assert report.warnings == ("lost",)
    assert "converted" in report.notices


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_a_disk_that_does_not_let_it_tidy_up_is_told(clip: Path, tmp_path: Path, number: int) -> None:
    target, unlink = tmp_path / "out" / "out.mp4", Path.unlink
    with pytest.MonkeyPatch.context() as patch:

        def refuse(path: Path, missing_ok: bool = False) -> None:
            if path.name == "owner":
                raise OSError(number, os.strerror(number))
            unlink(path, missing_ok)

        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(DuovsrError, match=r"out\.mp4\.duovsr"):
            bicubic().upscale_file(clip, target, OPTIONS)
    bicubic().upscale_file(clip, target, UpscaleOptions(scale=1, overwrite=True))
    assert os.listdir(target.parent) == ["out.mp4"]


def test_an_image(tmp_path: Path) -> None:
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("RGB", (16, 16)).save(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.Job, "end", crash)
        with pytest.raises(Crash):
            bicubic().upscale_file(source, target, UpscaleOptions(scale=2))
    bicubic().upscale_file(source, target, UpscaleOptions(scale=2))
    assert sorted(os.listdir(tmp_path)) == ["in.png", "out.png"]


def test_marks_and_records_that_are_damaged_are_none_of_the_jobs(left: Path, clip: Path) -> None:
    content, folder = left.read_bytes(), left.with_name("out.mp4.duovsr")
    (folder / "job.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UsageError, match=r"the record of the unfinished job .* is lost or damaged") as caught:
        bicubic().upscale_file(clip, left, OPTIONS)
    assert "--restart" in str(caught.value.hint)
    (folder / "publishing").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UsageError, match="the target exists"):
        bicubic().upscale_file(clip, left, OPTIONS)
    assert left.read_bytes() == content


@pytest.fixture(params=["before the name is given", "before the other name goes"])
def some_images(request: pytest.FixtureRequest, clip: Path, tmp_path: Path) -> Path:
    """The pattern of a job that was stopped when it had named 20 images, or, stamped already, was about to name one."""
    pattern = tmp_path / "out" / "%04d.png"
    at = numbered(pattern, 21 if request.param == "before the name is given" else 20)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "before the name is given":
            patch.setattr(pictures, "give_name", stop_before(at, output.give_name))
        else:
            link = os.link
            patch.setattr(
                os, "link", lambda partial, name: crash(link(partial, name)) if name == at else link(partial, name)
            )
        with pytest.raises(Crash):
            bicubic().upscale_file(clip, pattern, IMAGES)
    assert images(pattern) == [f"{number:04d}.png" for number in range(1, 21)]
    return pattern


def numbered(pattern: Path, number: int) -> Path:
    return pattern.with_name(f"{number:04d}.png")


def stop_before(at: Path, give_name: Callable[..., None]) -> Callable[..., None]:
    return lambda partial, name, overwrite: crash() if name == at else give_name(partial, name, overwrite)


def images(pattern: Path) -> list[str]:
    return sorted(name for name in os.listdir(pattern.parent) if name.endswith(".png"))


def test_images_go_on_over_those_that_the_job_named(some_images: Path, clip: Path) -> None:
    assert bicubic().upscale_file(clip, some_images, IMAGES).notices == ()
    assert sorted(os.listdir(some_images.parent)) == [f"{number:04d}.png" for number in range(1, FRAMES + 1)]


@pytest.mark.parametrize("number", [7, 28, 1000])
def test_an_image_that_the_job_did_not_write_stays(some_images: Path, clip: Path, number: int) -> None:
    mine = numbered(some_images, number)
    mine.write_bytes(b"mine")
    with pytest.raises(UsageError, match=f"the target exists: `.*/{number:04d}.png`"):
        bicubic().upscale_file(clip, some_images, IMAGES)
    assert mine.read_bytes() == b"mine"
    mine.rename(some_images.with_name("mine.png"))
    bicubic().upscale_file(clip, some_images, IMAGES)
    assert images(some_images) == [*(f"{number:04d}.png" for number in range(1, FRAMES + 1)), "mine.png"]


def test_an_image_that_appears_meanwhile_stays(some_images: Path, clip: Path) -> None:
    mine = numbered(some_images, 28)

    def appear(_: object) -> None:
        mine.write_bytes(b"mine")

    with pytest.raises(UsageError, match=r"the target exists: `.*/0028.png`"):
        bicubic().upscale_file(clip, some_images, IMAGES, appear)
    assert mine.read_bytes() == b"mine"


def test_a_target_that_appears_before_the_lock_is_taken_costs_no_work(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process's job had it until then."""
    target = tmp_path / "out" / "out.mp4"
    monkeypatch.setattr(files, "rehearse", lambda *_: target.write_bytes(b"the other's"))
    monkeypatch.setattr(files, "_make_pieces", crash)
    with pytest.raises(UsageError, match="the target exists"):
        bicubic().upscale_file(clip, target, OPTIONS)
    assert os.listdir(target.parent) == ["out.mp4"]
    assert target.read_bytes() == b"the other's"


def test_other_work_does_not_replace_images(some_images: Path, tmp_path: Path) -> None:
    other = write_clip(tmp_path / "in" / "other.mp4", Clip(pts=range(0, 5 * 512, 512)))
    before = {name: (some_images.parent / name).read_bytes() for name in images(some_images)}
    for restart, reason in [(False, "had another source"), (True, "the target exists")]:
        with pytest.raises(UsageError, match=reason):
            bicubic().upscale_file(other, some_images, UpscaleOptions(**{**vars(IMAGES), "restart": restart}))
    assert {name: (some_images.parent / name).read_bytes() for name in images(some_images)} == before
    options = UpscaleOptions(**{**vars(IMAGES), "restart": True, "overwrite": True})
    report = bicubic().upscale_file(other, some_images, options)
    assert report.notices == (f"15 later images were removed: `{some_images}`",)
    assert len(os.listdir(some_images.parent)) == 5


def test_images_of_later_numbers_go_and_folders_stay(clip: Path, tmp_path: Path) -> None:
    """A folder that appears while the images are written is none of them."""
    pattern, thesis = tmp_path / "out" / "%04d.png", tmp_path / "thesis.txt"
    thesis.write_text("mine")
    numbered(pattern, FRAMES + 1).symlink_to(thesis)

    def appear(*_: object) -> None:
        (numbered(pattern, 99) / "thesis").mkdir(parents=True, exist_ok=True)

    options = UpscaleOptions(**{**vars(IMAGES), "overwrite": True})
    report = bicubic().upscale_file(clip, pattern, options, appear)
    assert report.notices == (f"1 later image was removed: `{pattern}`",)
    assert images(pattern) == [*(f"{number:04d}.png" for number in range(1, FRAMES + 1)), "0099.png"]
    assert thesis.read_text() == "mine"
    assert (numbered(pattern, 99) / "thesis").is_dir()


@pytest.mark.parametrize("name", ["publishing", "owner", "lock", "job.json", "journal.jsonl", "piece_000000.mkv"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_work(clip: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out.mp4.duovsr" / name).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"would need a file named `.*{name}`") as caught:
        bicubic().upscale_file(clip, tmp_path / "out.mp4", OPTIONS, lambda _: pytest.fail("it worked"))
    assert caught.value.hint == "move the folder away"
    assert os.listdir(tmp_path / "out.mp4.duovsr") == [name]

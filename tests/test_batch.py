"""Folders of videos: what becomes of each, and that no file stands in another's way."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from duovsr.engine.batch import Item, upscale_items
from duovsr.engine.upscaler import Upscaler
from duovsr.errors import InputError, Interrupted, NoSpaceError, UsageError
from duovsr.options import UpscaleOptions
from tests.clips import Clip, touch, video_times, write_clip
from tests.command_line import Run, running


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_upscaler: Upscaler) -> Iterator[Run]:
    yield from running(monkeypatch, capsys, small_upscaler)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_bad_folders_are_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    run.fails(3, "no videos in", "upscale", folder, tmp_path / "out")
    touch(folder, "a.mp4", "cover.jpg")
    touch(tmp_path, "file")
    run.fails(3, "named `*.mov`", "upscale", folder, tmp_path / "out", "--pattern", "*.mov")
    run.fails(2, "is the source folder", "upscale", folder, folder)
    run.fails(2, "out.mp4", "upscale", folder, tmp_path / "out.mp4")
    run.fails(2, "file", "upscale", folder, tmp_path / "file")
    run.fails(2, "not `-`", "upscale", folder, "-")
    run.fails(2, "nowhere", "upscale", folder, tmp_path / "nowhere" / "out")
    run.fails(2, "suffix: `/x`", "upscale", folder, tmp_path / "out", "--suffix", "/x")
    run.fails(2, "suffix: `%d.png`", "upscale", folder, tmp_path / "out", "--suffix", "%d.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in"]


def test_a_folder_is_upscaled_and_one_bad_file_stops_nothing(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.mp4", "c.mkv", "sub/d.mov"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_clip(folder / name)
    (folder / "b.mp4").write_text("not a video")
    out = tmp_path / "out"
    assert run("upscale", folder, out, "--scale", 1, "--recursive", "--json") == 1
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == ["a.mp4", "c.mkv", "sub/d.mov"]
    assert len(video_times(out / "sub" / "d.mov")) == 12
    report = json.loads(run.out)
    assert report["counts"] == {"done": 3, "failed": 1}
    assert [Path(file["source"]).name for file in report["files"]] == ["a.mp4", "b.mp4", "c.mkv", "d.mov"]
    good, bad = report["files"][:2]
    assert (good["status"], good["frames"], good["output"]) == ("done", 12, str(out / "a.mp4"))
    assert (bad["status"], bad["reason"]) == ("failed", f"not a video, or damaged beyond reading: `{folder / 'b.mp4'}`")
    *_, header, a, b, c, d, total = run.err.splitlines()
    assert header.split() == ["status", "frames", "fps", "file"]
    assert a.split()[:2] == ["done", "12"] and a.endswith(str(folder / "a.mp4"))
    assert b.split()[:3] == ["failed", "-", "-"] and "not a video" in b
    assert total == "3 done, 1 failed"

    (folder / "b.mp4").unlink()
    before = (out / "a.mp4").stat().st_mtime_ns
    monkeypatch.setattr(Upscaler, "from_preset", classmethod(lambda *_, **__: pytest.fail("loaded for nothing")))
    assert run("upscale", folder, out, "--scale", 1, "--recursive") == 0
    assert run.err.splitlines()[-1] == "3 skipped"
    assert (out / "a.mp4").stat().st_mtime_ns == before


def test_a_folder_below_that_cannot_be_read_is_one_failure(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(folder / "a.mp4")
    (folder / "lost+found").mkdir()
    iterdir = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:  # root may read all
        if path.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert run("upscale", folder, tmp_path / "out", "--scale", 1, "--recursive", "--json") == 1
    good, bad = json.loads(run.out)["files"]
    assert (good["status"], bad["status"]) == ("done", "failed")
    assert bad["reason"] == f"cannot read the folder `{folder / 'lost+found'}`: Permission denied"
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["a.mp4"]


def test_overwrite_makes_finished_outputs_again(run: Run, folder: Path, tmp_path: Path) -> None:
    write_clip(folder / "a.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.mp4").write_text("old")
    assert run("upscale", folder, tmp_path / "out", "--scale", 1) == 0
    assert (tmp_path / "out" / "a.mp4").read_text() == "old"
    assert run("upscale", folder, tmp_path / "out", "--scale", 1, "--overwrite") == 0
    assert len(video_times(tmp_path / "out" / "a.mp4")) == 12


@pytest.mark.parametrize(("clip", "code"), [(Clip(size=(63, 47)), 0), (Clip(aspect=Fraction(16, 11)), 1)])
def test_warnings_of_one_file_are_exit_code_1_remarks_are_not(
    run: Run, folder: Path, tmp_path: Path, clip: Clip, code: int
) -> None:
    write_clip(folder / "a.mp4", clip)
    assert run("upscale", folder, tmp_path / "out", "--scale", 1, "--codec", "ffv1", "--suffix", ".mkv") == code
    assert run.err.splitlines()[-1] == "1 done"


def test_a_dry_run_of_a_folder_tells_the_names_and_writes_nothing(run: Run, folder: Path, tmp_path: Path) -> None:
    touch(folder, "a.avi", "b.mp4")
    assert run("upscale", folder, tmp_path / "out", "--dry-run", "--suffix", "_x4") == 0
    assert run.out == (
        f"{folder}/a.avi: {tmp_path}/out/a.avi_x4.mkv (to do)\n{folder}/b.mp4: {tmp_path}/out/b_x4.mp4 (to do)\n"
    )
    assert run("upscale", folder, tmp_path / "out", "--dry-run", "--json") == 0
    assert json.loads(run.out)["counts"] == {"to do": 2}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [("--dry-run",), ()])
def test_what_no_file_can_have_is_refused_before_anything_is_made(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: tuple[str, ...]
) -> None:
    touch(folder, "a.mp4")
    monkeypatch.setattr(Upscaler, "from_preset", classmethod(lambda *_, **__: pytest.fail("loaded for nothing")))
    command = ("upscale", folder, tmp_path / "out", *dry_run)
    run.fails(2, "unknown codec: `nosuch`", *command, "--codec", "nosuch")
    run.fails(2, "unsupported crf for h264: `60`", *command, "--codec", "h264", "--crf", 60)
    run.fails(2, "has no crf", *command, "--codec", "ffv1", "--crf", 20)
    run.fails(2, "has no option `presett`", *command, "--codec", "h264", "--encoder-opt", "presett=slow")
    run.fails(2, "unknown model: `nosuch`", *command, "--model", "nosuch")
    run.fails(2, "no autoencoder `wan`", *command, "--vae", "wan")
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_load_leaves_no_folder(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(folder, "a.mp4")

    def refuse(*_: object, **__: object) -> None:
        raise UsageError("no such device", hint="use cpu")

    monkeypatch.setattr(Upscaler, "from_preset", refuse)
    assert run("upscale", folder, tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_images_are_one_clip_or_with_a_pattern_many(run: Run, folder: Path, tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "10.png"):
        write_clip(folder / name, Clip(pts=[0], codec="png", pix_fmt="rgb24"), "image2")
    assert run("upscale", folder, tmp_path / "out.mkv", "--scale", 1) == 0, run.err
    assert len(video_times(tmp_path / "out.mkv")) == 3
    assert run("upscale", folder, tmp_path / "out", "--scale", 1, "--pattern", "1*.png") == 0, run.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.png", "10.png"]


def test_an_image_named_as_a_pattern_costs_no_other(run: Run, folder: Path, tmp_path: Path) -> None:
    image = write_clip(tmp_path / "in.png", Clip(pts=[0], codec="png", pix_fmt="rgb24"), "image2")
    for name in ("shot1.png", "shot2.png", "shot%d.png"):
        (folder / name).write_bytes(image.read_bytes())
    command = ["upscale", folder, tmp_path / "out", "--scale", 1, "--pattern", "*.png", "--overwrite"]
    for _ in range(2):
        assert run(*command) == 1
        assert run.err.splitlines()[-1] == "2 done, 1 failed"
        target = tmp_path / "out" / "shot%d.png"
        assert f"the output's name is a pattern for many images: `{target}` (rename the input)" in run.err
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["shot1.png", "shot2.png"]


class Stub:
    """Stands for the upscaler: does what it is told for each file."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.sources: list[str] = []

    def upscale_file(self, source: Path, *_: object) -> object:
        self.sources.append(source.name)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


ITEMS = [Item(Path(name), Path(f"out_{name}")) for name in ("a.mp4", "b.mp4", "c.mp4")]


def outcomes(stub: Stub, **arguments: Any) -> list[tuple[str, str]]:
    """Of `ITEMS`, as far as they come."""
    return [
        (outcome.status, outcome.reason)
        for outcome in upscale_items(stub, ITEMS, UpscaleOptions(), **arguments)  # type: ignore[arg-type]
    ]


def test_failures_and_bugs_are_told_in_a_line_and_the_rest_goes_on() -> None:
    stub = Stub(InputError("too bad", hint="try this"), AssertionError("first line\nsecond"), "report")
    expected = [("failed", "too bad (try this)"), ("failed", "a bug: AssertionError: first line"), ("done", "")]
    assert outcomes(stub) == expected


@pytest.mark.parametrize("error", [NoSpaceError("full"), Interrupted("asked"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interruption_stop_the_rest(error: BaseException) -> None:
    stub = Stub("report", error)
    with pytest.raises(type(error)):
        outcomes(stub)
    assert stub.sources == ["a.mp4", "b.mp4"]


def test_a_request_to_stop_is_seen_between_files() -> None:
    stub = Stub("report", "report", "report")
    with pytest.raises(Interrupted, match=r"b\.mp4"):
        outcomes(stub, should_stop=lambda: bool(stub.sources))
    assert stub.sources == ["a.mp4"]


def test_a_new_file_is_reported_before_it_begins() -> None:
    stub, seen = Stub("report", "report", "report"), []
    outcomes(stub, on_progress=lambda item, progress: seen.append((item.source.name, progress.done, len(stub.sources))))
    assert seen == [("a.mp4", 0, 0), ("b.mp4", 0, 1), ("c.mp4", 0, 2)]


def test_an_interrupted_folder_keeps_what_is_done_and_goes_on(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_clip(folder / name)
    upscale_file = Upscaler.upscale_file

    def interrupted_by_hand(*arguments: Any) -> object:
        report = upscale_file(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return report

    monkeypatch.setattr(Upscaler, "upscale_file", interrupted_by_hand)
    command = ["upscale", folder, tmp_path / "out", "--scale", 1, "--json"]
    assert run(*command) == 143
    assert json.loads(run.out)["counts"] == {"done": 1, "to do": 1}
    assert run.err.splitlines()[-1] == f"hint: the same command goes on: duovsr {' '.join(map(str, command))}"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.mp4"]
    monkeypatch.setattr(Upscaler, "upscale_file", upscale_file)
    assert run(*command) == 0
    assert json.loads(run.out)["counts"] == {"skipped": 1, "done": 1}


def test_a_full_disk_is_exit_code_4_with_a_summary(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(folder, "a.mp4", "b.mp4")

    def full(*_: object) -> None:
        raise NoSpaceError("no space left", hint="free some")

    monkeypatch.setattr(Upscaler, "upscale_file", full)
    assert run("upscale", folder, tmp_path / "out") == 4
    assert run.err.splitlines()[-3:] == ["2 to do", "error: no space left", "hint: free some"]

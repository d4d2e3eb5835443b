"""Work that was cut off goes on, and ends in the same frames; nothing in the job's folder is trusted."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from duovsr import Progress, UpscaleOptions, Upscaler
from duovsr.engine import files, jobs, plan
from duovsr.errors import Interrupted, NoSpaceError, UsageError
from duovsr.video import encoder
from tests.clips import Clip, frame_hashes, write_clip

OPTIONS = UpscaleOptions(scale=2, codec="h264")
FRAMES = 75
GARBAGE = b"\xff\xfe\x80"  # no UTF-8


class Crash(Exception):
    """As sudden as an exception can be."""


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_FRAMES", 12)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jobs") / "in.mp4"
    return write_clip(path, Clip(pts=range(0, FRAMES * 512, 512), audio=["aac"], options={"bf": "2"}))


@pytest.fixture(scope="module")
def whole(clip: Path, small_upscaler: Upscaler) -> list[str]:
    """The frames of an uninterrupted run."""
    target = clip.with_name("whole.mp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_FRAMES", 12)
        small_upscaler.upscale_file(clip, target, OPTIONS)
    return frame_hashes(target)


def crash_after(frames: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.done > frames:
            raise Crash

    return report


@pytest.fixture
def half(clip: Path, small_upscaler: Upscaler, tmp_path: Path) -> Path:
    """The target of a job that crashed in its fourth or fifth piece of 13, 12, 12, 12, 12, 12 and 2 frames."""
    target = tmp_path / "out.mp4"
    with pytest.raises(Crash):
        small_upscaler.upscale_file(clip, target, OPTIONS, crash_after(52))
    assert not target.exists()
    return target


def folder_of(target: Path) -> Path:
    return target.with_name(target.name + ".duovsr")


def journaled_frames(target: Path) -> int:
    journal = folder_of(target) / "journal.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return sum(len(json.loads(line.partition(" ")[2])["pts"]) for line in lines)


@pytest.mark.parametrize("frames", [0, 5, 13, 30, 52, 74])
def test_a_crashed_job_goes_on(
    clip: Path, whole: list[str], small_upscaler: Upscaler, tmp_path: Path, frames: int
) -> None:
    target = tmp_path / "out.mp4"
    with pytest.raises(Crash):
        small_upscaler.upscale_file(clip, target, OPTIONS, crash_after(frames))
    done = journaled_frames(target)
    report = small_upscaler.upscale_file(clip, target, OPTIONS)
    assert frame_hashes(target) == whole
    assert report.reused == done
    assert report.reused >= frames - 2 * 12, "at most the piece at work and the one behind it in the queue are lost"
    assert os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("overlap", [None, 8])
@pytest.mark.parametrize("codec", ["ffv1", "hevc", "vp9"])
def test_other_codecs_and_independent_chunks_go_on(
    clip: Path, small_upscaler: Upscaler, tmp_path: Path, codec: str, overlap: int | None
) -> None:
    options = UpscaleOptions(scale=2, codec=codec, overlap=overlap)
    small_upscaler.upscale_file(clip, tmp_path / "whole.mkv", options)
    with pytest.raises(Crash):
        small_upscaler.upscale_file(clip, tmp_path / "out.mkv", options, crash_after(40))
    assert small_upscaler.upscale_file(clip, tmp_path / "out.mkv", options).reused >= 13
    assert frame_hashes(tmp_path / "out.mkv") == frame_hashes(tmp_path / "whole.mkv")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["piece_000000.mkv", "piece_000001.mkv", "piece_000002.mkv", "state_*.pt"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b""), flip_a_bit])
def test_what_is_missing_empty_or_altered_is_made_again(
    half: Path, clip: Path, whole: list[str], small_upscaler: Upscaler, name: str, damage: Callable[[Path], Any]
) -> None:
    for path in folder_of(half).glob(name):
        damage(path)
    report = small_upscaler.upscale_file(clip, half, OPTIONS)
    assert frame_hashes(half) == whole
    assert report.reused < 37


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:-1],
        lambda lines: lines[1:],
        lambda lines: [*lines[:-1], lines[-1][: len(lines[-1]) // 2]],
        lambda lines: ["garbage", *lines, '{"piece": 1}', "[]", '"'],
        lambda lines: [line.replace('"piece": 1', '"piece": 7') for line in lines],
        lambda lines: [line.replace('"pts": [0, 512', '"pts": [0, 513') for line in lines],
        lambda lines: [],
    ],
)
def test_the_journal_is_not_trusted(
    half: Path, clip: Path, whole: list[str], small_upscaler: Upscaler, damage: Callable[[list[str]], list[str]]
) -> None:
    journal = folder_of(half) / "journal.jsonl"
    journal.write_text("\n".join(damage(journal.read_text().splitlines())) + "\n")
    small_upscaler.upscale_file(clip, half, OPTIONS)
    assert frame_hashes(half) == whole


def test_a_torn_line_costs_no_other(half: Path, clip: Path, whole: list[str], small_upscaler: Upscaler) -> None:
    with (folder_of(half) / "journal.jsonl").open("a") as journal:
        journal.write('0123 {"piece": 4, "pts": [1, 2')
    with pytest.raises(Crash):
        small_upscaler.upscale_file(clip, half, OPTIONS, crash_after(70))
    done = journaled_frames(half)
    assert small_upscaler.upscale_file(clip, half, OPTIONS).reused == done > 52
    assert frame_hashes(half) == whole


def test_what_is_not_the_jobs_is_left_alone(half: Path, clip: Path, small_upscaler: Upscaler) -> None:
    (folder_of(half) / "thesis.txt").write_text("mine")
    small_upscaler.upscale_file(clip, half, UpscaleOptions(**{**vars(OPTIONS), "restart": True}))
    assert os.listdir(folder_of(half)) == ["thesis.txt"]


def test_images_that_were_cut_off_go_on(
    clip: Path, small_upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, options = tmp_path / "%03d.png", UpscaleOptions(scale=2)

    def fail(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("duovsr.video.pictures.fsync", lambda path: fail() if (tmp_path / "003.png").exists() else None)
        with pytest.raises(Crash):
            small_upscaler.upscale_file(clip, target, options)
    assert small_upscaler.upscale_file(clip, target, options).reused == FRAMES
    assert len(os.listdir(tmp_path)) == FRAMES
    with pytest.raises(UsageError, match="the target exists"):
        small_upscaler.upscale_file(clip, target, options)


def test_the_recorded_plan_is_used(half: Path, clip: Path, whole: list[str], small_upscaler: Upscaler) -> None:
    """Another day a new plan would be another one, and give other pixels."""
    record = json.loads((folder_of(half) / "job.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.DEFAULT_CHUNK, "cpu", 2 * record["plan"]["chunk"])
        assert small_upscaler.plan(64, 48, OPTIONS).chunk == 2 * record["plan"]["chunk"]
        report = small_upscaler.upscale_file(clip, half, OPTIONS)
    assert json.loads(json.dumps(report.plan.to_json())) == record["plan"]
    assert frame_hashes(half) == whole


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"seed": 1}, "options.seed"), ({"crf": 30}, "encoder.options, options.crf"), ({"chunk": 8}, "options.chunk")],
)
def test_other_settings_are_refused(
    half: Path, clip: Path, small_upscaler: Upscaler, changes: dict[str, Any], name: str
) -> None:
    other = UpscaleOptions(**{**vars(OPTIONS), **changes})
    with pytest.raises(UsageError, match=re.escape(f"had another {name}")) as caught:
        small_upscaler.upscale_file(clip, half, other)
    assert "--restart" in str(caught.value.hint)
    report = small_upscaler.upscale_file(clip, half, UpscaleOptions(**{**vars(other), "restart": True}))
    assert report.reused == 0
    assert not folder_of(half).exists()


def test_another_source_or_model_is_refused(
    half: Path, clip: Path, small_upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copy(clip, tmp_path / "other.mp4")
    flip_a_bit(Path(other))
    with pytest.raises(UsageError, match="had another source"):
        small_upscaler.upscale_file(other, half, OPTIONS)
    monkeypatch.setattr(type(small_upscaler.model), "fingerprint", lambda model: "another")
    with pytest.raises(UsageError, match="had another model"):
        small_upscaler.upscale_file(clip, half, OPTIONS)


def test_two_processes_keep_off_one_job(half: Path, clip: Path, whole: list[str], small_upscaler: Upscaler) -> None:
    lock = folder_of(half) / "lock"
    assert lock.exists(), "left behind by the crash: stale"
    with FileLock(lock), pytest.raises(UsageError, match=r"process \d+ on .* is working on"):
        small_upscaler.upscale_file(clip, half, OPTIONS)
    (folder_of(half) / "owner").write_bytes(GARBAGE)
    with FileLock(lock), pytest.raises(UsageError, match="is working on"):
        small_upscaler.upscale_file(clip, half, OPTIONS)
    small_upscaler.upscale_file(clip, half, OPTIONS)
    assert frame_hashes(half) == whole


def test_a_stop_finishes_the_piece(clip: Path, whole: list[str], small_upscaler: Upscaler, tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 2

    with pytest.raises(Interrupted, match=r"25 frames of .* are done"):
        small_upscaler.upscale_file(clip, target, OPTIONS, should_stop=stop)
    assert not target.exists()
    assert small_upscaler.upscale_file(clip, target, OPTIONS).reused == 25
    assert frame_hashes(target) == whole


def test_a_job_without_a_piece_leaves_nothing(clip: Path, small_upscaler: Upscaler, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        small_upscaler.upscale_file(clip, tmp_path / "out.mp4", OPTIONS, crash_after(0))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["piece", "journal", "state", "output"])
def test_a_full_disk_stops_the_job_and_space_lets_it_go_on(
    clip: Path, whole: list[str], small_upscaler: Upscaler, tmp_path: Path, where: str
) -> None:
    target = tmp_path / "out.mp4"
    with pytest.MonkeyPatch.context() as patch:
        fill_the_disk(patch, where)
        with pytest.raises(NoSpaceError, match="no space left"):
            small_upscaler.upscale_file(clip, target, OPTIONS)
    assert not target.exists()
    assert not list(tmp_path.glob("out.mp4.duovsr/*.part")), "it would go on filling the disk"
    assert small_upscaler.upscale_file(clip, target, OPTIONS).reused >= 13
    assert frame_hashes(target) == whole


def fill_the_disk(patch: pytest.MonkeyPatch, where: str) -> None:
    """From the third piece on, one step of the work finds no space."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls: list[object] = []

    def failing(original: Callable[..., Any], after: int) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            calls.append(arguments)
            if len(calls) > after:
                raise full
            return original(*arguments, **settings)

        return call

    if where == "piece":
        patch.setattr(encoder.VideoEncoder, "_encode", in_disk_errors(failing(encoder.VideoEncoder._encode, 40)))
    elif where == "journal":
        patch.setattr(jobs, "fsync_folder", failing(jobs.fsync_folder, 5))
    elif where == "state":
        patch.setattr(jobs.os, "fsync", failing(os.fsync, 8))  # the second piece's state
    else:
        patch.setattr(files, "join_pieces", in_disk_errors(failing(files.join_pieces, 0)))


def in_disk_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **settings: Any) -> Any:
        with encoder.disk_errors(Path("out.mp4").absolute()):
            return function(*arguments, **settings)

    return call


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    """kill -9 while it works; every time it goes on, redoing at most what was not yet journaled."""
    random.seed(kills)
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 480 * 512, 512), audio=["aac"], options={"bf": "2"}))
    expected, target = tmp_path / "whole.mp4", tmp_path / "out.mp4"
    work(source, expected)
    killed = 0
    for _ in range(kills):
        if target.exists():
            target.unlink()
        said = work(source, target, kill_after=random.randrange(480))
        killed += said is not None
        # A piece is 48 frames and the rest of a chunk; as many as two chunks hold wait for the encoder.
        assert said is None or target.exists() or journaled_frames(target) >= said - 64
    work(source, target)
    assert killed >= kills // 2, "the moments should mostly fall into the work"
    assert frame_hashes(target) == frame_hashes(expected)
    assert not folder_of(target).exists()


def work(source: Path, target: Path, kill_after: int | None = None) -> int | None:
    """How many frames, of all, the process said are done when it was killed, `kill_after` or more; None: it was not."""
    command = [sys.executable, "-m", "tests.job_worker", str(source), str(target), "h264"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if kill_after is not None and not line.startswith("reused") and int(line) >= kill_after:
                process.send_signal(signal.SIGKILL)
                return int(line)
    assert process.returncode == 0
    return None

"""Targets that cannot be, and writing that fails: one line, and an exit code that is not that of an output made."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from pathlib import Path

import av
import pytest

from duovsr.engine.upscaler import Upscaler
from duovsr.errors import DuovsrError
from duovsr.model.one_step import OneStepModel
from duovsr.video import mux
from duovsr.video.codecs import CODECS
from duovsr.video.color import FrameToRgb, RgbToFrame
from tests.clips import Clip, video_times, write_clip
from tests.command_line import Run, running


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_upscaler: Upscaler) -> Iterator[Run]:
    yield from running(monkeypatch, capsys, small_upscaler)


@pytest.mark.parametrize(
    ("name", "excess"),
    [
        ("x" * 243 + ".mp4", 0),
        ("x" * 245 + ".mp4", 1),
        ("ü" * 125 + ".mp4", 6),
        ("x" * 300 + ".mp4", 56),
        ("x" * 300 + "%d.png", 58),
        ("%0255d.png", 4),
    ],
)
def test_names_that_are_too_long(run: Run, tmp_path: Path, name: str, excess: int) -> None:
    source = write_clip(tmp_path / "in.mp4")
    if excess:
        run.fails(2, f"too long by {excess} bytes", "upscale", source, tmp_path / name, "--scale", 1)
        assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
    else:
        assert run("upscale", source, tmp_path / name, "--scale", 1) == 0


def test_a_file_in_place_of_the_jobs_folder(run: Run, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4")
    (tmp_path / "out.mp4.duovsr").write_text("mine")
    run.fails(2, "out.mp4.duovsr", "upscale", source, tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4.duovsr").read_text() == "mine"


def test_a_folder_as_target(run: Run, tmp_path: Path) -> None:
    source, out = write_clip(tmp_path / "in.mp4"), tmp_path / "out"
    out.mkdir()
    run.fails(2, f"the target is a folder: `{out}`", "upscale", source, out)
    assert run.err.splitlines()[1] == "hint: name a file in it"
    images = tmp_path / "images"
    images.mkdir()
    write_clip(images / "1.png", Clip(pts=[0], codec="png", pix_fmt="rgb24"), "image2")
    run.fails(2, f"the target is a folder: `{out}`", "upscale", images, out)
    assert f"{out}/%05d.png" in run.err
    run.fails(2, "unsupported output type", "upscale", images, tmp_path / "new")
    assert f"{tmp_path}/new/%05d.png" in run.err


def test_a_file_that_cannot_be_finished_is_not_done_with_notices(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise av.error.InvalidDataError(1, "no such thing")

    monkeypatch.setattr(mux, "_packets", refuse)
    run.fails(4, "cannot be finished", "upscale", write_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4", "--scale", 1)
    assert not (tmp_path / "out.mp4").exists()
    assert DuovsrError.exit_code == 4


@pytest.mark.parametrize("place", [FrameToRgb, RgbToFrame])
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (av.error.MemoryError(12, "Cannot allocate memory", "sws"), 5, "out of memory: [Errno 12] Cannot allocate"),
        (MemoryError(), 5, "out of memory"),
        (av.error.ExternalError(1, "Generic error", "encode"), 4, "FFmpeg failed on the way to"),
    ],
)
def test_failures_beside_the_model_are_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: type, error: Exception, code: int, words: str
) -> None:
    """An encoder that gives up, and host memory that runs out in one of the threads."""
    calls = count()
    convert = place.__call__

    def fails_later(*arguments: object) -> object:
        if next(calls) == 5:
            raise error
        return convert(*arguments)

    monkeypatch.setattr(place, "__call__", fails_later)
    source = write_clip(tmp_path / "in.mp4")
    run.fails(code, words, "upscale", source, tmp_path / "out.mp4", "--scale", 1)
    assert "hint: " in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_model_that_memory_does_not_hold(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Upscaler, "from_preset", load)
    run.fails(5, "out of memory", "upscale", write_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4")


def test_names_that_are_not_utf_8_are_printed_as_they_are(tmp_path: Path) -> None:
    name = b"caf\xe9.mp4"
    (tmp_path / "in").mkdir()
    try:
        write_clip(tmp_path / "in.mp4").rename(tmp_path / "in" / os.fsdecode(name))
    except OSError:
        pytest.skip("this file system has no such names")
    command = [sys.executable, "-m", "duovsr", "upscale", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"%b: %b (to do)\n" % tuple(os.fsencode(tmp_path / f) + b"/" + name for f in ("in", "out"))


@pytest.mark.parametrize("command", ["--version", "models list", "models list --json", "models path tiny"])
def test_a_full_disk_under_standard_output_is_one_line(command: str) -> None:
    arguments = [sys.executable, "-m", "duovsr", *command.split()]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr == f"error: standard output cannot be written: {os.strerror(errno.ENOSPC)}\n"


def test_a_closed_pipe_is_one_line(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 60 * 512, 512), size=(128, 96)))
    command = [sys.executable, "-m", "duovsr", "upscale", str(source), "-", "--scale", "2", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().splitlines()
    assert process.wait(timeout=60) == 4, errors
    assert [line for line in errors if "frames," not in line] == [
        "error: standard output was closed before the end of the video"
    ]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        ("3.14159265358979323846", Fraction(3.14159265358979323846)),
        ("1/1000", Fraction(1, 1000)),
        ("1000", Fraction(1000)),
        ("1000000007/1000000009", Fraction(1)),
    ],
)
def test_odd_frame_rates(run: Run, tmp_path: Path, fps: str, rate: Fraction, suffix: str) -> None:
    for number in range(3):
        write_clip(tmp_path / f"{number}.png", Clip(pts=[0], codec="png", pix_fmt="rgb24"), "image2")
    output = tmp_path / f"out{suffix}"
    assert run("upscale", tmp_path / "%d.png", output, "--scale", 1, "--fps", fps) == 0, run.err
    assert [float(time) for time in video_times(output)] == pytest.approx([n / rate for n in range(3)], abs=0.6e-3)


def test_a_window_is_handed_to_the_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    upscaler = Upscaler.from_preset()

    def load(*_: object, window: int | None = None, **__: object) -> Upscaler:
        seen.append(window)
        return upscaler

    monkeypatch.setattr(Upscaler, "from_preset", load)
    source = write_clip(tmp_path / "in.mp4")
    assert run("upscale", source, tmp_path / "1.mp4", "--scale", 1, "--window", 640) == 0
    assert run("upscale", source, tmp_path / "2.mp4", "--scale", 1) == 0
    assert seen == [640, None]


def test_a_dry_run_tells_how_the_autoencoder_works_where_nothing_streams(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: OneStepModel
) -> None:
    source = write_clip(tmp_path / "in.mp4")
    assert run("upscale", source, tmp_path / "out.mp4", "--scale", 1, "--dry-run") == 0
    assert "autoencoder" not in run.out
    whole = Upscaler(small_model.with_window(4))  # looks at all frames of a call
    monkeypatch.setattr(Upscaler, "from_preset", lambda *_, **__: whole)
    assert run("upscale", source, tmp_path / "out.mp4", "--scale", 1, "--dry-run") == 0, run.err
    assert "autoencoder: 2 latents at a time, whole frames" in run.out
    assert "5 frames cross-faded with the chunk before" in run.out


def test_help_tells_the_defaults_of_crf(run: Run) -> None:
    assert run("upscale", "--help") == 0
    text = " ".join(run.out.split())
    for name in ("h264", "hevc", "vp9", "av1"):
        codec = CODECS[name]
        assert f"{name} ({codec.crf})" in text or f"{name} (default {codec.crf})" in text
        assert text.index(f"0 to {codec.max_crf} for") < text.index(f"{name} (", text.index("Quality"))
    assert "Of a folder" not in text

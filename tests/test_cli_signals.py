"""Signals during `upscale`: asked once it stops where it goes on from, asked twice it stops now."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from duovsr.engine.upscaler import Upscaler
from duovsr.errors import Interrupted
from tests.clips import Clip, write_clip
from tests.command_line import Run, python_signals, running

STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
DUOVSR = [sys.executable, "-m", "duovsr"]
PROGRESS = "in put.mp4: "  # a line each 5 s, on a machine busy enough


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_upscaler: Upscaler) -> Iterator[Run]:
    yield from running(monkeypatch, capsys, small_upscaler)


@pytest.fixture(autouse=True)
def signals_as_python_has_them() -> Iterator[None]:
    with python_signals():
        yield


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    """A run of the shipped model that is at work on its first piece."""
    command = [*DUOVSR, "upscale", str(source), str(target), "--scale", "2", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (target.with_name(target.name + ".duovsr") / "piece.part").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("number", "code"), STOPS[:2])
def test_one_signal_finishes_the_piece_and_the_hint_goes_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    source = write_clip(tmp_path / "in put.mp4", Clip(pts=range(0, 512 * 120, 512)))
    target = tmp_path / "out.mp4"
    process = start(source, target)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    asked, error, hint = (line for line in errors.splitlines() if not line.startswith(PROGRESS))
    assert asked == "finishing the piece at work; once more to stop now"
    assert error.startswith("error: interrupted: 48 frames of")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in put.mp4", "out.mp4.duovsr"]
    program, *arguments = shlex.split(hint.removeprefix("hint: the same command goes on: "))
    assert program == "duovsr"
    done = subprocess.run([*DUOVSR, *arguments, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["frames"], report["reused"]) == (120, 48)
    assert "48 of them from an earlier run" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in put.mp4", "out.mp4"]


def test_a_second_signal_stops_now_and_leaves_nothing_of_no_use(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in put.mp4", Clip(pts=range(0, 512 * 100, 512), size=(320, 240)))
    process = start(source, tmp_path / "out.mp4")
    assert process.stderr is not None
    said = (line for line in process.stderr if not line.startswith(PROGRESS))
    process.send_signal(signal.SIGINT)
    assert "once more to stop now" in next(said)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    answer = next(said)
    if "once more" in answer:  # again: the second signal fell into the printing of the first
        answer = next(said)
    assert time.monotonic() - asked < 5  # when it has stopped; Python takes its time to leave
    assert answer == "error: interrupted; no output was written\n"
    assert process.wait(timeout=60) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in put.mp4"]  # the first piece was not finished


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_request_is_handed_on_and_its_exit_code_is_the_signals(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    def obey(
        _: Upscaler, source: Path, target: Path, options: object, report: object, stop: Callable[[], bool]
    ) -> None:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        (tmp_path / "out.mp4.duovsr").mkdir()
        raise Interrupted("interrupted: 48 frames are done")

    monkeypatch.setattr(Upscaler, "upscale_file", obey)
    source, target = write_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    assert run("upscale", source, target, "--restart") == code
    command = f"duovsr upscale {source} {target}"  # --restart would begin anew
    assert run.err.splitlines()[1:] == [
        "error: interrupted: 48 frames are done",
        f"hint: the same command goes on: {command}",
    ]


@pytest.mark.parametrize(("number", "code"), STOPS)
@pytest.mark.parametrize("unfinished", [True, False])
def test_a_second_signal_tells_what_is_left(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, unfinished: bool
) -> None:
    def insist(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), number)
        pytest.fail("still at work")

    monkeypatch.setattr(Upscaler, "upscale_file", insist)
    source, target = write_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    if unfinished:
        (tmp_path / "out.mp4.duovsr").mkdir()
    assert run("upscale", source, target) == code
    if unfinished:
        assert run.err.splitlines()[1:] == [
            "error: interrupted",
            f"hint: the same command goes on: duovsr upscale {source} {target}",
        ]
    else:
        assert run.err.splitlines()[1:] == ["error: interrupted; no output was written"]


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_one_signal_is_enough_while_the_model_loads(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    def load(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        pytest.fail("still at work")

    monkeypatch.setattr(Upscaler, "from_preset", load)
    run.fails(
        code, "interrupted; no output was written", "upscale", write_clip(tmp_path / "in.mp4"), tmp_path / "o.mp4"
    )


def test_what_nohup_ignores_stays_ignored(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    upscale_file = Upscaler.upscale_file

    def hang_up(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGHUP)
        return upscale_file(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Upscaler, "upscale_file", hang_up)
    assert run("upscale", write_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4", "--scale", 1) == 0
    assert "once more" not in run.err


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_other_commands_stop_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    cleaned_up = []

    def examine() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            if number != signal.SIGINT:  # a closed terminal may well say so twice
                os.kill(os.getpid(), number)
            cleaned_up.append(True)

    monkeypatch.setattr("duovsr.engine.doctor.examine", examine)
    assert run("doctor") == code
    assert run.err.startswith("error: ")
    assert cleaned_up


@pytest.fixture
def stalling() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a run whose pipes are the test's; whatever becomes of the test, the run ends with it."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: object) -> subprocess.Popen[bytes]:
        command = [*DUOVSR, "upscale", *map(str, arguments), "--scale", "1", "--device", "cpu"]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def leave(process: subprocess.Popen[bytes]) -> int:
    """Asked once it waits for the pipe, asked twice for nothing."""
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    return process.wait(timeout=30)


def test_a_source_that_stalls_can_be_left(tmp_path: Path, stalling: Callable[..., subprocess.Popen[bytes]]) -> None:
    """No piece is ever finished, and the thread that reads cannot be waited for."""
    clip = Clip(codec="rawvideo", pix_fmt="yuv420p", pts=range(40), time_base=Fraction(1, 25), size=(160, 120))
    source = write_clip(tmp_path / "in.y4m", clip, "yuv4mpegpipe")
    target = tmp_path / "out.mkv"
    process = stalling("-", target)
    assert process.stdin is not None
    process.stdin.write(source.read_bytes()[:-1000])
    process.stdin.flush()
    wait_for(lambda: target.with_name("out.mkv.duovsr").exists() or process.poll() is not None)
    assert leave(process) == 130
    assert not target.exists()


def test_a_target_that_stalls_can_be_left(tmp_path: Path, stalling: Callable[..., subprocess.Popen[bytes]]) -> None:
    """Nobody reads, a frame is far more than a pipe holds, and the thread that writes it cannot be waited for."""
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 512 * 200, 512), size=(480, 360)))
    process = stalling(source, "-")
    output, received = process.stdout, bytearray()
    assert output is not None
    os.set_blocking(output.fileno(), False)

    def has_begun() -> bool:
        received.extend(output.read(1000) or b"")
        return len(received) > 1000 or process.poll() is not None  # more than the header, which comes first

    wait_for(has_begun)
    assert leave(process) == 130

"""Paths that the system refuses to look at, and input that is not to be trusted: a line and an exit code."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from duovsr.cli.show import say
from tests.bicubic import bicubic
from tests.clips import Clip, write_clip
from tests.command_line import Run, running

LONG = "x" * 300  # bytes, which `stat` refuses, as it does what lies in a folder that may not be entered


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    yield from running(monkeypatch, capsys, bicubic())


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    path = tmp_path / "loop.mp4"
    path.symlink_to(path.name)
    return path


@pytest.mark.parametrize("name", [f"{LONG}.mp4", f"{LONG}.png", f"{LONG}%d.png", f"{LONG}/a.mp4", f"{LONG}/%d.png"])
def test_sources_that_the_system_does_not_look_at(run: Run, tmp_path: Path, name: str) -> None:
    run.fails(3, LONG, "upscale", tmp_path / name, tmp_path / "out.mp4")
    run.fails(3, LONG, "bench", tmp_path / name)


def test_links_to_themselves(run: Run, tmp_path: Path, loop: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pix_fmt="yuv420p"))
    run.fails(3, "loop.mp4", "upscale", loop, tmp_path / "out.mp4")
    run.fails(3, "loop.mp4", "eval", loop, "--ref", source)
    run.fails(3, "loop.mp4", "eval", source, "--ref", loop)
    run.fails(2, "the target exists", "upscale", source, loop)
    assert run("upscale", source, loop, "--overwrite", "--scale", 1) == 0
    assert not loop.is_symlink()


@pytest.mark.parametrize("folder", [".", "/", ""])
def test_folders_without_a_name_as_targets(run: Run, tmp_path: Path, folder: str) -> None:
    run.fails(2, "the target is a folder", "upscale", write_clip(tmp_path / "in.mp4"), folder)


def test_names_of_models_that_the_system_does_not_look_at(run: Run) -> None:
    run.fails(2, "unknown model", "models", "path", LONG)


def test_what_may_not_be_read_is_an_unreadable_input(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening it tells, whatever `access` says: exit code 3, and not the 2 of a wrong flag."""
    source = write_clip(tmp_path / "in.mp4", Clip(pix_fmt="yuv420p"))
    monkeypatch.setattr("os.access", lambda path, mode: mode & os.W_OK)  # root may read all
    assert run("upscale", source, tmp_path / "out.mp4", "--scale", 1) == 0
    assert run("upscale", source, tmp_path / "out.mp4", "--scale", 1, "--overwrite") == 0
    assert run("eval", source, "--ref", source, "--lq", source) == 2
    assert run("bench", source, "--repeat", 1, "--scale", 1) == 0


def test_forbidden_folders(run: Run, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    secret, source = tmp_path / "secret", write_clip(tmp_path / "in.mp4", Clip(pix_fmt="yuv420p"))
    secret.mkdir()
    write_clip(secret / "a.mp4")
    secret.chmod(0)
    try:
        run.fails(3, "no permission to read", "upscale", secret / "a.mp4", tmp_path / "out.mp4")
        run.fails(3, "cannot read the folder", "upscale", secret, tmp_path / "out")
        run.fails(3, "cannot read the folder", "upscale", secret / "%d.png", tmp_path / "out.mp4")
        run.fails(3, "Permission denied", "eval", secret / "a.mp4", "--ref", source)
        run.fails(3, "cannot read the folder", "eval", secret, "--ref", secret)
    finally:
        secret.chmod(0o700)


def test_a_closed_standard_input(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    run.fails(2, "reads a video from a pipe", "upscale", "-", tmp_path / "out.mp4")


def test_what_comes_through_a_pipe_names_no_other_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg would follow a playlist to the files of this machine, and open the ports that a description names."""
    write_clip(tmp_path / "in.mp4")
    monkeypatch.chdir(tmp_path)
    playlist = io.BytesIO(b"ffconcat version 1.0\nfile 'in.mp4'\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=playlist, isatty=lambda: False))
    run.fails(3, "not a video", "upscale", "-", "out.mp4")


@pytest.mark.parametrize("option", ["--size", "--tile", "--start"])
def test_numbers_without_end(run: Run, tmp_path: Path, option: str) -> None:
    value = {"--size": f"{'9' * 5000}x2", "--tile": "9" * 5000, "--start": f"{'9' * 5000}f"}[option]
    run.fails(2, "unsupported", "upscale", write_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4", option, value)


def test_names_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("error: no such file: `\x1b]0;title\x07\x9b31mred\nerror: another [bold]é.mp4`")
    assert capsys.readouterr().err == "error: no such file: `?]0;title??31mred?error: another [bold]é.mp4`\n"

"""The command line as people meet it: one line, a hint, an exit code, nothing under the final name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from duovsr import cli
from duovsr.engine.upscaler import Upscaler
from duovsr.errors import InputError
from duovsr.weights import FILES, load_model
from tests.clips import Clip, write_clip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_upscaler: Upscaler) -> Run:
    monkeypatch.setattr(Upscaler, "from_preset", classmethod(lambda *_, **__: small_upscaler))
    return Run(monkeypatch, capsys)


class Run:
    """Calls the command line in this process, with a small random model in place of the shipped one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        self._monkeypatch.setattr(sys, "argv", ["duovsr", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        self.out, self.err = self._capsys.readouterr()
        code = exit_info.value.code
        assert isinstance(code, int)
        return code

    def fails(self, code: int, words: str, *arguments: object) -> None:
        assert self(*arguments) == code, self.err
        first, *rest = self.err.strip().splitlines()
        assert first.startswith("error: ")
        assert words in first
        assert all(line.startswith("hint: ") for line in rest)
        assert len(rest) <= 1
        assert "Traceback" not in self.err
        assert self.out == ""


def test_upscale_writes_the_file_and_says_so(run: Run, tmp_path: Path) -> None:
    source, target = write_clip(tmp_path / "in.mp4", Clip(size=(63, 48))), tmp_path / "out.mp4"
    assert run("upscale", source, target, "--scale", 2, "--json") == 0
    assert target.is_file()
    report = json.loads(run.out)
    assert report["frames"] == 12
    assert report["plan"]["target_size"] == [126, 96]
    assert "126x96" in run.err


def test_warnings_give_exit_code_1(run: Run, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(size=(63, 47)))
    assert run("upscale", source, tmp_path / "out.mp4", "--scale", 1) == 1
    assert "note: " in run.err
    assert (tmp_path / "out.mp4").is_file()


def test_dry_run_plans_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4")
    assert run("upscale", source, tmp_path / "out.mp4", "--size", "128x96", "--dry-run") == 0
    for words in ("64x48 -> 128x96", "chunks", "tiles", "memory", "estimate"):
        assert words in run.out
    assert run("upscale", source, tmp_path / "out.mp4", "--dry-run", "--json") == 0
    assert json.loads(run.out)["seconds_per_frame"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scale", "5"], "scale: `5`"),
        (["--scale", "two"], "--scale"),
        (["--size", "12by9"], "size: `12by9`"),
        (["--size", "4000x10"], "4000x10"),
        (["--tile", "9"], "tile: `9`"),
        (["--tile", "-4"], "tile: `-4`"),
        (["--color", "lab"], "lab"),
        (["--strength", "2"], "strength"),
        (["--codec", "divx"], "divx"),
        (["--crf", "99"], "crf"),
        (["--chunk", "0"], "chunk"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_wrong_flags_are_usage_errors(run: Run, tmp_path: Path, flags: list[str], words: str) -> None:
    source = write_clip(tmp_path / "in.mp4")
    run.fails(2, words, "upscale", source, tmp_path / "out.mp4", *flags)
    run.fails(2, words, "upscale", source, tmp_path / "out.mp4", *flags, "--dry-run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


def test_bad_inputs_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    whole = write_clip(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "no_index.mp4").write_bytes(whole[: whole.index(b"moov") - 4])
    for name in ("missing.mp4", "empty.mp4", "text.mp4", "no_index.mp4", "."):
        run.fails(3, name if name != "." else str(tmp_path), "upscale", tmp_path / name, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_bad_targets_are_refused(run: Run, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4")
    before = source.read_bytes()
    run.fails(2, "in.mp4", "upscale", source, source, "--overwrite")
    (tmp_path / "old.mp4").write_text("precious")
    run.fails(2, "old.mp4", "upscale", source, tmp_path / "old.mp4")
    assert (tmp_path / "old.mp4").read_text() == "precious"
    run.fails(2, "nowhere", "upscale", source, tmp_path / "nowhere" / "out.mp4")
    run.fails(2, "out.txt", "upscale", source, tmp_path / "out.txt")
    run.fails(2, tmp_path.name, "upscale", source, tmp_path)
    assert source.read_bytes() == before


def test_no_space_is_exit_code_4(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shutil import _ntuple_diskusage

    monkeypatch.setattr("shutil.disk_usage", lambda _: _ntuple_diskusage(100, 100, 0))
    run.fails(4, "space", "upscale", write_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


def test_interrupt_is_exit_code_130(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Upscaler, "upscale_file", interrupted)
    run.fails(130, "interrupted", "upscale", write_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 512 * 400, 512)))
    command = [sys.executable, "-m", "duovsr", "upscale", str(source), str(tmp_path / "out.mp4"), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".duovsr-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.startswith("error: ")
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


def test_bench_measures_a_clip(run: Run, tmp_path: Path) -> None:
    assert run("bench", write_clip(tmp_path / "in.mp4"), "--scale", 2, "--repeat", 1, "--json") == 0
    result = json.loads(run.out)
    assert result["fps"] > 0
    assert result["load_seconds"] >= 0
    assert result["peak_rss_gib"] > 0
    assert set(result["stage_seconds"]) == {"decode", "model", "color", "encode"}


def test_doctor_is_well_with_the_shipped_model(run: Run) -> None:
    assert run("doctor", "--json") == 0
    report = json.loads(run.out)
    assert report["problems"] == []
    assert all(len(digest) == 64 for digest in report["models"]["tiny"].values())


def test_doctor_finds_an_altered_model_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "vae.safetensors").write_bytes(b"altered")
    monkeypatch.setattr("duovsr.weights.weights_folder", lambda: tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"tiny": dict.fromkeys(FILES, "0" * 64)}))
    assert run("doctor") == 1
    assert "model tiny: `vae.safetensors` is missing or altered" in run.out


@pytest.mark.parametrize("text", ["{}", "[]", "{not json", '{"tiny": {}}', '{"other": {}}'])
def test_a_damaged_manifest_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("duovsr.weights.weights_folder", lambda: tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    assert run("doctor") == 1
    assert "damaged model manifest" in run.out
    with pytest.raises(InputError, match="damaged model manifest"):
        load_model("tiny", torch.device("cpu"), torch.float32)


def test_eval_measures_against_a_truth(run: Run, tmp_path: Path) -> None:
    for folder in ("out", "gt"):
        (tmp_path / folder).mkdir()
        write_clip(tmp_path / folder / "a.mkv", Clip(codec="ffv1", pix_fmt="bgr0", size=(96, 64)))
    flags = ["--metric", "psnr_y", "--metric", "ssim_y", "--json"]
    assert run("eval", tmp_path / "out", "--ref", tmp_path / "gt", *flags) == 0
    assert json.loads(run.out)["means"]["ssim_y"] == pytest.approx(1)
    (tmp_path / "gt" / "a.mkv").unlink()
    assert run("eval", tmp_path / "out", "--ref", tmp_path / "gt", *flags) == 3


def test_version_and_help() -> None:
    for arguments, words in ((["--version"], "0.1.0"), (["--help"], "upscale")):
        done = subprocess.run([sys.executable, "-m", "duovsr", *arguments], capture_output=True, text=True, check=True)
        assert words in done.stdout

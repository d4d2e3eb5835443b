"""The command line as people meet it: one line, a hint, an exit code, nothing under the final name."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch

from duovsr.cli.show import show
from duovsr.engine.upscaler import Upscaler
from duovsr.errors import InputError
from duovsr.options import Progress
from duovsr.progress import Reporter
from duovsr.repository import CONFIG, FILES
from duovsr.weights import load_model
from tests.clips import Clip, write_clip
from tests.command_line import Run, running


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_upscaler: Upscaler) -> Iterator[Run]:
    yield from running(monkeypatch, capsys, small_upscaler)


def test_upscale_writes_the_file_and_says_so(run: Run, tmp_path: Path) -> None:
    source, target = write_clip(tmp_path / "in.mp4", Clip(size=(63, 48))), tmp_path / "out.mp4"
    assert run("upscale", source, target, "--scale", 2, "--json") == 0
    assert target.is_file()
    report = json.loads(run.out)
    assert report["frames"] == 12
    assert report["plan"]["target_size"] == [126, 96]
    assert "126x96" in run.err


def test_warnings_give_exit_code_1_and_remarks_do_not(run: Run, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "odd.mp4", Clip(size=(63, 47)))
    assert run("upscale", source, tmp_path / "odd_out.mp4", "--scale", 1) == 0
    assert "note: 63x47 has an odd side: written as 4:4:4" in run.err
    source = write_clip(tmp_path / "in.mp4", Clip(aspect=Fraction(16, 11)))
    assert run("upscale", source, tmp_path / "out.mkv", "--scale", 1, "--codec", "vp9") == 1
    assert "note: the pixel aspect ratio 16/11 is not kept" in run.err
    assert (tmp_path / "out.mkv").is_file()


def test_dry_run_plans_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4")
    assert run("upscale", source, tmp_path / "out.mp4", "--size", "128x96", "--dry-run") == 0
    for words in ("64x48 -> 128x96", "chunks", "tiles", "memory", "estimate"):
        assert words in run.out
    assert run("upscale", source, tmp_path / "out.mp4", "--start", "2f", "--end", "0.2", "--dry-run") == 0
    assert "frames: about 3\n" in run.out
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
        (["--decoder", "cuda"], "decoder: `cuda`"),
        (["--tile", "9"], "tile: `9`"),
        (["--tile", "-4"], "tile: `-4`"),
        (["--color", "lab"], "lab"),
        (["--strength", "2"], "strength"),
        (["--codec", "divx"], "divx"),
        (["--crf", "99"], "crf"),
        (["--chunk", "0"], "chunk"),
        (["--start", "soon"], "position: `soon`"),
        (["--end", "-1"], "position: `-1`"),
        (["--start", "2", "--end", "1"], "ends before it starts"),
        (["--fps", "24/0"], "frame rate: `24/0`"),
        (["--fps", "film"], "frame rate: `film`"),
        (["--fps", "1e999999999"], "frame rate: `1e999999999`"),
        (["--fps", "0.0009"], "frame rate: `0.0009`"),
        (["--fps", "1001"], "frame rate: `1001`"),
        (["--fps", "24"], "in.mp4"),
        (["--size", "128x96", "--scale", "2"], "--size and --scale"),
        (["--encoder-opt", "preset"], "encoder option: `preset`"),
        (["--encoder-opt", "presto=slow"], "presto"),
        (["--recursive"], "in.mp4"),
        (["--pattern", "*.mp4"], "in.mp4"),
        (["--suffix", "_x4"], "in.mp4"),
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
    for name in ("missing.mp4", "empty.mp4", "text.mp4", "no_index.mp4"):
        run.fails(3, name, "upscale", tmp_path / name, tmp_path / "out.mp4")
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


def test_a_refusal_comes_before_the_model_is_loaded(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Upscaler, "from_preset", classmethod(lambda *_, **__: pytest.fail("loaded")))
    source = write_clip(tmp_path / "in.mp4")
    run.fails(3, "no.mp4", "upscale", tmp_path / "no.mp4", tmp_path / "out.mp4")
    run.fails(2, "in.mp4", "upscale", source, source)
    run.fails(2, "divx", "upscale", source, tmp_path / "out.mp4", "--codec", "divx")
    run.fails(2, "--codec is for videos", "upscale", source, tmp_path / "%d.png", "--codec", "ffv1")


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_pieces_and_images_that_cannot_be_are_refused_before_the_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setattr(Upscaler, "from_preset", classmethod(lambda *_, **__: pytest.fail("loaded")))
    source = write_clip(tmp_path / "in.mp4")
    for start in ("50f", "3"):
        run.fails(2, "starts after the end", "upscale", source, tmp_path / "out.mp4", "--start", start, *flags)
    run.fails(2, "does not fit one image", "upscale", source, tmp_path / "out.png", *flags)
    run.fails(2, "does not fit one image", "upscale", source, tmp_path / "out.png", "--start", "10f", *flags)


def test_images_become_a_video_at_the_rate_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    run("upscale", write_clip(tmp_path / "in.mp4"), tmp_path / "%02d.png", "--scale", 1, "--end", "5f")
    assert run("upscale", tmp_path / "%02d.png", tmp_path / "out.mkv", "--scale", 1, "--fps", "30000/1001") == 0, (
        run.err
    )
    with av.open(str(tmp_path / "out.mkv")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([n * 1001 / 30000 for n in range(5)], abs=0.6e-3)


def test_pipes_carry_the_video_alone(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.y4m", Clip(codec="wrapped_avframe"), "yuv4mpegpipe")
    command = [sys.executable, "-m", "duovsr", "upscale", "-", "-", "--scale", "2", "--device", "cpu"]
    done = subprocess.run(command, input=source.read_bytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"12 frames, 128x96" in done.stderr
    with av.open(io.BytesIO(done.stdout)) as container:
        assert container.format.name == "yuv4mpegpipe"
        assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(128, 96)] * 12


def test_pipes_that_cannot_be_are_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_clip(tmp_path / "in.mp4")
    run.fails(2, "--json", "upscale", source, "-", "--json")
    run.fails(2, "--dry-run", "upscale", "-", tmp_path / "out.mp4", "--dry-run")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout.isatty", lambda: True)
        run.fails(2, "terminal", "upscale", source, "-")
    monkeypatch.setattr("sys.stdout", None)  # `>&-`
    run.fails(4, "standard output is closed", "upscale", source, "-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="no names for open files")
def test_a_source_that_is_there_only_once_is_to_be_piped(run: Run, tmp_path: Path) -> None:
    """A file is opened several times. Of a named pipe the second time would wait, of `<(...)` it would read nothing."""
    os.mkfifo(tmp_path / "pipe")
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb"):
        for source in (tmp_path / "pipe", f"/dev/fd/{reading}"):
            run.fails(3, f"not a regular file: `{source}`", "upscale", source, tmp_path / "out.mkv")
            assert "| duovsr upscale - DST" in run.err
    with write_clip(tmp_path / "in.mp4").open("rb") as file:
        assert run("upscale", f"/dev/fd/{file.fileno()}", tmp_path / "out.mkv", "--scale", 1) == 0, run.err


def test_no_space_is_exit_code_4(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shutil import _ntuple_diskusage

    monkeypatch.setattr("shutil.disk_usage", lambda _: _ntuple_diskusage(100, 100, 0))
    run.fails(4, "space", "upscale", write_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


def test_bench_measures_a_clip(run: Run, tmp_path: Path) -> None:
    run.fails(2, "a scale of its own", "bench", "--random-weights", "--scale", 2)
    assert run("bench", write_clip(tmp_path / "in.mp4"), "--scale", 2, "--repeat", 1, "--json") == 0
    result = json.loads(run.out)
    assert result["fps"] > 0
    assert result["load_seconds"] >= 0
    assert result["peak_rss_gib"] > 0
    stages = ["reading", "copies", "resize", "encode", "transformer", "decode", "color", "writing"]
    assert list(result["stage_seconds"]) == stages
    assert list(result["stage_share"]) == [*stages, "other"]
    assert sum(result["stage_share"].values()) == pytest.approx(1)
    assert all(0 <= share < 1 for share in result["stage_share"].values())
    assert sum(result["stage_seconds"].values()) < result["seconds"]


def test_doctor_is_well_with_the_shipped_model(run: Run) -> None:
    assert run("doctor", "--json") == 0
    report = json.loads(run.out)
    assert report["problems"] == []
    assert set(report["nvidia"]) == {"nvdec", "h264_nvenc", "hevc_nvenc", "av1_nvenc"}
    assert torch.cuda.is_available() or set(report["nvidia"].values()) == {"no"}
    assert all(len(digest) == 64 for digest in report["models"]["tiny"].values())


def test_doctor_finds_an_altered_model_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "vae.safetensors").write_bytes(b"altered")
    monkeypatch.setattr("duovsr.repository.weights_folder", lambda: tmp_path)
    entries = {name: {"size": 7, "sha256": "0" * 64} for name in (CONFIG, *FILES)}
    (tmp_path / "tiny" / "manifest.json").write_text(json.dumps(entries))
    assert run("doctor") == 1
    assert "model tiny: `vae.safetensors` is missing or altered" in run.out


@pytest.mark.parametrize("text", ["{}", "[]", "{not json", '{"config.json": {}}'])
def test_a_damaged_manifest_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("duovsr.repository.weights_folder", lambda: tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "manifest.json").write_text(text)
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
    for folder in ("out", "gt"):
        (tmp_path / folder / "b.mkv").write_text("not a video")
    assert run("eval", tmp_path / "out", "--ref", tmp_path / "gt", *flags) == 1
    assert json.loads(run.out)["means"]["ssim_y"] == pytest.approx(1)
    assert run.err.splitlines()[-1].startswith(f"failed: {tmp_path / 'out' / 'b.mkv'}: not a video")
    assert run("eval", tmp_path / "out", "--ref", tmp_path / "gt", *flags[:-1]) == 1
    assert "mean of 1 of 2 clips" in run.out
    (tmp_path / "gt" / "a.mkv").unlink()
    assert run("eval", tmp_path / "out", "--ref", tmp_path / "gt", *flags) == 3


def test_eval_tells_what_is_damaged(run: Run, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(pts=range(0, 50 * 512, 512), codec="ffv1", pix_fmt="yuv420p"))
    data = source.read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 2 // 3])
    assert run("eval", tmp_path / "cut.mkv", "--ref", tmp_path / "cut.mkv", "--metric", "psnr_y") == 1
    assert f"note: `{tmp_path / 'cut.mkv'}`: damaged input" in run.err
    woven = write_clip(tmp_path / "woven.mkv", Clip(pix_fmt="yuv420p", fields="tff"))
    assert run("eval", woven, "--ref", woven, "--metric", "psnr_y") == 0, "a remark is no warning"
    assert "interlaced" in run.err


def test_version_and_help() -> None:
    for arguments, words in ((["--version"], "0.1.0"), (["--help"], "upscale")):
        done = subprocess.run([sys.executable, "-m", "duovsr", *arguments], capture_output=True, text=True, check=True)
        assert words in done.stdout


def test_progress_elsewhere_than_on_a_terminal_is_lines_of_the_latest_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter([0, 10, 20, 60, 100, 110])
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    reporter = Reporter()
    for done in (0, 500, 510, 550):  # 500 frames were there from an earlier run
        reporter("a.mp4", Progress(done, 600))
    reporter("b.mp4", Progress(0, None))
    reporter("b.mp4", Progress(20, None))
    assert capsys.readouterr().err.splitlines() == [
        "a.mp4: 500 of 600 frames, 50.00 fps, 2 s left",
        "a.mp4: 510 of 600 frames, 25.50 fps, 4 s left",
        "a.mp4: 550 of 600 frames, 1.00 fps, 50 s left",
        "b.mp4: 20 frames, 2.00 fps",
    ]


def test_numbers_are_short_in_lists_too(capsys: pytest.CaptureFixture[str]) -> None:
    show({"fps": 1.23456, "spread": [1.23456, 2.0], "runs": {"notices": [], "size": (320, 180)}}, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "fps: 1.235",
        "spread: 1.235, 2",
        "runs notices: none",
        "runs size: 320, 180",
    ]

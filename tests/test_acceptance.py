"""What a file layer must withstand (the sizes marked slow are the full ones, `make test-slow`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import av
import numpy as np
import pytest

from duovsr import UpscaleOptions
from duovsr.engine import files
from duovsr.errors import NoSpaceError
from tests.bicubic import IDENTITY, bicubic
from tests.clips import Clip, frame_hashes, picture, start_time, video_times, write_clip

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "acceptance.json"


def record(name: str, **figures: float | str) -> None:
    """Keep what a full-size run measured."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps({**known, name: figures}, indent=1, sort_keys=True) + "\n")


def in_process(*arguments: object) -> str:
    command = [sys.executable, "-m", "tests.bicubic", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("size", "seconds"),
    [((160, 120), (6, 60)), pytest.param((854, 480), (60, 600), marks=pytest.mark.slow)],
)
def test_memory_is_flat(tmp_path: Path, size: tuple[int, int], seconds: tuple[int, int]) -> None:
    """Two processes, one clip ten times as long as the other: their usual memory is at most 5 % apart.

    Their peaks, which come from how full the queues happen to be, differ by up to 10 % either way from run to run.
    """
    usual, peaks = [], []
    for length in seconds:
        pts = range(0, 512 * 25 * length, 512)
        pictures = [picture(index, size) for index in range(4)] * (len(pts) // 4 + 1)
        clip = Clip(pts=pts, size=size, pix_fmt="yuv420p", options={"preset": "ultrafast"}, pictures=pictures)
        source = write_clip(tmp_path / f"{length}.mp4", Clip(**{**vars(clip), "audio": ["aac"]}))
        held = in_process("MEMORY", source, tmp_path / f"{length}_out.mp4").split()
        usual.append(int(held[0]) / 2**20)
        peaks.append(int(held[1]) / 2**20)
    if size == (854, 480):
        record(
            "memory",
            mib_of_1_minute=usual[0],
            mib_of_10_minutes=usual[1],
            peak_mib_of_1_minute=peaks[0],
            peak_mib_of_10_minutes=peaks[1],
        )
    assert usual[1] <= 1.05 * usual[0]
    assert peaks[1] <= 1.2 * peaks[0]


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_altered_bytes_crash_nothing(tmp_path: Path, count: int) -> None:
    """`count` variants of each of five clips; a crash or a hang ends the process, with the variant on its last line."""
    for name, codec in [("a.mp4", "libx264"), ("b.mkv", "libx265"), ("c.webm", "libvpx-vp9")]:
        write_clip(tmp_path / name, Clip(codec=codec, pix_fmt="yuv420p", audio=["libopus"]))
    for name, codec in [("d.ts", "mpeg2video"), ("e.avi", "mpeg4")]:
        write_clip(tmp_path / name, Clip(codec=codec, pix_fmt="yuv420p", pts=range(12), time_base=Fraction(1, 25)))
    lines = in_process("FUZZ", tmp_path, count).splitlines()
    assert len(lines) == 5 * count
    refused = sum("refused" in line for line in lines)
    if count == 100:
        record("altered bytes", variants=len(lines), refused=refused, crashed_or_hung=0)
    assert refused < len(lines) // 2, "most damage leaves something to decode"


@pytest.mark.parametrize("minutes", [1, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_irregular_times_do_not_drift(tmp_path: Path, suffix: str, minutes: int) -> None:
    steps = np.random.default_rng(0).integers(300, 2200, 60 * minutes * 12).tolist()  # about 10 frames a second
    pts = [0, *accumulate(steps)]
    pictures = [picture(index, (64, 48)) for index in range(4)] * (len(pts) // 4 + 1)
    clip = Clip(pts=pts, pictures=pictures, options={"preset": "ultrafast"}, audio=["aac"])
    source, target = write_clip(tmp_path / "in.mp4", clip), tmp_path / f"out{suffix}"
    bicubic().upscale_file(source, target, IDENTITY)
    before, after = video_times(source), video_times(target)
    assert len(before) == len(after) == len(pts)
    drift = max(abs(a - b) for a, b in zip(after, before, strict=True))
    offsets = [start_time(path, "video") - start_time(path, "audio") for path in (source, target)]
    if minutes == 60:
        record(f"drift of an hour, {suffix}", frames=len(pts), ms=float(1000 * drift))
    assert drift <= (0 if suffix == ".mp4" else Fraction(1, 2000))
    assert abs(offsets[0] - offsets[1]) <= Fraction(1, 1000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a disk of fixed size")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("left", [1000, 500, 250, 100, 30])
def test_a_disk_that_fills_up_and_is_cleared(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """With so many KiB left the job stops in a piece, in the journal, or when all is put together."""
    monkeypatch.setattr(files, "PIECE_FRAMES", 8)
    monkeypatch.setattr(files, "check_space", lambda *_: None)  # it would refuse at once
    noise = list(np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8))
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 40 * 512, 512), pictures=noise))
    options = UpscaleOptions(scale=1, color="none", codec="ffv1")
    bicubic().upscale_file(source, tmp_path / "whole.mkv", options)
    assert 2**18 < (tmp_path / "whole.mkv").stat().st_size < 2**19, "pieces and output together fill the disk"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2**20 - 1024 * left))
    target = small_disk / "out.mkv"
    if left < 900:
        with pytest.raises(NoSpaceError, match="no space left"):
            bicubic().upscale_file(source, target, options)
        assert not target.exists()
    ballast.unlink()
    bicubic().upscale_file(source, target, options)
    assert frame_hashes(target) == frame_hashes(tmp_path / "whole.mkv")
    assert os.listdir(small_disk) == ["out.mkv"]


def test_a_stream_with_one_keyframe(tmp_path: Path) -> None:
    """Seeking in such an MPEG-TS finds nothing: a job that goes on must not seek."""
    options = {"g": "500", "keyint_min": "500", "sc_threshold": "0", "bf": "8"}
    clip = Clip(pts=range(0, 100 * 512, 512), pix_fmt="yuv420p", options=options)
    source, target = write_clip(tmp_path / "in.ts", clip), tmp_path / "out.mkv"

    def stop(asked: list[bool]) -> bool:
        asked.append(True)
        return len(asked) > 1

    asked: list[bool] = []
    with pytest.raises(Exception, match="interrupted"):
        bicubic().upscale_file(source, target, IDENTITY, should_stop=lambda: stop(asked))
    report = bicubic().upscale_file(source, target, IDENTITY)
    assert report.reused >= files.PIECE_FRAMES
    with av.open(str(target)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 100


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_other_tools_find_no_fault(tmp_path: Path, suffix: str) -> None:
    ffmpeg, mkvmerge = shutil.which("ffmpeg"), shutil.which("mkvmerge")
    if ffmpeg is None and mkvmerge is None:
        pytest.skip("needs ffmpeg or mkvtoolnix")
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 60 * 512, 512), audio=["aac"], options={"bf": "2"}))
    target = tmp_path / f"out{suffix}"
    bicubic().upscale_file(source, target, IDENTITY)
    if ffmpeg is not None:
        command = [ffmpeg, "-v", "error", "-xerror", "-i", str(target), "-f", "null", "-"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    if mkvmerge is not None:
        assert subprocess.run([mkvmerge, "--identify", str(target)], capture_output=True).returncode == 0

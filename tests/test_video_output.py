"""Nothing stands under the final name until it is whole; what cannot be written is refused early."""

from __future__ import annotations

import errno
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import Clip, write_clip
from test_video_roundtrip import copy_clip

from duovsr.errors import DuovsrError, InputError, NoSpaceError, UsageError
from duovsr.video.info import probe
from duovsr.video.output import atomic_output, check_space, check_target, disk_errors, verify_output
from duovsr.video.reader import Frame, VideoReader
from duovsr.video.writer import VideoWriter

NOISE = list(np.random.default_rng(0).integers(0, 256, (8, 192, 256, 3), dtype=np.uint8))


def test_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    with atomic_output(target, overwrite=False) as partial:
        partial.write_bytes(b"whole")
        assert not target.exists()
    assert os.listdir(tmp_path) == ["out.mp4"]
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            write_half(target, error)
    assert os.listdir(tmp_path) == ["out.mp4"]
    assert target.read_bytes() == b"whole"


def write_half(target: Path, error: type[BaseException]) -> None:
    with atomic_output(target, overwrite=True) as partial:
        partial.write_bytes(b"half")
        raise error


def test_target_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"

    def write() -> None:
        with atomic_output(target, overwrite=False) as partial:
            partial.write_bytes(b"ours")
            target.write_bytes(b"theirs")

    with pytest.raises(UsageError, match="the target exists"):
        write()
    assert target.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_check_target(tmp_path: Path) -> None:
    source = tmp_path / "in.mp4"
    source.write_bytes(b"x")
    (tmp_path / "link.mp4").symlink_to(source)
    os.link(source, tmp_path / "hard.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "old.mkv").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.mkv")
    check_target(source, tmp_path / "new.mkv", overwrite=False)
    check_target(source, tmp_path / "old.mkv", overwrite=True)
    check_target(source, tmp_path / "NEW.MOV", overwrite=False)
    for name, overwrite, reason in [
        ("old.mkv", False, "the target exists"),
        ("in.mp4", True, "the target is the source"),
        ("link.mp4", True, "the target is the source"),
        ("hard.mp4", True, "the target is the source"),
        ("folder.mp4", True, "the target is a folder"),
        ("pipe.mkv", True, "not a regular file"),
        ("missing/out.mp4", True, "no such folder"),
        ("out.avi", True, "unsupported output type"),
        ("out", True, "unsupported output type"),
    ]:
        with pytest.raises(UsageError, match=reason) as caught:
            check_target(source, tmp_path / name, overwrite)
        assert str(tmp_path) in str(caught.value)


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UsageError, match="no permission to write"):
        check_target(tmp_path / "in.mp4", tmp_path / "out.mp4", overwrite=False)


def test_check_space(tmp_path: Path) -> None:
    check_space(tmp_path / "out.mp4", 1)
    with pytest.raises(NoSpaceError, match=r"not enough space for .*out.mp4`: about 1073741824.0 GiB needed"):
        check_space(tmp_path / "out.mp4", 2**60)


def test_system_errors_are_named(tmp_path: Path) -> None:
    for code in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(NoSpaceError, match="no space left"), disk_errors(tmp_path / "out.mp4"):
            raise OSError(code, os.strerror(code))
    with pytest.raises(DuovsrError, match=r"cannot write in .*: Input/output error"), disk_errors(tmp_path / "out.mp4"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize("format_name", ["mp4", "matroska", "mov"])
@pytest.mark.parametrize("frames", [1, 8])
def test_full_disk(tmp_path: Path, format_name: str, frames: int) -> None:
    """At whatever point the system says so: the header, a packet, or the very end."""
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 8 * 512, 512), size=(256, 192), pictures=NOISE))
    full = tmp_path / "out.part"
    full.symlink_to("/dev/full")
    info = probe(source)

    def write() -> None:
        with VideoWriter(full, info, 256, 192, codec="h264", crf=0, format_name=format_name) as writer:
            for index in range(frames):
                writer.write(Frame(NOISE[index], index * 512, info.time_base))

    with pytest.raises(NoSpaceError, match="no space left"):
        write()


@pytest.mark.parametrize("moment", ["mux", "close"])
def test_disk_that_fills_late(tmp_path: Path, moment: str) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(audio=["aac"]))

    def write() -> None:
        with (
            atomic_output(tmp_path / "out.mp4", overwrite=False) as partial,
            VideoReader(source) as reader,
            VideoWriter(partial, reader.info, 64, 48, format_name="mp4") as writer,
        ):
            writer._container = _FullDisk(writer._container, moment)
            for frame in reader:
                writer.write(frame)

    with pytest.raises(NoSpaceError, match="no space left"):
        write()
    assert os.listdir(tmp_path) == ["in.mp4"]


class _FullDisk:
    """A container of which one method finds the disk full."""

    def __init__(self, container: Any, method: str) -> None:
        self._container, self._method = container, method

    def __getattr__(self, name: str) -> Any:
        return self._fail if name == self._method else getattr(self._container, name)

    def _fail(self, *args: object) -> None:
        raise av.error.OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"codec": "h265"}, "unknown codec: `h265`"),
        ({"codec": "prores"}, ".mp4 does not hold codec `prores`"),
        ({"pix_fmt": "yuv999p"}, "codec `h264` cannot write pixel format `yuv999p`"),
        ({"pix_fmt": "gbrp"}, "codec `h264` cannot write pixel format `gbrp`"),
        ({"crf": 52}, "unsupported crf for h264: `52`"),
        ({"crf": -1}, "unsupported crf for h264: `-1`"),
        ({"codec": "ffv1", "crf": 3}, "codec `ffv1` has no crf"),
    ],
)
def test_settings_that_cannot_be_written(tmp_path: Path, settings: dict[str, object], reason: str) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0,)))
    with pytest.raises(UsageError, match=reason) as caught:
        copy_clip(source, tmp_path / "out.mp4", **settings)
    assert caught.value.hint
    assert not (tmp_path / "out.mp4").exists()


def test_size_that_the_encoder_refuses(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0,), size=(2, 2)))
    with pytest.raises(UsageError, match="libsvtav1 in mp4 refuses 2x2 in `yuv420p`"):
        copy_clip(source, tmp_path / "out.mp4", codec="av1")
    with pytest.raises(UsageError, match="hevc needs 64 pixels of width, not 2"):
        copy_clip(source, tmp_path / "out.mp4", codec="hevc")


@pytest.mark.parametrize(("codec", "target"), [("libopus", "out.mov"), ("flac", "out.mov")])
def test_sound_that_the_container_refuses_is_said(tmp_path: Path, codec: str, target: str) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(audio=(codec,)))
    with VideoReader(source) as reader:
        frames = list(reader)
        name = "mov"
        with VideoWriter(tmp_path / target, reader.info, 64, 48, format_name=name) as writer:
            for frame in frames:
                writer.write(frame)
    assert any("is not kept: mov does not hold it" in notice for notice in writer.notices)
    assert probe(tmp_path / target).audio_codec is None


@pytest.mark.parametrize("format_name", ["mp4", "matroska"])
def test_frames_before_time_zero_are_refused(tmp_path: Path, format_name: str) -> None:
    info = probe(write_clip(tmp_path / "in.mp4", Clip(pts=(0,))))
    with VideoWriter(tmp_path / "out", info, 256, 192, format_name=format_name) as writer:
        with pytest.raises(InputError, match="the video starts before time zero"):
            writer.write(Frame(NOISE[0], -1, info.time_base))
        writer.write(Frame(NOISE[0], 0, info.time_base))


def test_verification_sees_what_is_missing_or_late(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "in.mp4", Clip(pts=(0, 512, 1024)))
    time_base = Fraction(1, 12800)
    verify_output(path, [0, 512, 1024], time_base)
    with pytest.raises(AssertionError, match="has 3 frames instead of 4"):
        verify_output(path, [0, 512, 1024, 1536], time_base)
    with pytest.raises(AssertionError, match=r"frame 2 of .* is at 2/25 s instead of"):
        verify_output(path, [0, 512, 1025], time_base)

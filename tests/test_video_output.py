"""Nothing stands under the final name until it is whole; what cannot be written is refused early."""

from __future__ import annotations

import errno
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from duovsr.errors import DuovsrError, NoSpaceError, UsageError
from duovsr.options import PIPE
from duovsr.video import output
from duovsr.video.codecs import choose_encoding
from duovsr.video.encoder import VideoEncoder
from duovsr.video.output import check_space, check_target, disk_errors, publish
from duovsr.video.reader import Frame
from tests.clips import Clip, probe, start_time, video_times, write_clip
from tests.pieces import copy_clip

NOISE = list(np.random.default_rng(0).integers(0, 256, (8, 192, 256, 3), dtype=np.uint8))


def test_the_name_comes_after_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut between the two would leave an empty file under the final name."""
    steps: list[str] = []
    for name in ("fsync", "give_name", "fsync_folder"):
        monkeypatch.setattr(output, name, lambda *_, name=name: steps.append(name))
    publish(tmp_path / "partial", tmp_path / "out.mp4", overwrite=False)
    assert steps == ["fsync", "give_name", "fsync_folder"]


@pytest.mark.parametrize("links", [True, False])
def test_target_that_appeared_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    target, partial = tmp_path / "out.mp4", tmp_path / "out.part"
    partial.write_bytes(b"ours")
    publish(partial, target, overwrite=False)
    assert target.read_bytes() == b"ours"
    partial.write_bytes(b"later")
    with pytest.raises(UsageError, match="the target exists"):
        publish(partial, target, overwrite=False)
    assert target.read_bytes() == b"ours"
    publish(partial, target, overwrite=True)
    assert target.read_bytes() == b"later"
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
    with pytest.raises(NoSpaceError, match="no space left to write to standard output"), disk_errors(PIPE):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize("frames", [1, 8])
def test_full_disk_in_a_piece(tmp_path: Path, frames: int) -> None:
    """At whatever point the system says so: the header, a packet, or the very end."""
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 8 * 512, 512), size=(256, 192), pictures=NOISE))
    full = tmp_path / "piece.part"
    full.symlink_to("/dev/full")
    info = probe(source)
    encoding = choose_encoding(info, 256, 192, "mp4", codec="h264", crf=0, pix_fmt=None)

    def write() -> None:
        with VideoEncoder(full, info, 256, 192, encoding) as encoder:
            for index in range(frames):
                encoder.write(Frame(NOISE[index], index * 512, info.time_base))

    with pytest.raises(NoSpaceError, match="no space left"):
        write()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_full_disk_when_putting_together(tmp_path: Path, suffix: str) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(audio=["aac"]))
    (tmp_path / "out.part").symlink_to("/dev/full")
    with pytest.raises(NoSpaceError, match="no space left"):
        copy_clip(source, tmp_path / f"out{suffix}")
    assert not (tmp_path / f"out{suffix}").exists()


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
    with pytest.raises(UsageError, match="libsvtav1 in matroska refuses 2x2 in `yuv420p`"):
        copy_clip(source, tmp_path / "out.mp4", codec="av1")
    with pytest.raises(UsageError, match="hevc needs 64 pixels of width, not 2"):
        copy_clip(source, tmp_path / "out.mp4", codec="hevc")


@pytest.mark.parametrize("codec", ["hevc", "vp9"])
def test_a_pixel_format_that_the_encoder_only_says_it_has(tmp_path: Path, codec: str) -> None:
    """libx265 refuses it with a number that the system has for what a disk cannot do."""
    pix_fmt = {"hevc": "yuva420p", "vp9": "yuva444p"}[codec]
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0,)))
    with pytest.raises(UsageError, match=f"in matroska refuses 64x48 in `{pix_fmt}`") as caught:
        copy_clip(source, tmp_path / "out.mkv", codec=codec, pix_fmt=pix_fmt)
    assert caught.value.hint == "try another --codec or --pix-fmt"


@pytest.mark.parametrize("size", [(65, 16), (72, 24), (1280, 24), (24, 65), (12, 72)])
def test_strips_that_svt_av1_never_ends_with(tmp_path: Path, size: tuple[int, int]) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0,), size=size))
    with pytest.raises(UsageError, match=f"av1 needs both sides above 24 .* none above 64: `{size[0]}x{size[1]}`$"):
        choose_encoding(probe(source), *size, "mp4", codec="av1", crf=None, pix_fmt=None)


@pytest.mark.parametrize("size", [(64, 24), (64, 16), (65, 25), (25, 72), (1280, 25)])
def test_strips_that_svt_av1_takes(tmp_path: Path, size: tuple[int, int]) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=(0, 512), size=size))
    copy_clip(source, tmp_path / "out.mp4", codec="av1")
    assert len(video_times(tmp_path / "out.mp4")) == 2


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9"])
def test_a_very_high_rate(tmp_path: Path, codec: str) -> None:
    """libsvtav1 opens for 240 frames a second at most."""
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(12), time_base=Fraction(1, 3000)))
    copy_clip(source, tmp_path / "out.mp4", codec=codec)
    assert video_times(tmp_path / "out.mp4") == [Fraction(index, 3000) for index in range(12)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_frames_before_time_zero_move_all_streams(tmp_path: Path, suffix: str) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 20 * 512, 512), audio=["aac"]))
    target = tmp_path / f"out{suffix}"
    copied = copy_clip(source, target, earlier=5120)
    assert min(copied.pts) == -5120
    assert start_time(target, "video") == 0
    assert abs(start_time(target, "audio") - start_time(source, "audio") - Fraction(2, 5)) <= Fraction(1, 1000)


# A little after 0, with first steps shorter than the average, where the second packet is the frame shown second.
UNEVEN = (33, 83, 117, 617, 1117, 1184, 1218, 1268, 1318, 1351, 1384, 1401, 1451, 1484, 1517, 1551, 2051, 2101)
UNEVEN += (2134, 2234, 2734)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("start", [1, 33, 120, 1400])
def test_uneven_frames_that_start_late_keep_their_times(tmp_path: Path, start: int, suffix: str) -> None:
    pts = tuple(start - UNEVEN[0] + time for time in UNEVEN)
    clip = Clip(pts=pts, time_base=Fraction(1, 1000), pix_fmt="yuv420p")
    target = tmp_path / f"out{suffix}"
    copy_clip(write_clip(tmp_path / "in.mkv", clip), target, piece_frames=len(pts), codec="h264")
    assert video_times(target) == [Fraction(time, 1000) for time in pts]

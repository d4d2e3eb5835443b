"""The target file: refused early, written under another name, verified, and put in place at once."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av

from duovsr.errors import DuovsrError, NoSpaceError, UsageError
from duovsr.video.images import image_files, is_pattern

CONTAINERS: dict[str, str] = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".webm": "webm"}
JOB_SUFFIX = ".duovsr"  # of the folder beside a target that holds its unfinished work
PUBLISHING = "publishing"  # a mark in that folder: some of a sequence's images have their names
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Target:
    """What is to be written. `format_name` is FFmpeg's container, of a video or of the lossless pieces of images.

    image: one picture; images: a picture a frame, named by a pattern such as `frames/%05d.png`; pipe: standard output.
    """

    path: Path
    kind: Literal["video", "image", "images", "pipe"]
    format_name: str


def target_of(destination: Path, codec: str | None = None) -> Target:
    """What the name asks for. `-` is y4m, or NUT where a codec is asked for. Raises `UsageError`."""
    suffix = destination.suffix.lower()
    if destination == Path("-"):
        return Target(destination, "pipe", "yuv4mpegpipe" if codec is None else "nut")
    if suffix in CONTAINERS:
        return Target(destination, "video", CONTAINERS[suffix])
    if suffix in PICTURES:
        return Target(destination, "images" if is_pattern(destination) else "image", "matroska")
    hint = f"use one of {', '.join(CONTAINERS)}, an image such as out.png, a pattern such as out/%05d.png, or -"
    raise UsageError(f"unsupported output type: `{destination}`", hint=hint)


def check_target(source: Path, destination: Path, overwrite: bool, codec: str | None = None) -> Target:
    """Raises `UsageError` if the output could not, or must not, be put at `destination`. Touches nothing."""
    target = target_of(destination, codec)
    if target.kind == "pipe":
        return target
    folder = destination.parent
    if not folder.is_dir():
        raise UsageError(f"no such folder: `{folder}`", hint="create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"no permission to write in `{folder}`")
    try:
        destination.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long
        raise UsageError(f"cannot write `{destination}`: {error.strerror}") from error
    if target.kind == "images":
        begun = (folder / (destination.name + JOB_SUFFIX) / PUBLISHING).exists()
        taken = None if begun else next(iter(image_files(destination)), None)
    else:
        taken = destination if os.path.lexists(destination) else None
    if taken is not None:
        _check_taken(source, taken, overwrite)
    return target


def _check_taken(source: Path, path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise UsageError(f"the target is a folder: `{path}`", hint="name a file in it")
    if path.exists():
        if source.exists() and path.samefile(source):
            raise UsageError(f"the target is the source: `{path}`", hint="give the output another name")
        if not path.is_file():
            raise UsageError(f"not a regular file: `{path}`")
    if not overwrite:
        raise UsageError(f"the target exists: `{path}`", hint="use --overwrite to replace it")


def check_space(destination: Path, estimated_bytes: int) -> None:
    """Raises `NoSpaceError` if the disk of `destination` has less free than the estimate."""
    free = shutil.disk_usage(destination.parent).free
    if free < estimated_bytes:
        raise NoSpaceError(
            f"not enough space for `{destination}`: about {_readable(estimated_bytes)} needed, {_readable(free)} free",
            hint="free some space, or write to another disk",
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the system's refusals to write `path` into `NoSpaceError` and `DuovsrError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or write to another disk"
            raise NoSpaceError(f"no space left in `{path.parent}`", hint=hint) from error
        raise DuovsrError(f"cannot write in `{path.parent}`: {error.strerror}") from error


def publish(partial: Path, destination: Path, overwrite: bool) -> None:
    """Give the partial file, on the same disk, its final name, at once and with all data on the disk.

    Of two runs without `overwrite` one is refused. Raises `NoSpaceError`, and `UsageError` where the target has come
    into being meanwhile.
    """
    taken = UsageError(f"the target exists: `{destination}`", hint="use --overwrite to replace it")
    with disk_errors(destination):
        fsync(partial)
        if overwrite:
            os.replace(partial, destination)
        else:
            try:
                os.link(partial, destination)  # unlike a rename, it fails where the name is taken
                partial.unlink()
            except FileExistsError:
                raise taken from None
            except OSError as error:  # a file system without hard links
                if os.path.lexists(destination):
                    raise taken from error
                os.replace(partial, destination)
        fsync_folder(destination.parent)


def fsync(path: Path) -> None:
    """All data of a file is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """The names in a folder are on the disk."""
    if os.name != "posix":  # Windows can neither open nor sync a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_output(path: Path, expected_pts: Sequence[int], time_base: Fraction) -> None:
    """Demuxes the finished file and raises `AssertionError` unless it shows as many frames, and when, as expected.

    Times may be off by the rounding to the container's own clock (1 ms in mkv), never by more.
    """
    with av.open(str(path.absolute()), "r", metadata_errors="surrogateescape") as container:
        stream = container.streams.video[0]
        tick = stream.time_base or Fraction(0)
        shown = (packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard)
        found = sorted(-1 if pts is None else pts for pts in shown)
    if len(found) != len(expected_pts):
        raise AssertionError(f"`{path}` has {len(found)} frames instead of {len(expected_pts)}")
    for index, (pts, expected) in enumerate(zip(found, sorted(expected_pts), strict=True)):
        if abs(pts * tick - expected * time_base) > tick / 2:
            raise AssertionError(f"frame {index} of `{path}` is at {pts * tick} s instead of {expected * time_base} s")


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"

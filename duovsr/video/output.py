"""The target file: refused early, written under another name, verified, and put in place at once."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av

from duovsr.errors import DuovsrError, NoSpaceError, UsageError

CONTAINERS: dict[str, str] = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".webm": "webm"}


def container_format(destination: Path) -> str:
    """FFmpeg's name of the container that the suffix asks for. Raises `UsageError`."""
    suffix = destination.suffix.lower()
    if suffix not in CONTAINERS:
        raise UsageError(f"unsupported output type: `{destination}`", hint=f"use one of {', '.join(CONTAINERS)}")
    return CONTAINERS[suffix]


def check_target(source: Path, destination: Path, overwrite: bool) -> None:
    """Raises `UsageError` if the output could not, or must not, be put at `destination`. Touches nothing."""
    container_format(destination)
    folder = destination.parent
    if not folder.is_dir():
        raise UsageError(f"no such folder: `{folder}`", hint="create it first")
    try:
        destination.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long
        raise UsageError(f"cannot write `{destination}`: {error.strerror}") from error
    if destination.is_dir():
        raise UsageError(f"the target is a folder: `{destination}`", hint="name a file in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"no permission to write in `{folder}`")
    if not os.path.lexists(destination):
        return
    if destination.exists():
        if source.exists() and destination.samefile(source):
            raise UsageError(f"the target is the source: `{destination}`", hint="give the output another name")
        if not destination.is_file():
            raise UsageError(f"not a regular file: `{destination}`")
    if not overwrite:
        raise UsageError(f"the target exists: `{destination}`", hint="use --overwrite to replace it")


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


@contextmanager
def atomic_output(destination: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a partial path next to `destination`; on success it takes the final name, on failure it is removed.

    When the final name appears, all data is on the disk. Raises `NoSpaceError`, and `UsageError` if the target has
    come into being meanwhile.
    """
    with disk_errors(destination):
        # A name of its own for every run, made anew: two runs at one target must not write one file.
        descriptor, name = tempfile.mkstemp(prefix=".duovsr-", suffix=".part", dir=destination.parent)
        os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        with disk_errors(destination):
            os.chmod(partial, 0o666 & ~_umask())  # mkstemp's file is its owner's alone
            _fsync(partial, os.O_RDWR)
            _publish(partial, destination, overwrite)
            if os.name == "posix":  # Windows can neither open nor sync a folder
                _fsync(destination.parent, os.O_RDONLY)
    except BaseException:  # an interrupt too must not leave a partial file
        partial.unlink(missing_ok=True)
        raise


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


def _publish(partial: Path, destination: Path, overwrite: bool) -> None:
    """Give the partial file its final name, at once; of two runs without --overwrite, one is refused."""
    taken = UsageError(f"the target exists: `{destination}`", hint="use --overwrite to replace it")
    if overwrite:
        os.replace(partial, destination)
        return
    try:
        os.link(partial, destination)  # unlike a rename, it fails where the name is taken
        partial.unlink()
    except FileExistsError:
        raise taken from None
    except OSError as error:  # a file system without hard links
        if os.path.lexists(destination):
            raise taken from error
        os.replace(partial, destination)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"

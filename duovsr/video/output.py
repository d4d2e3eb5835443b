"""The target file: refused early, written under another name, verified, and put in place at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from duovsr.errors import DuovsrError, NoSpaceError, UsageError, says_no_space
from duovsr.options import PIPE, UpscaleOptions
from duovsr.video.images import image_files, is_pattern, is_sequence, numbered_name

CONTAINERS: dict[str, str] = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".webm": "webm"}
JOB_SUFFIX = ".duovsr"  # of the folder beside a target that holds its unfinished work
PUBLISHING = "publishing"  # in that folder: the stamps of finished files that have their names, or were about to
ENDED = "ended"  # what that file becomes once they all have: the rest of the folder is only to be deleted


@dataclass(frozen=True)
class PictureFormat:
    """An encoder with its pixel formats: for 8 bit and, where it holds more, for 16."""

    encoder: str
    opaque: tuple[str, ...]
    translucent: tuple[str, ...] = ()
    holds_aspect: bool = True  # of the pixels

    @property
    def bit_depth(self) -> int:
        return 8 * len(self.opaque)


_TIFF = PictureFormat("tiff", ("rgb24", "rgb48le"), ("rgba", "rgba64le"))
_JPEG = PictureFormat("mjpeg", ("yuvj444p",))

FORMATS: dict[str, PictureFormat] = {  # of images
    ".png": PictureFormat("png", ("rgb24", "rgb48be"), ("rgba", "rgba64be")),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": PictureFormat("libwebp", ("bgra",), ("bgra",), holds_aspect=False),
    ".bmp": PictureFormat("bmp", ("bgr24",), holds_aspect=False),  # its fourth byte is one that readers ignore
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
}


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
    if destination == PIPE:
        return Target(destination, "pipe", "yuv4mpegpipe" if codec is None else "nut")
    if suffix in CONTAINERS:
        return Target(destination, "video", CONTAINERS[suffix])
    if suffix in FORMATS:
        return Target(destination, "images" if is_pattern(destination) else "image", "matroska")
    pattern = "out/%05d.png" if suffix else destination / "%05d.png"  # a folder may be meant
    hint = f"use one of {', '.join(CONTAINERS)}, an image such as out.png, a pattern such as {pattern}, or -"
    raise UsageError(f"unsupported output type: `{destination}`", hint=hint)


def check_target(
    source: Path, destination: Path, overwrite: bool, codec: str | None = None, *, restart: bool = False
) -> Target:
    """Raises `UsageError` if the output could not, or must not, be put at `destination`. Touches nothing.

    Images that a job named before it was stopped may be there, unless other work begins: by `restart`, or from a pipe.
    """
    if destination == PIPE:
        return target_of(destination, codec)
    if os.path.isdir(destination):
        pictures = f"name the images in it, such as {destination / '%05d.png'}"
        hint = pictures if is_sequence(source) else "name a file in it"
        raise UsageError(f"the target is a folder: `{destination}`", hint=hint)
    _check_place(destination)
    target = target_of(destination, codec)
    own: frozenset[str] = frozenset()
    if target.kind != "images":
        taken = [destination] if os.path.lexists(destination) else []
    else:
        _check_length(destination, numbered_name(destination, 1).name)
        taken = image_files(destination)
        if not restart and source != PIPE:
            own = stamps_left(destination)
    if target.kind != "video" and os.path.isdir(source) and destination.parent.samefile(source):
        message = f"the target is in the folder of the source: `{destination}`"
        raise UsageError(message, hint="write to another folder, or give the source as a pattern")
    _check_taken(source, taken, overwrite, own)
    return target


def _check_place(destination: Path) -> None:
    folder, job = destination.parent, job_folder(destination)
    if not os.path.isdir(folder):
        raise UsageError(f"no such folder: `{folder}`", hint="create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"no permission to write in `{folder}`")
    _check_length(destination, job.name)
    if os.path.lexists(job) and not os.path.isdir(job):
        raise UsageError(f"unfinished work would need a folder named `{job}`", hint="move the file of that name away")


def _check_length(destination: Path, name: str) -> None:
    """`name` is one that the work on `destination` needs beside it."""
    if not hasattr(os, "pathconf"):  # Windows
        return
    most = os.pathconf(destination.parent, "PC_NAME_MAX")
    if (length := len(os.fsencode(name))) > most:
        message = f"the name is too long by {length - most} bytes: `{destination}`"
        raise UsageError(message, hint=f"the longest name beside it is `{name}`; {most} bytes is the most")


def _check_taken(source: Path, taken: Sequence[Path], overwrite: bool, own: frozenset[str]) -> None:
    sources = {_file_id(path) for path in image_files(source) or [source] if os.path.exists(path)}
    for path in taken:
        if os.path.isdir(path):
            raise UsageError(f"the target is a folder: `{path}`", hint="name a file in it")
        if os.path.exists(path):
            if _file_id(path) in sources:
                raise UsageError(f"the target is the source: `{path}`", hint="give the output another name")
            if not os.path.isfile(path):
                raise UsageError(f"not a regular file: `{path}`")
        if not overwrite and not is_stamped(path, own):
            raise UsageError(f"the target exists: `{path}`", hint="use --overwrite to replace it")


def _file_id(path: Path) -> tuple[int, int]:
    """Equal for all names and links of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def job_folder(destination: Path) -> Path:
    """Where the unfinished work on a target lies, if there is any."""
    return destination.parent / f"{destination.name}{JOB_SUFFIX}"  # the names of `.` and `/` are empty


def stamp(path: Path) -> str:
    """Tells a finished file, under whichever name, from others."""
    status = path.stat()
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def is_stamped(path: Path, stamps: frozenset[str]) -> bool:
    """Whether the file is one of those that have the stamps."""
    return os.path.isfile(path) and stamp(path) in stamps


def stamps_left(destination: Path) -> frozenset[str]:
    """Of the files that a job, stopped before its end, had named or was about to. What is damaged matches no file."""
    marks = [job_folder(destination) / name for name in (PUBLISHING, ENDED)]
    return frozenset(
        line for mark in marks if os.path.isfile(mark) for line in mark.read_text(errors="replace").splitlines()
    )


def is_left_behind(destination: Path) -> bool:
    """Whether the target is a file that a job had verified, and which was stopped between naming it and its own end."""
    return is_stamped(destination, stamps_left(destination))


def may_replace(destination: Path, options: UpscaleOptions) -> bool:
    """Whether the target may be there already. `restart` begins other work, which needs `overwrite`."""
    return options.overwrite or (is_left_behind(destination) and not options.restart)


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
    """Turns the system's refusals to write `path`, `-` for standard output, into `NoSpaceError` and `DuovsrError`."""
    try:
        yield
    except OSError as error:
        place = "to standard output" if path == PIPE else f"in `{path.parent}`"
        if says_no_space(error):
            hint = "free some space, or write to another disk"
            raise NoSpaceError(f"no space left to write {place}", hint=hint) from error
        raise DuovsrError(f"cannot write {place}: {error.strerror}") from error


def publish(partial: Path, destination: Path, overwrite: bool) -> None:
    """Give the partial file, on the same disk, its final name, at once and with all data on the disk.

    Of two runs without `overwrite` one is refused. Raises `NoSpaceError`, and `UsageError` where the target has come
    into being meanwhile.
    """
    with disk_errors(destination):
        fsync(partial)
        give_name(partial, destination, overwrite)
        fsync_folder(destination.parent)


def give_name(partial: Path, destination: Path, overwrite: bool) -> None:
    """Rename a file. Raises `UsageError` where the name is taken and not to `overwrite`."""
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


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"

"""Opening any file, or pipe, that FFmpeg reads, and finding the video in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from duovsr.errors import DuovsrError, InputError, UsageError
from duovsr.options import PIPE

_CLOCK_RATE = 1000  # frames a second
_NO_TIMESTAMPS = 0x80  # AVFMT_NOTIMESTAMPS of FFmpeg


def open_input(path: Path) -> InputContainer:
    """The opened container of any file FFmpeg reads; `-` is standard input. Raises `InputError`."""
    if os.path.isdir(path):
        raise InputError(f"a folder, not a video: `{path}`")
    # A named pipe or `<(...)`, which is there only once.
    if path != PIPE and os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"not a regular file: `{path}`", hint="pipe it: ... | duovsr upscale - DST")
    try:
        if path == PIPE:
            return _open_pipe()
        # An absolute path cannot be taken for a protocol ("clip: 1.mp4"), and no name for a pattern ("50%d.jpg").
        # Metadata bytes survive whatever they are.
        options = {"pattern_type": "none"}
        container = av.open(str(path.absolute()), "r", options=options, metadata_errors="surrogateescape")
    except av.error.FileNotFoundError as error:
        raise InputError(f"no such file: `{path}`") from error
    except av.error.PermissionError as error:
        raise InputError(f"no permission to read `{path}`") from error
    except av.error.FFmpegError as error:
        raise _unreadable(path) from error
    if container.format.name == "tty":  # FFmpeg would draw a .txt file as ANSI art
        container.close()
        raise InputError(f"a text file, not a video: `{path}`")
    return container


def main_video(container: InputContainer, path: Path) -> VideoStream:
    """The stream to upscale: the largest of those marked as default, or of all where none is; cover art aside. Raises
    `InputError` if there is none, or a picture in parts (HEIC)."""
    if _is_in_tiles(container):  # beside which there may be a thumbnail
        hint = "make a .png of it first, as with `heif-convert`"
        raise InputError(f"a picture stored in tiles, which cannot be put together here: `{path}`", hint=hint)
    apart = Disposition.attached_pic | Disposition.dependent
    streams = [stream for stream in container.streams.video if not stream.disposition & apart]
    if not streams:
        raise InputError(f"no video stream in `{path}`")
    # FFmpeg's own choice goes by bit rates, or by how many frames it has seen.
    return max(streams, key=lambda stream: (bool(stream.disposition & Disposition.default), _area(stream)))


def _area(stream: VideoStream) -> int:
    return stream.width * stream.height if stream.codec_context else 0  # none for a codec that FFmpeg does not know


def _is_in_tiles(container: InputContainer) -> bool:
    """Whether the main picture is a grid of others, of which PyAV tells nothing but that they are parts."""
    marks = [stream.disposition for stream in container.streams.video]
    return any(mark & Disposition.dependent for mark in marks) and not any(mark & Disposition.default for mark in marks)


def first_packet(path: Path, index: int) -> av.Packet[Any] | None:
    """Of one stream of a file, which is read apart for it."""
    with open_input(path) as container, suppress(av.error.FFmpegError):
        return next((packet for packet in container.demux(container.streams[index]) if packet.size), None)
    return None


def codec_name(stream: Stream) -> str:
    """The codec's name, whichever decoder reads it (`av1`, not `libdav1d`)."""
    return stream.codec_context.codec.canonical_name if stream.codec_context else "unknown codec"


def label_of(stream: Stream) -> str:
    """How notices name it."""
    return f"{stream.type} stream #{stream.index} ({codec_name(stream)})"


def counted(number: int, what: str) -> str:
    """How notices say how many there are of `what`, one word or with others before it."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def has_times(container: InputContainer) -> bool:
    """False for a raw stream such as `clip.h264`: what the pictures are coded in, and nothing around it."""
    return not container.format.flags & _NO_TIMESTAMPS


def average_rate(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """Frames a second; None where nothing tells it. Of a raw stream FFmpeg's own average is a guess."""
    if not has_times(container):
        told = stream.codec_context.framerate
        return told if told and told < _CLOCK_RATE else None
    average, base = stream.average_rate, stream.base_rate
    if average and base and average >= _CLOCK_RATE > base:  # that of a clock, where only H.264's own header tells one
        return base
    return average or base or None


def _open_pipe() -> InputContainer:
    if sys.stdin is None or sys.stdin.isatty():  # none where the shell closed it
        raise UsageError("`-` reads a video from a pipe, and there is none", hint="ffmpeg ... -f nut - | duovsr ...")
    # As `ffmpeg` does for pipes: a playlist or a session description would name files and ports of this machine.
    options = {"protocol_whitelist": "crypto,data"}
    return av.open(sys.stdin.buffer, "r", options=options, metadata_errors="surrogateescape")


def _unreadable(path: Path) -> InputError:
    if path != PIPE:
        try:
            with path.open("rb") as file:
                head = file.read(12)
        except OSError as error:
            return InputError(f"cannot read `{path}`: {error.strerror}")
        if not head:
            return InputError(f"the file is empty: `{path}`")
        if head[4:8] == b"ftyp":
            hint = "the recording was probably cut off before it was finished; a repair tool may rebuild the index"
            return InputError(f"no usable index (moov) in `{path}`", hint=hint)
    return InputError(f"not a video, or damaged beyond reading: `{path}`")


@contextmanager
def ffmpeg_errors(destination: Path) -> Iterator[None]:
    """What is expected nowhere else, such as an encoder that gives up in mid-clip, in one line."""
    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        message = f"FFmpeg failed on the way to `{destination}`: {error.strerror} ({error.filename})"
        raise DuovsrError(message, hint="memory may be short; or try another --codec") from error

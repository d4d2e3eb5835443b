"""Writing images: the frames of lossless pieces, one file each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import av
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from duovsr.errors import Remark, UsageError
from duovsr.video.color import bit_depth, has_alpha_channel
from duovsr.video.images import is_pattern, numbered_files, numbered_name
from duovsr.video.output import FORMATS, disk_errors, fsync, fsync_folder, give_name, is_stamped, stamps_left
from duovsr.video.reader import Frame

if TYPE_CHECKING:  # it asks here for a rehearsal
    from duovsr.video.mux import Piece

_OPTIONS = {"libwebp": {"lossless": "0", "quality": "95"}, "mjpeg": {"q": "2", "qmin": "1"}}


def only_one(frames: Iterable[Frame], target: Path) -> Iterator[Frame]:
    """The only one of `frames`. A second one raises `UsageError`: before it is read nobody can be sure."""
    for number, frame in enumerate(frames):
        if number > 0:
            hint = "write a pattern such as frames/%05d.png, or a video"
            raise UsageError(f"a clip does not fit one image: `{target}`", hint=hint)
        yield frame


def rehearse_picture(frame: VideoFrame, target: Path, aspect: Fraction | None) -> None:
    """Raises `UsageError` where the format of `target` holds no picture of the frame's size."""
    suffix = target.suffix.lower()
    try:
        _coded(frame, suffix, aspect)
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        raise UsageError(f"{suffix} holds no image of {frame.width}x{frame.height}", hint="use .png or .tif") from error


def write_picture(pieces: Sequence[Piece], partial: Path, target: Path, aspect: Fraction | None) -> None:
    """Write the only frame of `pieces` into the file `partial`, as the name of `target` asks for. `aspect`: its
    pixels'."""
    assert sum(len(piece.pts) for piece in pieces) == 1
    with disk_errors(target):
        partial.write_bytes(_coded(next(_frames(pieces)), target.suffix.lower(), aspect))


def numbers_for(source: Path, pieces: Sequence[Piece]) -> Sequence[int]:
    """The numbers of the images that the frames become: those of a pattern's own images, whose times they are since the
    first one; else from 1."""
    times = [pts for piece in pieces for pts in piece.pts]
    if not is_pattern(source):
        return range(1, len(times) + 1)
    first, _ = numbered_files(source)[0]
    return [first + time for time in times]


def write_pictures(
    pieces: Sequence[Piece],
    partial: Path,
    pattern: Path,
    numbers: Sequence[int],
    aspect: Fraction | None,
    overwrite: bool,
    clear: bool,
    announce: Callable[[Path], None],
) -> list[str]:
    """Write every frame of `pieces` through the file `partial`, each complete and announced before it gets its name.
    `aspect`: of their pixels.

    Without `overwrite` only images that the job itself named are replaced. With `clear`, those of later numbers, left
    by a longer clip, go once all of these are there. Returns what people should know. Raises `UsageError` where a
    number's name is taken.
    """
    own = stamps_left(pattern)
    with disk_errors(pattern):
        for number, frame in zip(numbers, _frames(pieces), strict=True):
            partial.write_bytes(_coded(frame, pattern.suffix.lower(), aspect))
            fsync(partial)
            announce(partial)
            file = numbered_name(pattern, number)
            give_name(partial, file, overwrite or is_stamped(file, own))  # after a crash some names are there
        fsync_folder(pattern.parent)
        later = [file for number, file in numbered_files(pattern) if number > numbers[-1]]
        old = [file for file in later if clear and not file.is_dir()]
        for file in old:
            file.unlink()
    images = "1 later image was" if len(old) == 1 else f"{len(old)} later images were"
    return [Remark(f"{images} removed: `{pattern}`")] if old else []


def _frames(pieces: Sequence[Piece]) -> Iterator[VideoFrame]:
    for piece in pieces:
        with av.open(str(piece.path.absolute())) as container:
            yield from container.decode(video=0)


def _coded(frame: VideoFrame, suffix: str, aspect: Fraction | None) -> bytes:
    entry = FORMATS[suffix]
    # Pieces hold no more than the format does.
    formats = entry.translucent if has_alpha_channel(frame.format) else entry.opaque
    picture = VideoReformatter().reformat(frame, format=formats[bit_depth(frame.format) > 8])
    context = cast(av.VideoCodecContext, av.CodecContext.create(entry.encoder, "w"))
    context.width, context.height = frame.width, frame.height
    context.pix_fmt, context.time_base = picture.format.name, Fraction(1, 25)
    if aspect is not None:
        context.sample_aspect_ratio = aspect
    context.options = _OPTIONS.get(entry.encoder, {})
    return b"".join(bytes(packet) for packet in [*context.encode(picture), *context.encode(None)])

"""Writing images: the frames of lossless pieces, one file each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import av
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from duovsr.errors import UsageError
from duovsr.video.color import bit_depth
from duovsr.video.images import numbered_name
from duovsr.video.output import Target, disk_errors, fsync, fsync_folder, publish

if TYPE_CHECKING:  # it imports `codecs`, which asks here what a format can hold
    from duovsr.video.mux import Piece


@dataclass(frozen=True)
class PictureFormat:
    """An encoder with its pixel formats: for 8 bit and, where it holds more, for 16."""

    encoder: str
    opaque: tuple[str, ...]
    translucent: tuple[str, ...] = ()

    @property
    def bit_depth(self) -> int:
        return 8 * len(self.opaque)


_TIFF = PictureFormat("tiff", ("rgb24", "rgb48le"), ("rgba", "rgba64le"))
_JPEG = PictureFormat("mjpeg", ("yuvj444p",))

FORMATS: dict[str, PictureFormat] = {
    ".png": PictureFormat("png", ("rgb24", "rgb48be"), ("rgba", "rgba64be")),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": PictureFormat("libwebp", ("bgra",), ("bgra",)),
    ".bmp": PictureFormat("bmp", ("bgr24",)),  # its fourth byte is one that readers ignore
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
}
_OPTIONS = {"libwebp": {"lossless": "0", "quality": "95"}, "mjpeg": {"q": "2", "qmin": "1"}}


def write_pictures(pieces: Sequence[Piece], partial: Path, target: Target, overwrite: bool) -> None:
    """Write every frame of `pieces` through the file `partial`, each complete before it gets its name.

    A pattern counts from 1. Raises `UsageError` where a single image is to hold several frames, or a file exists.
    """
    count = sum(len(piece.pts) for piece in pieces)
    if target.kind == "image" and count != 1:
        hint = "write a pattern such as frames/%05d.png, or a video"
        raise UsageError(f"{count} frames do not fit one image: `{target.path}`", hint=hint)
    for number, frame in enumerate(_frames(pieces), start=1):
        path = target.path if target.kind == "image" else numbered_name(target.path, number)
        with disk_errors(path):
            partial.write_bytes(_coded(frame, path.suffix.lower()))
            if target.kind == "image":
                publish(partial, path, overwrite)
            else:  # finished names are overwritten: after a crash some are there
                fsync(partial)
                os.replace(partial, path)
    fsync_folder(target.path.parent)


def _frames(pieces: Sequence[Piece]) -> Iterator[VideoFrame]:
    for piece in pieces:
        with av.open(str(piece.path.absolute())) as container:
            yield from container.decode(video=0)


def _coded(frame: VideoFrame, suffix: str) -> bytes:
    entry = FORMATS[suffix]
    has_alpha = any(component.is_alpha for component in frame.format.components)
    formats = entry.translucent if has_alpha else entry.opaque  # pieces hold no more than the format does
    picture = VideoReformatter().reformat(frame, format=formats[bit_depth(frame.format) > 8])
    context = cast(av.VideoCodecContext, av.CodecContext.create(entry.encoder, "w"))
    context.width, context.height = frame.width, frame.height
    context.pix_fmt, context.time_base = picture.format.name, Fraction(1, 25)
    context.options = _OPTIONS.get(entry.encoder, {})
    return b"".join(bytes(packet) for packet in [*context.encode(picture), *context.encode(None)])

"""The file layer without a model: read, encoded in pieces, put together, verified."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from duovsr.video.codecs import choose_encoding
from duovsr.video.encoder import VideoEncoder
from duovsr.video.mux import Piece, join_pieces, rehearse
from duovsr.video.output import publish, target_of, verify_output
from duovsr.video.reader import Frame, VideoReader
from duovsr.video.remux import Window


@dataclass(frozen=True)
class Copied:
    notices: list[str]
    pts: list[int]  # of the source


def copy_clip(
    source: Path,
    destination: Path,
    scale: int = 1,
    *,
    piece_frames: int = 7,
    earlier: int = 0,
    reading: dict[str, Any] | None = None,
    **settings: Any,
) -> Copied:
    """Nearest-neighbour upscaling: the simplest model that an engine could drive. The picture comes `earlier` ticks."""
    target = target_of(destination)
    pieces: list[Piece] = []
    with VideoReader(source, **(reading or {})) as reader:
        info = reader.info
        size = scale * info.width, scale * info.height
        settings = {"codec": None, "crf": None, "pix_fmt": None} | settings
        encoding = choose_encoding(info, *size, target.format_name, **settings)
        rehearse(target, info, *size, encoding)
        frames = [replace(frame, pts=frame.pts - earlier) for frame in reader]
        for begin in range(0, len(frames), piece_frames):
            path = destination.with_suffix(f".{begin}.piece")
            with VideoEncoder(path, info, *size, encoding) as encoder:
                for frame in frames[begin : begin + piece_frames]:
                    encoder.write(_enlarged(frame, scale))
            pieces.append(Piece(path, list(encoder.written_pts), encoder.reordering))
    partial = destination.with_suffix(".part")
    first = frames[0].pts * info.time_base
    shift = -first if first < 0 else Fraction(0)
    notices = join_pieces(pieces, partial, target.format_name, info, encoding, Window(shift=shift))
    ticks = (shift / info.time_base).numerator
    verify_output(partial, [frame.pts + ticks for frame in frames], info.time_base)
    publish(partial, destination, overwrite=False)
    for piece in pieces:
        piece.path.unlink()
    return Copied([*reader.notices, *encoding.notices, *notices], [frame.pts for frame in frames])


def _enlarged(frame: Frame, scale: int) -> Frame:
    pixels = frame.pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    alpha = None if frame.alpha is None else frame.alpha.repeat(scale, axis=0).repeat(scale, axis=1)
    return Frame(pixels, frame.pts, frame.time_base, alpha)

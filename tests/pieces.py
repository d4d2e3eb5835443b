"""The file layer without a model: read, encoded in pieces, put together, verified."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from duovsr.video.codecs import choose_encoding
from duovsr.video.container import main_video
from duovsr.video.encoder import VideoEncoder
from duovsr.video.mux import Piece, join_pieces, rehearse
from duovsr.video.output import publish, target_of
from duovsr.video.reader import Frame, VideoReader
from duovsr.video.remux import StreamCopier
from duovsr.video.verify import verify_output
from duovsr.video.window import WHOLE, Window


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
    first, end = frames[0].pts * info.time_base, reader.end - earlier
    shift = -first if first < 0 else Fraction(0)
    notices = join_pieces(pieces, partial, target.format_name, info, encoding, Window(shift=shift), end)
    ticks = (shift / info.time_base).numerator
    verify_output(partial, [frame.pts + ticks for frame in frames], end + ticks, info.time_base)
    publish(partial, destination, overwrite=False)
    for piece in pieces:
        piece.path.unlink()
    return Copied([*reader.notices, *encoding.notices, *notices], [frame.pts for frame in frames])


def copy_streams(source: Path, target: Path, window: Window = WHOLE, **settings: bool) -> StreamCopier:
    """The picture as it is, and beside it what `StreamCopier` brings along."""
    format_name = target_of(target).format_name
    options = {} if format_name in ("mp4", "mov") else {"avoid_negative_ts": "disabled"}
    with (
        av.open(str(source)) as container,
        av.open(str(target), "w", format=format_name, container_options=options) as out,
    ):
        picture = main_video(container, source)
        video = out.add_stream_from_template(picture, opaque=True)
        copier = StreamCopier(source, out, video, window=window, **settings)
        for packet in container.demux(picture):
            if packet.size and window.place(packet, clip=False):
                packet.stream = video
                copier.copy_until(packet.dts * packet.time_base if packet.dts is not None else Fraction(0))
                out.mux(packet)
        copier.finish()
    copier.close()
    return copier


def copy_beside(
    source: Path,
    target: Path,
    options: dict[str, str] | None = None,
    *,
    rate: Fraction = Fraction(25),
    window: Window = WHOLE,
) -> StreamCopier:
    """All that `source` has beside its picture, beside one black picture. The copier that is returned is closed."""
    with av.open(str(target), "w", container_options=options or {}, metadata_errors="surrogateescape") as out:
        video = out.add_stream("libvpx-vp9" if target.suffix == ".webm" else "libx264", rate=rate)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        copier = StreamCopier(source, out, video, window=window)
        out.mux(video.encode(av.VideoFrame(64, 48, "yuv420p")))
        out.mux(video.encode(None))
        copier.finish()
    copier.close()
    return copier


def _enlarged(frame: Frame, scale: int) -> Frame:
    pixels = frame.pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    alpha = None if frame.alpha is None else frame.alpha.repeat(scale, axis=0).repeat(scale, axis=1)
    return Frame(pixels, frame.pts, frame.time_base, alpha)

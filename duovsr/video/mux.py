"""Putting together: encoded pieces, at their frames' times, with the source's other streams beside them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream

from duovsr.errors import DuovsrError, UsageError
from duovsr.video.boxes import refer_to_chapters
from duovsr.video.codecs import Encoding
from duovsr.video.encoder import LARGEST_REORDERING, NUMBER_BASE, VideoEncoder
from duovsr.video.info import VideoInfo
from duovsr.video.output import CONTAINERS, Target, disk_errors
from duovsr.video.pictures import rehearse_picture
from duovsr.video.reader import Frame
from duovsr.video.remux import StreamCopier
from duovsr.video.window import Window

_QUICK = ("mp4", "mov")
_LONGEST_STEP = 2**31 - 1  # ticks: more do not fit into mp4's tables, and FFmpeg fails, or writes a wrong number


@dataclass(frozen=True)
class Piece:
    """A file of `encoder.VideoEncoder` with numbered packets: the pts of its frames as shown, in the source's time
    base, and by how many packets one may come after its place in that order."""

    path: Path
    pts: Sequence[int]
    reordering: int


def join_pieces(
    pieces: Sequence[Piece],
    target: Path,
    format_name: str,
    source: VideoInfo,
    encoding: Encoding,
    window: Window,
    end: int,
    *,
    copy_streams: bool = True,
    audio: bool = True,
    subtitles: bool = True,
) -> list[str]:
    """Write `target` from the packets of `pieces`, each moved by `window.shift`, and (`copy_streams`) what else the
    source has; `audio` and `subtitles` leave out theirs. `end` is the pts at which the last frame ends, not moved yet.

    Returns what people should know of the streams. Raises `UsageError` where the container does not hold the codec,
    `NoSpaceError`, and `DuovsrError` where the file cannot be finished.
    """
    quick = format_name in _QUICK
    clock = _clock(pieces, source, end) if quick else source.time_base
    shortest = 0 if quick else round(NUMBER_BASE / clock)  # in place of none, FFmpeg takes what the rate tells
    options = _muxer_options(format_name, clock)
    copier: StreamCopier | None = None
    with disk_errors(target):
        container = av.open(
            str(target.absolute()),
            "w",
            format=format_name,
            container_options=options,
            metadata_errors="surrogateescape",
        )
    try:
        video, notices = _add_video(container, str(pieces[0].path.absolute()), format_name, source, encoding)
        video.time_base = clock
        if copy_streams:
            copier = StreamCopier(source.path, container, video, window=window, audio=audio, subtitles=subtitles)
        with disk_errors(target):
            for packet in _packets(pieces, source, window.shift, end):
                packet.stream, packet.duration = video, max(packet.duration or 0, shortest)
                if copier is not None and packet.dts is not None:
                    copier.copy_until(packet.dts * packet.time_base)
                container.mux(packet)
            if copier is not None:
                copier.finish()
            is_alone = quick and len(container.streams) == 1 and bool(container.chapters())
            container.close()
            if is_alone:
                refer_to_chapters(target)
    except av.error.FFmpegError as error:
        hint = None if format_name == "matroska" else "write to .mkv, which holds most"
        raise DuovsrError(f"the {format_name} file cannot be finished: {error.strerror}", hint=hint) from error
    finally:
        if copier is not None:
            copier.close()
        with suppress(OSError, av.error.FFmpegError):  # closed above, or lost: the error on its way says why
            container.close()
    return notices + (copier.notices if copier is not None else [])


def rehearse(target: Target, source: VideoInfo, width: int, height: int, encoding: Encoding) -> None:
    """Encode one black frame and begin a file with it, or code it as an image, in memory: what cannot be written is
    refused before the work.

    Raises `UsageError`.
    """
    piece, file = io.BytesIO(), io.BytesIO()
    black = Frame(np.zeros((height, width, 3), np.uint8 if source.bit_depth == 8 else np.uint16), 0, source.time_base)
    with VideoEncoder(piece, source, width, height, encoding) as encoder:
        encoder.write(black)
    piece.seek(0)
    if target.kind in ("image", "images"):
        with av.open(piece, "r") as container:
            rehearse_picture(next(container.decode(video=0)), target.path, source.aspect_at(width, height))
    if target.kind != "video":
        return
    # On closing FFmpeg finds no frame, and says so.
    with suppress(av.error.FFmpegError), av.open(file, "w", format=target.format_name) as container:
        _add_video(container, piece, target.format_name, source, encoding)
        try:
            container.start_encoding()
        except av.error.FFmpegError as error:
            raise _not_held(target.format_name, encoding) from error


def _not_held(format_name: str, encoding: Encoding) -> UsageError:
    suffix = next(suffix for suffix, name in CONTAINERS.items() if name == format_name)
    hint = "use another --codec" if suffix == ".mkv" else "write to .mkv, or use another --codec"
    return UsageError(f"{suffix} does not hold codec `{encoding.name}`", hint=hint)


def _add_video(
    container: OutputContainer, piece: str | BinaryIO, format_name: str, source: VideoInfo, encoding: Encoding
) -> tuple[VideoStream, list[str]]:
    with av.open(piece) as first:
        template = first.streams.video[0]
        try:
            stream = container.add_stream_from_template(template, opaque=True)  # no encoder is needed any more
        except ValueError as error:
            raise _not_held(format_name, encoding) from error
        tag, codec = template.codec_context.codec_tag, template.codec_context.name
        aspect = source.aspect_at(template.width, template.height)
    stream.time_base = source.time_base
    quick = format_name in _QUICK
    if quick and codec in ("hevc", "prores"):
        # Apple's players refuse the default of hevc, hev1; of ProRes, the tag alone tells which kind it is.
        stream.codec_context.codec_tag = "hvc1" if codec == "hevc" else tag
    if source.frame_rate is not None:
        # Timecodes count it. Without it the rate of x264's clock would pass for it in Matroska: 12800 frames a second.
        # A frame shorter than Matroska's tick would have no duration, and FFmpeg guess the times of the first ones.
        stream.codec_context.framerate = source.frame_rate if quick else min(source.frame_rate, 1 / NUMBER_BASE)
    notices = []
    if encoding.alpha and not quick:
        stream.metadata["alpha_mode"] = "1"
    if aspect is not None:
        stream.codec_context.sample_aspect_ratio = aspect
        if aspect != 1 and not quick and encoding.name not in ("h264", "hevc"):
            # PyAV cannot set the container's own field, and these codecs have none that players read.
            notices.append(f"the pixel aspect ratio {aspect} is not kept: mkv/webm needs h264 or hevc for it")
    return stream, notices


def _packets(pieces: Sequence[Piece], source: VideoInfo, shift: Fraction, end: int) -> Iterator[av.Packet[VideoStream]]:
    """All packets in the order of decoding. A dts is the pts that is shown `reordering` frames before the packet's
    place: it never goes back, whatever the steps between frames, and never lies behind the packet's own pts."""
    offset = shift / source.time_base
    assert offset.denominator == 1, "the picture moves by whole ticks"
    shown = [pts + offset.numerator for pts in (*(pts for piece in pieces for pts in piece.pts), end)]
    delay = max(piece.reordering for piece in pieces)
    # The edit list of mp4 takes the least time from dts to pts of those packets whose dts is not after 0: the first of
    # all packets must have it, so the leading steps are no longer than the first ones shown.
    step = min([source.step, *((pts - shown[0]) // count for count, pts in enumerate(shown[1:delay], 1))])
    place, start = 0, 0
    extradata: bytes | None = None
    for piece in pieces:
        with av.open(str(piece.path.absolute())) as container:
            stream = container.streams.video[0]
            if start and stream.codec_context.extradata != extradata:  # one header serves all packets
                raise DuovsrError(f"the encoder changed its header: `{piece.path}`", hint="use --restart")
            extradata = stream.codec_context.extradata
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                assert packet.pts is not None
                number = start + packet.pts
                packet.pts, packet.time_base = shown[number], source.time_base
                packet.dts = shown[place - delay] if place >= delay else shown[0] - (delay - place) * step
                packet.duration = shown[number + 1] - packet.pts
                place += 1
                yield packet
        start += len(piece.pts)


def _clock(pieces: Sequence[Piece], source: VideoInfo, end: int) -> Fraction:
    """The source's clock, or of it multiplied by ten, a hundred and so on the finest whose ticks between packets, and
    from a dts to its pts, are few enough for mp4: with ticks of a nanosecond, 2.1 s are not."""
    shown = np.array([*(pts for piece in pieces for pts in piece.pts), end])
    apart = min(LARGEST_REORDERING, len(shown) - 1)
    longest = int((shown[apart:] - shown[:-apart]).max())
    clock = source.time_base
    while longest * source.time_base / clock > _LONGEST_STEP:
        clock *= 10
    return clock


def _muxer_options(format_name: str, clock: Fraction) -> dict[str, str]:
    if format_name in _QUICK:
        # A late start is kept in movie time, 1/1000 s by default: count in the video's own units.
        unit = clock.denominator
        return {"movie_timescale": str(unit * -(-1000 // unit))}
    # Without this a negative first timestamp (AAC from mp4 starts at -21 ms) moves all streams, the video too.
    return {"avoid_negative_ts": "disabled"}

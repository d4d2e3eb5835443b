"""What a video file is: opened, checked and described, with one-line errors for what is not a video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from duovsr.errors import InputError
from duovsr.video.color import FULL, RGB, UNSPECIFIED, ColorTags, bit_depth

__all__ = ["ColorTags", "VideoInfo", "codec_name", "main_video", "open_input", "probe"]


@dataclass(frozen=True)
class VideoInfo:
    """A clip's properties, as its first picture and its container tell them. Sizes are upright, after rotation."""

    path: Path
    width: int
    height: int
    time_base: Fraction
    frame_rate: Fraction | None  # average
    num_frames: int | None  # the container's claim or an estimate: for progress, never for correctness
    duration: Fraction | None  # seconds
    sample_aspect_ratio: Fraction | None
    rotation: int  # degrees counterclockwise that make the coded picture upright; the reader applies them
    bit_depth: int
    color: ColorTags  # as tagged; RGB formats are matrix 0 and full range
    codec: str
    audio_codec: str | None


def probe(path: Path) -> VideoInfo:
    """Describes the file's main video. Raises `InputError` for anything without a picture that decodes."""
    with open_input(path) as container:
        stream = main_video(container, path)
        return _describe(path, container, stream, _first_picture(path, container, stream))


def open_input(path: Path) -> InputContainer:
    """The opened container of any file FFmpeg reads. Raises `InputError`."""
    if path.is_dir():
        raise InputError(f"a folder, not a video: `{path}`")
    try:
        # An absolute path cannot be taken for a protocol ("clip: 1.mp4"); metadata bytes survive whatever they are.
        container = av.open(str(path.absolute()), "r", metadata_errors="surrogateescape")
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
    """The stream to upscale, cover art aside. Raises `InputError` if there is none."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise InputError(f"no video stream in `{path}`")
    return stream


def codec_name(stream: av.stream.Stream) -> str:
    """The codec's name, whichever decoder reads it (`av1`, not `libdav1d`)."""
    return stream.codec_context.codec.canonical_name if stream.codec_context else "unknown codec"


def _unreadable(path: Path) -> InputError:
    if path.stat().st_size == 0:
        return InputError(f"the file is empty: `{path}`")
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        hint = "the recording was probably cut off before it was finished; a repair tool may rebuild the index"
        return InputError(f"no usable index (moov) in `{path}`", hint=hint)
    return InputError(f"not a video, or damaged beyond reading: `{path}`")


def _first_picture(path: Path, container: InputContainer, stream: VideoStream) -> av.VideoFrame:
    try:
        for packet in container.demux(stream):
            for frame in _decode_leniently(packet):
                return frame
    except av.error.FFmpegError as error:
        raise InputError(f"no picture of `{path}` can be decoded") from error
    raise InputError(f"no picture of `{path}` can be decoded")


def _decode_leniently(packet: av.Packet[VideoStream]) -> Iterator[av.VideoFrame]:
    try:
        yield from packet.decode()
    except av.error.InvalidDataError:
        return  # a damaged start: a later packet may decode


def _describe(path: Path, container: InputContainer, stream: VideoStream, picture: av.VideoFrame) -> VideoInfo:
    rotation = round(picture.rotation / 90) * 90 % 360
    upright = rotation % 180 == 0
    frame_rate = stream.average_rate or stream.base_rate or None
    duration = _duration(container, stream)
    num_frames = stream.frames or (round(duration * frame_rate) if duration and frame_rate else None)
    aspect = stream.sample_aspect_ratio or None
    audio = container.streams.best("audio")
    assert stream.time_base is not None, "every opened stream has a time base"
    return VideoInfo(
        path=path,
        width=picture.width if upright else picture.height,
        height=picture.height if upright else picture.width,
        time_base=stream.time_base,
        frame_rate=frame_rate,
        num_frames=num_frames,
        duration=duration,
        sample_aspect_ratio=1 / aspect if aspect and not upright else aspect,
        rotation=rotation,
        bit_depth=min(bit_depth(picture.format), 16),
        color=_tags(picture),
        codec=codec_name(stream),
        audio_codec=codec_name(audio) if audio else None,
    )


def _duration(container: InputContainer, stream: VideoStream) -> Fraction | None:
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    return Fraction(container.duration, av.time_base) if container.duration else None


def _tags(picture: av.VideoFrame) -> ColorTags:
    tags = ColorTags(picture.color_primaries, picture.color_trc, picture.colorspace, picture.color_range)
    if picture.format.is_rgb or picture.format.has_palette:
        return ColorTags(tags.primaries, tags.transfer, RGB, FULL)
    # Some YUV files claim matrix 0 or the reserved 3; "yuvj" and gray formats are full range by convention.
    matrix = UNSPECIFIED if tags.matrix in (RGB, 3) else tags.matrix
    by_format = FULL if picture.format.name.startswith(("yuvj", "gray")) else 0
    return ColorTags(tags.primaries, tags.transfer, matrix, tags.range or by_format)

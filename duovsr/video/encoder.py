"""Encoding: each frame at its own time, in tagged colours, with nothing beside the picture."""

from __future__ import annotations

from array import array
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import av
import numpy as np
from av.video.stream import VideoStream

from duovsr.errors import UsageError
from duovsr.options import PIPE
from duovsr.video.codecs import SVT_AV1_MAX_RATE, Encoding
from duovsr.video.color import RgbToFrame, output_tags
from duovsr.video.encoder_options import silence
from duovsr.video.info import VideoInfo
from duovsr.video.output import disk_errors
from duovsr.video.reader import Frame

NUMBER_BASE = Fraction(1, 1000)  # Matroska's own clock: a frame's number is then exact
# Of the encoder of a numbered file: libvpx counts in 1/10000000 s, and gives times of a finer clock back changed.
FINEST_CLOCK = Fraction(1, 1_000_000)
LARGEST_REORDERING = 32  # frames; no encoder holds back more


class VideoEncoder:
    """Encodes frames into `target`, a file or a stream of bytes, in a container of its own.

    A `numbered` file is a piece that `mux.join_pieces` puts together with others: it is Matroska, and its packets carry
    the number of their frame, from 0, in place of a time, for Matroska's clock is too coarse for many sources.
    `written_pts` has the pts of every frame. Y4M has no times: there all frames come in even steps of `time_base`, and
    `longest_move` says how far from its own time, in seconds, one of them is. Raises `UsageError` for what the encoder
    or the container refuses, `NoSpaceError` from any method.
    """

    def __init__(
        self,
        target: Path | BinaryIO,
        source: VideoInfo,
        width: int,
        height: int,
        encoding: Encoding,
        format_name: str = "matroska",
        *,
        numbered: bool = True,
    ) -> None:
        self.written_pts = array("q")
        self.reordering = 0  # by how many packets one may come after its place in the order of showing
        self._path = target if isinstance(target, Path) else PIPE
        self._source, self._size, self._encoding = source, (width, height), encoding
        self._numbered, self._even = numbered, format_name == "yuv4mpegpipe"
        clock = max(source.time_base, FINEST_CLOCK) if numbered else source.time_base
        # For rate control alone: times are the frames' own. libvpx refuses a rate that the time base cannot show.
        self._rate = min(source.frame_rate or Fraction(25), 1 / clock)
        self.time_base = 1 / self._rate if self._even else clock
        self.longest_move = Fraction(0)
        self._numbers: dict[int, int] = {}  # of the frames inside the encoder, by their time in its clock
        self._latest: int | None = None  # of those times
        self._packets = 0
        self._tags = output_tags(source.color, width, height, encoding.pix_fmt)
        self._to_frame = RgbToFrame(self._tags, encoding.pix_fmt)
        file: str | BinaryIO | _WithAspect = str(target.absolute()) if isinstance(target, Path) else target
        if self._even and not isinstance(target, Path):
            file = _WithAspect(target, source.aspect_at(width, height))
        with disk_errors(self._path):
            self._container = av.open(
                file,
                "w",
                format=format_name,
                # Y4M of more than 8 bits is FFmpeg's own extension, which others read, too.
                container_options={"avoid_negative_ts": "disabled"} | ({"strict": "-1"} if self._even else {}),
            )
        self._stream = self._add_stream(format_name)
        self._start(format_name)

    def __enter__(self) -> VideoEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def close(self) -> None:
        """Writes what the encoder still holds, and finishes the file."""
        try:
            self._encode(None)
            with disk_errors(self._path):
                self._container.close()
        except BaseException:
            self.abandon()
            raise

    def write(self, frame: Frame) -> None:
        """Appends a frame: (height, width, 3) uint8 or uint16, in the source's time base, later than the one before."""
        width, height = self._size
        assert frame.pixels.shape == (height, width, 3)
        assert frame.pixels.dtype in (np.uint8, np.uint16)
        assert frame.time_base == self._source.time_base
        assert not self.written_pts or frame.pts > self.written_pts[-1]
        if self._encoding.alpha or frame.alpha is None:
            coded = self._to_frame(frame.pixels, frame.alpha)
        else:
            coded = self._to_frame(_on_black(frame.pixels, frame.alpha))
        coded.pts, coded.time_base = self._place(frame), self.time_base
        self._encode(coded)

    def abandon(self) -> None:
        """Closes the file as it is."""
        with suppress(OSError, av.error.FFmpegError):  # the file is lost already
            self._container.close()

    def _place(self, frame: Frame) -> int:
        """When the encoder is told that the frame is shown, in its `time_base`."""
        number, pts = len(self.written_pts), frame.pts
        self.written_pts.append(frame.pts)
        if self._even:
            own_time = (frame.pts - self.written_pts[0]) * frame.time_base
            self.longest_move = max(self.longest_move, abs(number * self.time_base - own_time))
            return number
        if self._numbered:
            pts = round(frame.pts * frame.time_base / self.time_base)
            pts = pts if self._latest is None else max(pts, self._latest + 1)
            self._numbers[pts], self._latest = number, pts
        return pts

    def _add_stream(self, format_name: str) -> VideoStream:
        encoder, options, rate = self._encoding.encoder, self._encoding.options, self._rate
        silence(encoder)
        if encoder == "libsvtav1":
            rate = min(rate, Fraction(SVT_AV1_MAX_RATE))
        try:
            stream = self._container.add_stream(encoder, rate=rate, options=options)
        except ValueError as error:
            message = f"{format_name} does not hold codec `{self._encoding.name}`"
            raise UsageError(message, hint="use another --codec") from error
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = self._size
        stream.pix_fmt = self._encoding.pix_fmt
        stream.time_base = self.time_base
        context = stream.codec_context
        context.time_base = self.time_base
        context.color_primaries, context.color_trc = self._tags.primaries, self._tags.transfer
        context.colorspace, context.color_range = self._tags.matrix, self._tags.range
        aspect = self._source.aspect_at(*self._size)
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        return stream

    def _start(self, format_name: str) -> None:
        try:
            self._stream.codec_context.open()  # alone: some refusals of encoders look like the system's
            with disk_errors(self._path):
                self._container.start_encoding()
        except av.error.FFmpegError as error:
            self.abandon()
            width, height = self._size
            pix_fmt = self._encoding.pix_fmt
            message = f"{self._encoding.encoder} in {format_name} refuses {width}x{height} in `{pix_fmt}`"
            raise UsageError(message, hint="try another --codec or --pix-fmt") from error
        except BaseException:
            self.abandon()
            raise

    def _encode(self, coded: av.VideoFrame | None) -> None:
        with disk_errors(self._path):
            for packet in self._stream.encode(coded):
                if self._numbered:
                    assert packet.pts is not None, "encoders pass times on"
                    packet.pts = self._numbers.pop(packet.pts)
                    packet.dts = self._packets - LARGEST_REORDERING
                    packet.duration, packet.time_base = 1, NUMBER_BASE
                    self.reordering = max(self.reordering, self._packets - packet.pts)
                self._packets += 1
                self._container.mux(packet)


class _WithAspect:
    """A stream of Y4M, whose header it tells the aspect of the pixels: FFmpeg's muxer takes that from where PyAV cannot
    put it."""

    def __init__(self, stream: BinaryIO, aspect: Fraction | None) -> None:
        self._stream = stream
        self._told = None if aspect is None else f" A{aspect.numerator}:{aspect.denominator} ".encode()

    def write(self, data: bytes) -> int:
        """The header comes whole, with the first bytes."""
        told, self._told = self._told, None
        self._stream.write(data if told is None else bytes(data).replace(b" A0:0 ", told, 1))
        return len(data)


def _on_black(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    top = np.iinfo(pixels.dtype).max
    shown = pixels.astype(np.float32) * (alpha[..., None].astype(np.float32) / top)
    return np.rint(shown).astype(pixels.dtype)

"""Writing: each frame at its own time, in tagged colours, with the source's other streams beside it."""

from __future__ import annotations

import os
from array import array
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.video.stream import VideoStream

from duovsr.errors import DuovsrError, InputError, UsageError
from duovsr.video.codecs import Encoding, choose_encoding
from duovsr.video.color import ColorTags, RgbToFrame, output_tags
from duovsr.video.info import VideoInfo
from duovsr.video.output import CONTAINERS, disk_errors
from duovsr.video.reader import Frame
from duovsr.video.remux import StreamCopier

# x265 takes the first dts from its third frame: where there is none, the dts are not set, and order is as shown.
_X265_REORDERING = 2


class VideoWriter:
    """Encodes frames into `path` and copies all other streams of `source`. Leaving the context finishes the file.

    `format_name` is FFmpeg's name of the container (`output.container_format`), for `path` may end in `.part`.
    `codec`, `crf` and `pix_fmt` follow source and container where None. `notices` is complete after leaving;
    `written_pts` has the pts of every frame, for `output.verify_output`. Raises `UsageError` for settings that cannot
    be written, `NoSpaceError` from any method, and `InputError` for frames before time zero.
    """

    def __init__(
        self,
        path: Path,
        source: VideoInfo,
        width: int,
        height: int,
        *,
        codec: str | None = None,
        crf: int | None = None,
        pix_fmt: str | None = None,
        format_name: str,
    ) -> None:
        encoding = choose_encoding(source, width, height, format_name, codec=codec, crf=crf, pix_fmt=pix_fmt)
        tags = output_tags(source.color, width, height, encoding.pix_fmt)
        self.notices = list(encoding.notices)
        self.written_pts = array("q")
        self._path = path
        self._source = source
        self._size = width, height
        self._format_name = format_name
        self._x265 = encoding.encoder == "libx265"
        self._to_frame = RgbToFrame(tags, encoding.pix_fmt)
        options = _muxer_options(format_name, source.time_base)
        self._container = av.open(
            str(path.absolute()), "w", format=format_name, container_options=options, metadata_errors="surrogateescape"
        )
        self._stream = self._add_video(encoding, tags)
        self._copier = StreamCopier(source.path, self._container, self._stream)
        self._start(encoding)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        else:
            self._abandon()

    def write(self, frame: Frame) -> None:
        """Appends a frame: (height, width, 3) uint8 or uint16, in the source's time base, later than the one before."""
        width, height = self._size
        assert frame.pixels.shape == (height, width, 3)
        assert frame.pixels.dtype in (np.uint8, np.uint16)
        assert frame.time_base == self._source.time_base
        assert not self.written_pts or frame.pts > self.written_pts[-1]
        if frame.pts < 0:  # mp4 would hide it, mkv would lose its time
            hint = "remux it with timestamps from zero first"
            raise InputError(f"the video starts before time zero: `{self._source.path}`", hint=hint)
        coded = self._to_frame(frame.pixels)
        coded.pts, coded.time_base = frame.pts, frame.time_base
        self._encode(coded)
        self.written_pts.append(frame.pts)

    def _add_video(self, encoding: Encoding, tags: ColorTags) -> VideoStream:
        if encoding.encoder == "libsvtav1":  # it writes its settings to stderr, and only the environment can stop it
            os.environ.setdefault("SVT_LOG", "0")
        rate = self._source.frame_rate or Fraction(25)  # for rate control alone: times are the frames' own
        try:
            stream = self._container.add_stream(encoding.encoder, rate=rate, options=encoding.options)
        except ValueError as error:
            suffix = next(suffix for suffix, name in CONTAINERS.items() if name == self._format_name)
            hint = "write to .mkv, or use another --codec"
            raise UsageError(f"{suffix} does not hold codec `{encoding.name}`", hint=hint) from error
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = self._size
        stream.pix_fmt = encoding.pix_fmt
        stream.time_base = self._source.time_base
        context = stream.codec_context
        context.time_base = self._source.time_base
        context.color_primaries, context.color_trc = tags.primaries, tags.transfer
        context.colorspace, context.color_range = tags.matrix, tags.range
        if encoding.name == "hevc" and self._format_name in ("mp4", "mov"):
            context.codec_tag = "hvc1"  # Apple's players refuse the default, hev1
        self._set_aspect(stream, encoding)
        return stream

    def _set_aspect(self, stream: VideoStream, encoding: Encoding) -> None:
        aspect = self._source.sample_aspect_ratio
        if aspect is None:
            return
        stream.codec_context.sample_aspect_ratio = aspect
        if aspect != 1 and self._format_name in ("matroska", "webm") and encoding.name not in ("h264", "hevc"):
            # PyAV cannot set the container's own field, and these codecs have none that players read.
            self.notices.append(f"the pixel aspect ratio {aspect} is not kept: mkv/webm needs h264 or hevc for it")

    def _start(self, encoding: Encoding) -> None:
        width, height = self._size
        try:
            with disk_errors(self._path):
                self._container.start_encoding()
        except av.error.FFmpegError as error:
            self._abandon()
            message = f"{encoding.encoder} in {self._format_name} refuses {width}x{height} in `{encoding.pix_fmt}`"
            raise UsageError(message, hint="try another --codec, or write to .mkv") from error
        except BaseException:
            self._abandon()
            raise

    def _encode(self, coded: av.VideoFrame | None) -> None:
        with disk_errors(self._path):
            for packet in self._stream.encode(coded):
                if self._x265 and len(self.written_pts) <= _X265_REORDERING:
                    packet.dts = packet.pts
                if packet.dts is not None:
                    self._copier.copy_until(packet.dts * packet.time_base)
                self._container.mux(packet)

    def _finish(self) -> None:
        try:
            self._encode(None)
            with disk_errors(self._path):
                self._copier.finish()
                self._container.close()
        except BaseException as error:
            self._abandon()
            if isinstance(error, av.error.FFmpegError):
                message = f"the {self._format_name} file cannot be finished: {error.strerror}"
                raise DuovsrError(message, hint="write to .mkv, which holds most") from error
            raise
        self._copier.close()
        self.notices += self._copier.notices

    def _abandon(self) -> None:
        self._copier.close()
        with suppress(av.error.FFmpegError):  # the file is lost already, and the error on its way says why
            self._container.close()


def _muxer_options(format_name: str, time_base: Fraction) -> dict[str, str]:
    if format_name in ("mp4", "mov"):
        # A late start is kept in movie time, 1/1000 s by default: count in the video's own units.
        unit = time_base.denominator
        return {"movie_timescale": str(unit * -(-1000 // unit))}
    # Without this a negative first timestamp (AAC from mp4 starts at -21 ms) moves all streams, the video too.
    return {"avoid_negative_ts": "disabled"}

"""Reading: every frame that decodes, upright, as RGB, at its own time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from textwrap import shorten
from types import TracebackType

import av
import numpy as np

from duovsr.errors import InputError, Remark, UsageError
from duovsr.options import Decoder, Position
from duovsr.video.color import ColorTags, FrameToRgb, bit_depth, decoding_tags, picture_tags
from duovsr.video.container import counted
from duovsr.video.deinterlace import deinterlaced
from duovsr.video.info import describe, first_picture, has_alpha, has_fields
from duovsr.video.nvdec import NvdecSource
from duovsr.video.sidedata import SideData, image_texts
from duovsr.video.source import open_source
from duovsr.video.timeline import LOOK_AHEAD, Timeline

_NAMES_SHOWN = 100  # characters: photos have dozens of fields


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture, shown at `pts` x `time_base` s. `pixels`: (H, W, 3) RGB, uint8 or (full 16-bit scale) uint16.
    `alpha`: (H, W) of the same type, where the source has transparency; colours are not premultiplied."""

    pixels: np.ndarray
    pts: int
    time_base: Fraction
    alpha: np.ndarray | None = None


class VideoReader:
    """Iterates once over the frames of a clip, or of a piece of it, in presentation order.

    The source (`-`: standard input) is opened once. A piece begins at the first frame at or after `start` and ends
    before the first at or after `end`; it is found by decoding from the beginning. `frame_rate` is for a sequence of
    images alone. Three decoded pictures are held at a time; of interlaced video, five. All frames have the first one's
    size and depth.

    When the iteration has ended, `notices` has what people should know of the source, and `window` the times in
    seconds of the piece's first frame and of the first frame after it, each None where it was not asked for or not
    reached. `end` is then the pts at which the last frame ends, and `moves` are the seconds by which frames were moved
    on, one for each place where the source's time starts again. Raises `InputError` for what is not a video, an unknown
    colour matrix and images of several sizes, and `UsageError` for a piece without frames, a frame rate for a source
    that has its own times, and what `decoder` does not decode (see `NvdecSource`).
    """

    def __init__(
        self,
        path: Path,
        *,
        deinterlace: bool = True,
        start: Position | None = None,
        end: Position | None = None,
        frame_rate: Fraction | None = None,
        decoder: Decoder = "software",
    ) -> None:
        _check_piece(start, end)
        self.notices: list[str] = []
        self.window: tuple[Fraction | None, Fraction | None] = (None, None)
        self.frames_read = 0  # decoded, wanted or not
        self.end = 0
        self._start, self._end = start, end
        self._interlaced = self._damaged = self._rescaled = 0
        self._late_alpha = False
        self._late_depth = 0
        self._not_kept: dict[str, None] = {}
        self._texts: dict[str, None] = {}
        self._source = open_source(path, frame_rate) if decoder == "software" else NvdecSource(path, frame_rate)
        try:
            pictures = self._source.pictures()
            first = first_picture(self._source, pictures)
            self.info = describe(self._source, first)
            self._timeline = Timeline(self._source.start_pts, self.info.step)
            self._pictures = chain([first], pictures)
            self._deinterlace = deinterlace and has_fields(self.info.codec)
            self._coded_size = first.width, first.height
            self._tags: ColorTags | None = None
            self._form = _form(first)
            self._to_rgb = self._converter(first)
            side_data = SideData(first)
            self._orientation = side_data.orientation
        except BaseException:
            self._source.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()

    def __iter__(self) -> Iterator[Frame]:
        pictures = self._placed()
        if self._deinterlace:
            pictures = deinterlaced(pictures, self.info.time_base)
        first: int | None = None
        last = 0
        for picture in self._wanted(pictures):
            frame = self._frame(picture)
            first, last = frame.pts if first is None else first, frame.pts
            yield frame
        if first is None:
            raise self._no_frame()
        if missing := self._source.missing(first, last):
            images = counted(missing, "image")
            self.notices.append(f"missing of `{self.info.path}`: {images}; a video shows those before longer")
        self.notices += [*self._source.notices, *self._findings()]

    @property
    def moves(self) -> tuple[Fraction, ...]:
        return tuple(move * self.info.time_base for move in self._timeline.moves)

    def _placed(self) -> Iterator[av.VideoFrame]:
        """All pictures that decode, each with its place in time."""
        held: deque[av.VideoFrame | None] = deque()
        ahead = 0 if self._source.stills else LOOK_AHEAD  # no file tells the times of images
        for read in chain(self._pictures, [None] * ahead):
            held.append(read)
            if len(held) <= ahead or (picture := held.popleft()) is None:
                continue
            picture.pts = self._timeline.place(picture.pts, [after.pts for after in held if after is not None])
            self.frames_read += 1
            self._not_kept |= dict.fromkeys(SideData(picture).not_kept(self._source.views_are_tagged))
            if self._source.of_images:
                self._texts |= dict.fromkeys(image_texts(picture))
            self._damaged += picture.is_corrupt
            self._interlaced += picture.interlaced_frame
            self.end = picture.pts + self._duration(picture)
            yield picture

    def _duration(self, picture: av.VideoFrame) -> int:
        """For how many ticks the picture is shown if it is the last: as long as it says, where the container agrees."""
        length, step = picture.duration, self.info.step
        if self._source.stills or length <= 0 or self.info.duration is None or picture.pts is None:
            return step
        most = self._source.start_pts + self.info.duration / self.info.time_base + step
        return length if picture.pts + length <= most else step

    def _wanted(self, pictures: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """The pictures of the piece; sets `window`."""
        first_time: Fraction | None = None
        for number, picture in enumerate(pictures):
            assert picture.pts is not None, "every picture has its place by now"
            time = picture.pts * self.info.time_base
            first_time = time if first_time is None else first_time
            if self._end is not None and _is_reached(self._end, number, time - first_time):
                self.window, self.end = (self.window[0], time), picture.pts
                return
            if self._start is not None:
                if not _is_reached(self._start, number, time - first_time):
                    continue
                self.window = (time if self.window[0] is None else self.window[0]), None
            yield picture

    def _frame(self, picture: av.VideoFrame) -> Frame:
        if self._source.stills:
            self._orientation = SideData(picture).orientation
        if (form := _form(picture)) != self._form:
            self._form, self._to_rgb = form, self._converter(picture)
            if not self._interlaced:  # bwdif brings some to a deeper format
                self._late_depth = max(self._late_depth, min(bit_depth(picture.format), 16))
        # Of palettes the form does not tell.
        self._late_alpha = self._late_alpha or (not self.info.has_alpha and has_alpha(picture, self.info.codec))
        self._rescaled += not self._source.stills and (picture.width, picture.height) != self._coded_size
        assert picture.pts is not None, "every picture has its place by now"
        pixels = self._orientation.upright(self._to_rgb(picture, self.info.has_alpha))
        if not self.info.has_alpha:
            return Frame(pixels, picture.pts, self.info.time_base)
        alpha = np.ascontiguousarray(pixels[..., 3])
        return Frame(np.ascontiguousarray(pixels[..., :3]), picture.pts, self.info.time_base, alpha)

    def _converter(self, picture: av.VideoFrame) -> FrameToRgb:
        """For this picture's tags, or, where a later one has tags that nobody knows, for those before it."""
        tags = picture_tags(picture)
        known = decoding_tags(tags, picture.width, picture.height) or self._tags
        if known is None:
            raise InputError(f"unsupported colour matrix {tags.matrix} (H.273) in `{self.info.path}`")
        self._tags = known
        return FrameToRgb(known, self.info.bit_depth, None if self._source.stills else self._coded_size)

    def _findings(self) -> list[str]:
        findings: list[str] = [f"{what} is not kept" for what in self._not_kept]
        if self._texts:
            names = shorten(", ".join(self._texts), _NAMES_SHOWN, placeholder=" ...")
            findings.append(f"metadata of images is not kept: {names}")
        if self._interlaced and has_fields(self.info.codec):
            share = "" if self._interlaced == self.frames_read else f" in {counted(self._interlaced, 'frame')}"
            kept = "deinterlaced with bwdif" if self._deinterlace else "the fields are upscaled as they are woven"
            findings.append(Remark(f"the video is interlaced{share}: {kept}"))
        if self._rescaled:
            size = f"{self._coded_size[0]}x{self._coded_size[1]}"
            rescaled = counted(self._rescaled, "frame")
            findings.append(f"the size changes in mid-stream: {rescaled} rescaled to {size}")
        if self._late_alpha:
            findings.append("transparency that begins after the first frame is not kept")
        if self._late_depth > self.info.bit_depth:
            first_has = f"the first has {self.info.bit_depth}"
            findings.append(f"the {self._late_depth} bits of later frames are not kept: {first_has}")
        if self._timeline.misplaced:
            misplaced = counted(self._timeline.misplaced, "frame")
            findings.append(f"{misplaced} without a usable timestamp, placed after those before")
        whole = self.window[1] is None
        if self._source.damaged or self._damaged or (whole and self._source.is_incomplete(self.frames_read)):
            # Of a damaged file the estimate may be less than there are.
            of = f" of {self.info.num_frames}" if whole and (self.info.num_frames or 0) >= self.frames_read else ""
            damaged = f", {self._damaged} of them with visible damage" if self._damaged else ""
            findings.append(f"damaged input: decoded {self.frames_read}{of} frames{damaged}")
        return findings

    def _no_frame(self) -> UsageError:
        if self.window[1] is not None:
            return UsageError(f"no frame of `{self.info.path}` lies between start and end", hint=_PIECE_HINT)
        return UsageError(
            f"the piece starts after the end of `{self.info.path}`", hint=f"it has {counted(self.frames_read, 'frame')}"
        )


_PIECE_HINT = "the end is the first frame that is not wanted"


def _check_piece(start: Position | None, end: Position | None) -> None:
    begin = start or Position(Fraction(0), 0)
    if end is None:
        return
    pairs = ((begin.frame, end.frame), (begin.seconds, end.seconds))
    if any(first is not None and last is not None and first >= last for first, last in pairs):
        raise UsageError("the piece ends before it starts", hint=_PIECE_HINT)


def _is_reached(position: Position, number: int, elapsed: Fraction) -> bool:
    """Whether the frame of this number, `elapsed` s after the first, is at or after the position."""
    if position.frame is not None:
        return number >= position.frame
    assert position.seconds is not None, "a position is a frame or a time"
    return elapsed >= position.seconds


def _form(picture: av.VideoFrame) -> tuple[int, int, str, ColorTags]:
    """What a conversion depends on."""
    return picture.width, picture.height, picture.format.name, picture_tags(picture)

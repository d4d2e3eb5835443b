"""Reading: every frame that decodes, upright, as RGB, at its own time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import av
import numpy as np
from av.sidedata.sidedata import SideData, SideDataContainer

from duovsr.errors import InputError
from duovsr.video.color import FrameToRgb, decoding_tags
from duovsr.video.info import VideoInfo, main_video, open_input, probe

_HDR_SIDE_DATA = ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL", "DYNAMIC_HDR_PLUS", "DOVI_METADATA")


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture, shown at `pts` x `time_base` s. `pixels`: (H, W, 3) RGB, uint8 or (full 16-bit scale) uint16.
    `alpha`: (H, W) of the same type, where the source has transparency; colours are not premultiplied."""

    pixels: np.ndarray
    pts: int
    time_base: Fraction
    alpha: np.ndarray | None = None


class VideoReader:
    """Iterates once over a clip's frames in presentation order. One decoded frame is held at a time.

    `notices` has what people should know of the source; it is complete when the iteration has ended. Raises
    `InputError` for what is not a video, an unknown colour matrix, and a size that changes in mid-stream.
    """

    def __init__(self, path: Path) -> None:
        self.info = probe(path)
        self.notices: list[str] = []
        self.frames_read = 0
        self._to_rgb = _converter(self.info)
        self._container = open_input(path)
        self._stream = main_video(self._container, path)
        rate = self.info.frame_rate or Fraction(25)
        self._step = max(1, round(1 / (rate * self.info.time_base)))
        self._last_pts: int | None = None
        self._misplaced = 0
        self._damaged_packets = 0
        self._damaged_pictures = 0
        self._demuxed_until = Fraction(0)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        orientation = _Orientation()
        for picture in self._decode():
            if self.frames_read == 0:
                # Of the first picture alone: looking at side data leaves a frame to the cycle collector, late.
                self.notices += _losses(picture)
                orientation = _Orientation.of(picture)
            pixels = orientation.upright(self._to_rgb(picture))
            height, width, _ = pixels.shape
            if (width, height) != (self.info.width, self.info.height):
                raise InputError(
                    f"the size changes from {self.info.width}x{self.info.height} to {width}x{height}"
                    f" at frame {self.frames_read} of `{self.info.path}`",
                    hint="split the file where the size changes",
                )
            self._damaged_pictures += picture.is_corrupt
            self._last_pts = self._place(picture.pts)
            self.frames_read += 1
            yield Frame(pixels, self._last_pts, self.info.time_base)
        self.notices += self._findings()

    def _decode(self) -> Iterator[av.VideoFrame]:
        packets = self._container.demux()
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:  # the container is broken from here on
                self._damaged_packets += 1
                packet = None
            if packet is None:
                break
            if packet.pts is not None:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                self._demuxed_until = max(self._demuxed_until, end)
            if packet.stream_index == self._stream.index and packet.size:
                yield from self._pictures(packet)
        yield from self._pictures(None)  # what the decoder still holds back for reordering

    def _pictures(self, packet: av.Packet[Any] | None) -> Iterator[av.VideoFrame]:
        try:
            yield from self._stream.decode(packet)
        except av.error.InvalidDataError:
            self._damaged_packets += 1

    def _place(self, pts: int | None) -> int:
        """A frame without a pts, or one not after the frame before, takes the next regular place on the timeline."""
        if pts is not None and (self._last_pts is None or pts > self._last_pts):
            return pts
        self._misplaced += 1
        return (self._stream.start_time or 0) if self._last_pts is None else self._last_pts + self._step

    def _findings(self) -> list[str]:
        findings = []
        if self._misplaced:
            findings.append(f"{self._misplaced} frames had no usable timestamp and were placed by the frame rate")
        if self._damaged_packets or self._damaged_pictures or self._cut_off():
            of = f" of {self.info.num_frames}" if self.info.num_frames else ""
            damaged = f", {self._damaged_pictures} of them with visible damage" if self._damaged_pictures else ""
            findings.append(f"damaged input: decoded {self.frames_read}{of} frames{damaged}")
        return findings

    def _cut_off(self) -> bool:
        """Whether all streams end well before the container says they do: a truncated mkv gives no other sign."""
        if not self._container.duration or not self._demuxed_until:
            return False
        end = Fraction((self._container.start_time or 0) + self._container.duration, av.time_base)
        return end - self._demuxed_until > max(2 * self._step * self.info.time_base, Fraction(1, 2))


def _converter(info: VideoInfo) -> FrameToRgb:
    sides = (info.width, info.height) if info.rotation % 180 == 0 else (info.height, info.width)
    tags = decoding_tags(info.color, *sides)
    if tags is None:
        raise InputError(f"unsupported colour matrix {info.color.matrix} (H.273) in `{info.path}`")
    return FrameToRgb(tags, info.bit_depth)


class _Orientation(NamedTuple):
    """A display matrix as a transposition and flips, which covers mirrored pictures and rotated ones."""

    transposed: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, picture: av.VideoFrame) -> _Orientation:
        matrix = _side_data(picture, "DISPLAYMATRIX")
        if matrix is None:
            return cls()
        a, b, _, c, d = np.frombuffer(memoryview(matrix), np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
        return cls(True, c < 0, b < 0) if abs(b) > abs(a) else cls(False, a < 0, d < 0)

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        return np.ascontiguousarray(pixels[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1])


def _side_data(picture: av.VideoFrame, kind: str) -> SideData | None:
    return cast(SideDataContainer, picture.side_data).get(kind)


def _losses(picture: av.VideoFrame) -> list[str]:
    """What the first picture has that RGB frames do not carry on."""
    losses = []
    if picture.interlaced_frame:
        losses.append("the video is interlaced: its fields are upscaled as they are woven into frames")
    if any(component.is_alpha for component in picture.format.components):
        losses.append("transparency is not kept")
    if any(_side_data(picture, kind) for kind in _HDR_SIDE_DATA):
        losses.append("HDR10 mastering data is not kept")
    return losses

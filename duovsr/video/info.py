"""What a video is: described from its container and its first picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path

import av

from duovsr.errors import InputError
from duovsr.options import PIPE, Position
from duovsr.video.color import ColorTags, bit_depth, chroma_samples, has_alpha_channel, image_tags, picture_tags
from duovsr.video.sidedata import HDRMetadata, SideData
from duovsr.video.source import IMAGES_RATE, Source

_FINEST_ASPECT = 4096  # H.264 has 16 bits for each part of it


@dataclass(frozen=True)
class VideoInfo:
    """A clip's properties, as its first picture and its container tell them. Sizes are upright, after rotation."""

    path: Path  # `-` for standard input
    width: int
    height: int
    time_base: Fraction
    frame_rate: Fraction | None  # average
    num_frames: int | None  # the container's claim or an estimate: for progress, never for correctness
    duration: Fraction | None  # seconds
    sample_aspect_ratio: Fraction | None
    rotation: int  # degrees counterclockwise that make the coded picture upright; the reader applies them
    bit_depth: int
    color: ColorTags  # as tagged, else of images sRGB's; RGB formats are matrix 0 and full range
    codec: str
    audio_codec: str | None
    chroma_samples: Fraction = Fraction(1, 4)  # of colour, a pixel
    has_alpha: bool = False  # frames have `alpha`
    interlaced: bool = False  # of the first picture: others may differ, and are read as they are marked
    hdr: HDRMetadata | None = None

    @property
    def step(self) -> int:
        """Ticks of `time_base` from frame to frame, on average."""
        return max(1, round(1 / ((self.frame_rate or IMAGES_RATE) * self.time_base)))

    def aspect_at(self, width: int, height: int) -> Fraction | None:
        """Of the pixels of an output, which is shown in the source's shape. Rounding to whole pixels stretches none."""
        across, down = width * self.height, height * self.width
        if self.sample_aspect_ratio is None or 2 * abs(across - down) <= self.width + self.height:
            return self.sample_aspect_ratio
        return (self.sample_aspect_ratio * Fraction(down, across)).limit_denominator(_FINEST_ASPECT)

    def frames_between(self, start: Position | None, end: Position | None) -> int | None:
        """`num_frames` of a piece: as good as that for numbers of frames, an estimate for seconds."""
        if self.num_frames is None:
            return None
        first = 0 if start is None else self._number_at(start)
        last = self.num_frames if end is None else min(self._number_at(end), self.num_frames)
        return max(0, last - first)

    def _number_at(self, position: Position) -> int:
        """Of the first frame at or after it."""
        if position.frame is not None:
            return position.frame
        assert position.seconds is not None, "a position is a frame or a time"
        return ceil(position.seconds * (self.frame_rate or IMAGES_RATE))


def first_picture(source: Source, pictures: Iterator[av.VideoFrame]) -> av.VideoFrame:
    """The next of `pictures`. Raises `InputError` if there is none."""
    picture = next(pictures, None)
    if picture is None:
        hint = None
        if source.codec == "webp":
            hint = "an animated WebP is not read: make a .gif or a video of it first"
        elif source.path == PIPE:  # FFmpeg opens it, and cannot go back from the index to the pictures
            hint = (
                "of an mp4 or mov in a pipe, the index must come first: give the file itself, `< FILE`, or a NUT or mkv"
            )
        raise InputError(f"no picture of `{source.path}` can be decoded", hint=hint)
    return picture


def describe(source: Source, picture: av.VideoFrame) -> VideoInfo:
    """The properties of an opened source, whose first picture this is."""
    side_data = SideData(picture)
    upright = not side_data.orientation.transposed
    aspect = source.sample_aspect_ratio
    return VideoInfo(
        path=source.path,
        width=picture.width if upright else picture.height,
        height=picture.height if upright else picture.width,
        time_base=source.time_base,
        frame_rate=source.frame_rate,
        num_frames=source.num_frames,
        duration=source.duration,
        sample_aspect_ratio=1 / aspect if aspect and not upright else aspect,
        rotation=round(picture.rotation / 90) * 90 % 360,
        bit_depth=min(bit_depth(picture.format), 16),
        color=image_tags(picture) if source.of_images else picture_tags(picture),
        codec=source.codec,
        audio_codec=source.audio_codec,
        chroma_samples=chroma_samples(picture.format),
        has_alpha=has_alpha(picture, source.codec),
        interlaced=picture.interlaced_frame and has_fields(source.codec),
        hdr=side_data.hdr,
    )


def has_alpha(picture: av.VideoFrame, codec: str) -> bool:
    """Whether a picture's format has transparency; where every format does (palettes, GIF), whether the picture has."""
    if picture.format.has_palette or codec == "gif":
        return bool((picture.reformat(format="rgba").to_ndarray()[..., 3] < 255).any())
    return has_alpha_channel(picture.format)


def has_fields(codec: str) -> bool:
    """Whether an "interlaced" picture of the codec is of two moments: of PNG it is one, coded in passes."""
    return codec not in ("png", "apng")

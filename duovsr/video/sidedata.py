"""What a decoded picture carries beside its pixels: how it is turned, the display it was graded on, texts of images."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import SideDataContainer

_Point = tuple[int, int]  # CIE 1931 x and y, in 1/50000

# Types that PyAV's enum has no names for, EXIF (31) among them: it raises at them, whichever type is asked for.
_NAMELESS_TYPES = range(28, 40)
# PyAV frees a profile's name, which PNG has, as its own: FFmpeg frees it again, and the process dies.
_FORMATS_OF_PNG = ("rgb", "pal", "gray", "ya", "mono")
_HDR = "dynamic HDR metadata (HDR10+, Dolby Vision)"
_NOT_KEPT = {  # PyAV has no way to give it to an encoder
    **dict.fromkeys(("DYNAMIC_HDR_PLUS", "DYNAMIC_HDR_VIVID", "DOVI_METADATA", "DOVI_RPU_BUFFER"), _HDR),
    "A53_CC": "closed captioning inside the pictures",
    "STEREO3D": "the arrangement of the two views of 3D",
    "SPHERICAL": "the projection of 360-degree video",
    "ICC_PROFILE": "the ICC colour profile",
}
_OF_THE_FILE = frozenset(  # how TIFF stores its pixels, and who wrote a file: the output has its own
    (
        "0x00FE ImageWidth ImageLength BitsPerSample Compression PhotometricInterpretation FillOrder StripOffsets"
        " SamplesPerPixel RowsPerStrip StripByteCounts XResolution YResolution PlanarConfiguration ResolutionUnit"
        " Predictor ColorMap TileWidth TileLength TileOffsets TileByteCounts ExtraSamples SampleFormat JPEGTables"
        " YCbCrSubSampling YCbCrPositioning Software Creator writer"
    ).split()
)


@dataclass(frozen=True)
class MasteringDisplay:
    """SMPTE ST 2086, in the units of HEVC and of x265's `master-display`: 1/50000, and 1/10000 cd/m2 of luminance."""

    red: _Point
    green: _Point
    blue: _Point
    white: _Point
    min_luminance: int
    max_luminance: int


@dataclass(frozen=True)
class HDRMetadata:
    """HDR10's static metadata: the display, and the light levels (max_cll, max_fall) in cd/m2."""

    mastering_display: MasteringDisplay | None
    light_level: tuple[int, int] | None


class Orientation(NamedTuple):
    """A display matrix as a transposition and flips, which covers mirrored pictures and rotated ones."""

    transposed: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, C) as it is to be shown."""
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        return np.ascontiguousarray(pixels[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1])


class SideData:
    """The side data of one picture."""

    def __init__(self, picture: av.VideoFrame) -> None:
        self._has_named_profile = False
        if picture.format.name.startswith(_FORMATS_OF_PNG):
            self._has_named_profile = _filtered(picture, "mode=select:type=ICC_PROFILE") is not None
            if self._has_named_profile:
                picture = _without(picture, "ICC_PROFILE")
        try:
            items = _items(picture)
        except ValueError:
            items = _items(_without(picture, *_NAMELESS_TYPES))
        self._data = {item.type.name: bytes(memoryview(item)) for item in items}

    @property
    def orientation(self) -> Orientation:
        if "DISPLAYMATRIX" not in self._data:
            return Orientation()
        a, b, _, c, d = struct.unpack_from("=5i", self._data["DISPLAYMATRIX"])  # x' = a x + c y, y' = b x + d y
        return Orientation(True, c < 0, b < 0) if abs(b) > abs(a) else Orientation(False, a < 0, d < 0)

    @property
    def hdr(self) -> HDRMetadata | None:
        display, light = self._mastering_display(), self._data.get("CONTENT_LIGHT_LEVEL")
        if display is None and light is None:
            return None
        # AVContentLightMetadata: two unsigned ints, MaxCLL and MaxFALL.
        cll, fall = struct.unpack_from("=2I", light) if light else (0, 0)
        return HDRMetadata(display, (cll, fall) if light else None)

    def not_kept(self, views_are_tagged: bool) -> list[str]:
        """What encoders are not told, in words; `views_are_tagged`: the stream's own tags say how 3D is arranged."""
        views = self._data.get("STEREO3D", b"")[:4]  # an int, 0 for a single one
        profile = self._data.get("ICC_PROFILE", b"").replace(b"\0", b"")
        harmless = {"STEREO3D": views_are_tagged or not any(views), "ICC_PROFILE": b"sRGB" in profile}
        kinds = {*self._data, *(["ICC_PROFILE"] if self._has_named_profile else [])}
        return [what for kind, what in _NOT_KEPT.items() if kind in kinds and not harmless.get(kind)]

    def _mastering_display(self) -> MasteringDisplay | None:
        """AVMasteringDisplayMetadata: rationals of two ints, x and y of red, green, blue and white, the least and the
        greatest luminance; then whether the colours are known, and the luminances."""
        data = self._data.get("MASTERING_DISPLAY_METADATA")
        if data is None:
            return None
        *ints, has_primaries, has_luminance = struct.unpack_from("=22i", data)
        if not (has_primaries and has_luminance) or 0 in ints[1::2]:
            return None
        ratios = [top / bottom for top, bottom in zip(ints[::2], ints[1::2], strict=True)]
        x_y = [round(ratio * 50000) for ratio in ratios[:8]]
        least, most = (round(ratio * 10000) for ratio in ratios[8:])
        red, green, blue, white = zip(x_y[::2], x_y[1::2], strict=True)
        return MasteringDisplay(red, green, blue, white, least, most)


def image_texts(picture: av.VideoFrame) -> list[str]:
    """The names of an image's EXIF fields and texts, as far as FFmpeg reads them."""
    try:
        return [name for name, text in picture.metadata.items() if text and name not in _OF_THE_FILE]
    except UnicodeDecodeError:
        return ["texts in an unknown encoding"]


def _items(picture: av.VideoFrame) -> SideDataContainer:
    # Not `picture.side_data`: with that, the picture refers to itself, and waits for the cycle collector.
    return SideDataContainer(picture)  # type: ignore[call-arg]  # PyAV's stubs lack the argument


def _without(picture: av.VideoFrame, *kinds: str | int) -> av.VideoFrame:
    cleaned = _filtered(picture, *(f"mode=delete:type={kind}" for kind in kinds))
    assert cleaned is not None, "nothing is held back"
    return cleaned


def _filtered(picture: av.VideoFrame, *tasks: str) -> av.VideoFrame | None:
    """After FFmpeg's filter of side data; None: it holds the picture back."""
    graph = Graph()
    source = graph.add_buffer(
        width=picture.width, height=picture.height, format=picture.format, time_base=picture.time_base
    )
    graph.link_nodes(source, *(graph.add("sidedata", task) for task in tasks), graph.add("buffersink")).configure()
    graph.vpush(picture)
    try:
        return graph.vpull()
    except av.error.BlockingIOError:
        return None

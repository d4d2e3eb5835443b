"""Colour tags, and the conversions between coded frames and RGB arrays.

Tags are the code points of ITU-T H.273, which FFmpeg shares: a wrong matrix or range shifts every colour, so a
conversion here never runs on a guess that a player would not make too.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from duovsr.errors import InputError

RGB, BT709, UNSPECIFIED, SMPTE170M, BT2020 = 0, 1, 2, 6, 9  # matrix codes (primaries and transfers: the same numbers)
SRGB_TRANSFER = 13  # IEC 61966-2-1
LIMITED, FULL = 1, 2  # range codes; 0 is unspecified

LUMA_WEIGHTS = {  # matrix code: (Kr, Kb), H.273 table 4
    BT709: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    SMPTE170M: (0.299, 0.114),
    7: (0.212, 0.087),
    BT2020: (0.2627, 0.0593),
}
USUAL_COMPANIONS = {  # matrix code: (primaries, transfer) where only the matrix is known
    BT709: (BT709, BT709),
    4: (4, 4),
    5: (5, SMPTE170M),
    SMPTE170M: (SMPTE170M, SMPTE170M),
    7: (7, 7),
    BT2020: (BT2020, 14),
}

_SWSCALE_601 = 5  # swscale's own number for the 601 matrix; for the other matrices it uses the H.273 code
_SWSCALE_FLAGS = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
_BYTES_TO_SWAP = ("rgb555be", "bgr555be", "rgb565be", "bgr565be")  # swscale makes wrong colours of them (FFmpeg 8.1)
_BAND_PIXELS = 32768  # a float32 band of three channels fits the L2 cache: 2-3x faster than whole 4K frames


@dataclass(frozen=True)
class ColorTags:
    """H.273 code points. 2 is "unspecified" for the first three, 0 for `range` (1 limited, 2 full)."""

    primaries: int
    transfer: int
    matrix: int
    range: int


def matrix_by_size(width: int, height: int) -> int:
    """The matrix that players assume for untagged video of this size."""
    return BT709 if width >= 1280 or height > 576 else SMPTE170M


def decoding_tags(tags: ColorTags, width: int, height: int) -> ColorTags | None:
    """`tags` with matrix and range settled for a coded `width` x `height`; None if the matrix is one we do not know."""
    if tags.matrix == RGB:
        return tags
    if tags.matrix not in LUMA_WEIGHTS and tags.matrix != UNSPECIFIED:
        return None
    matrix = tags.matrix if tags.matrix in LUMA_WEIGHTS else matrix_by_size(width, height)
    return replace(tags, matrix=matrix, range=tags.range or LIMITED)


def output_tags(source: ColorTags, width: int, height: int, pix_fmt: str) -> ColorTags:
    """Complete tags of an output of this size: the source's where it has them, else what players assume of it. RGB has
    no matrix: of BT.2020's primaries it gets theirs, as HDR10 demands and televisions take for granted. Gray is full
    range, which swscale makes whatever it is asked for."""
    usual = BT2020 if (source.matrix, source.primaries) == (RGB, BT2020) else matrix_by_size(width, height)
    matrix = source.matrix if source.matrix in LUMA_WEIGHTS else usual
    primaries, transfer = USUAL_COMPANIONS[matrix]
    layout = av.VideoFormat(pix_fmt)
    full = _is_gray(layout) or (source.range == FULL and source.matrix != RGB)
    tags = ColorTags(
        primaries=source.primaries if source.primaries != UNSPECIFIED else primaries,
        transfer=source.transfer if source.transfer != UNSPECIFIED else transfer,
        matrix=matrix,
        range=FULL if full else LIMITED,
    )
    return replace(tags, matrix=RGB, range=FULL) if layout.is_rgb else tags


def bit_depth(pix_fmt: av.VideoFormat) -> int:
    """Bits of the deepest component."""
    return max(component.bits for component in pix_fmt.components)


def picture_tags(picture: av.VideoFrame) -> ColorTags:
    """A decoded picture's tags, as far as they can be true of its pixel format."""
    tags = ColorTags(picture.color_primaries, picture.color_trc, picture.colorspace, picture.color_range)
    if picture.format.is_rgb or picture.format.has_palette:
        return ColorTags(tags.primaries, tags.transfer, RGB, FULL)
    # Some YUV files claim matrix 0 or the reserved 3; "yuvj" and gray formats are full range by convention.
    matrix = UNSPECIFIED if tags.matrix in (RGB, 3) else tags.matrix
    by_format = FULL if picture.format.name.startswith(("yuvj", "gray", "ya", "mono")) else 0
    return ColorTags(tags.primaries, tags.transfer, matrix, tags.range or by_format)


def image_tags(picture: av.VideoFrame) -> ColorTags:
    """`picture_tags` of a picture from an image file: untagged ones are sRGB, of any size, as viewers take them."""
    tags = picture_tags(picture)
    return replace(
        tags,
        primaries=BT709 if tags.primaries == UNSPECIFIED else tags.primaries,
        transfer=SRGB_TRANSFER if tags.transfer == UNSPECIFIED else tags.transfer,
    )


def has_alpha_channel(pix_fmt: av.VideoFormat) -> bool:
    return any(component.is_alpha for component in pix_fmt.components)


def chroma_samples(pix_fmt: av.VideoFormat) -> Fraction:
    """Samples of colour a pixel: 1 in 4:4:4 and RGB, 1/4 in 4:2:0, 0 in gray."""
    if _is_gray(pix_fmt):
        return Fraction(0)
    return Fraction(pix_fmt.chroma_width(16) * pix_fmt.chroma_height(16), 16 * 16)


class FrameToRgb:
    """Converts the decoded frames of one stream, to `size` (width, height) where it is given. `tags` must come from
    `decoding_tags`. Raises `InputError` for a frame in a pixel format that swscale cannot read."""

    def __init__(self, tags: ColorTags, depth: int, size: tuple[int, int] | None = None) -> None:
        self._tags = tags
        self._depth = next((bits for bits in (8, 10, 12, 14) if depth <= bits), 16)
        self._size = size
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, alpha: bool = False) -> np.ndarray:
        """(H, W, 3) RGB, or with `alpha` (H, W, 4) RGBA: uint8 for 8-bit streams, else uint16 on the full 16-bit scale.

        A frame without transparency is opaque; colours are not premultiplied.
        """
        deep = self._depth > 8
        if _is_gray(frame.format):
            return self._gray_to_rgb(frame, alpha)
        if self._tags.matrix != RGB:
            frame.colorspace, frame.color_range = self._tags.matrix, self._tags.range
        if self._tags.matrix == RGB or not deep:
            layout = ("rgba64le" if deep else "rgba") if alpha else ("rgb48le" if deep else "rgb24")
            return self._reformat(frame, layout).to_ndarray()
        # swscale's 16-bit RGB puts white at 65280 or 65472, by range; its chroma resampling is exact: use only that.
        planes = _planes(self._reformat(frame, f"yuv{'a' * alpha}444p{self._depth}le"))
        rgb = _yuv_to_rgb16(planes[:3], self._tags, self._depth)
        return np.dstack([rgb, self._scaled(planes[3], FULL)]) if alpha else rgb

    def _gray_to_rgb(self, frame: av.VideoFrame, alpha: bool) -> np.ndarray:
        # From gray to gray, swscale keeps the codes; to RGB, it would take them for full range whatever their tag.
        depth = "" if self._depth == 8 else f"{self._depth}le"
        value = self._scaled(_planes(self._reformat(frame, f"gray{depth}"))[0], self._tags.range)
        if not alpha:
            return np.dstack([value] * 3)
        return np.dstack([value] * 3 + [self._scaled(_planes(self._reformat(frame, f"yuva444p{depth}"))[3], FULL)])

    def _scaled(self, codes: np.ndarray, code_range: int) -> np.ndarray:
        """(H, W) codes of luma or alpha on the full scale of the output's type."""
        unit = 2 ** (self._depth - 8)
        black, white = (16 * unit, 235 * unit) if code_range == LIMITED else (0, 2**self._depth - 1)
        dtype = np.uint8 if self._depth == 8 else np.uint16
        top = np.iinfo(dtype).max
        values = (np.arange(2**self._depth) - black) * (top / (white - black))
        return np.rint(values).clip(0, top).astype(dtype)[codes]

    def _reformat(self, frame: av.VideoFrame, pix_fmt: str) -> av.VideoFrame:
        width, height = self._size or (frame.width, frame.height)
        if frame.format.name in _BYTES_TO_SWAP:
            frame = frame.reformat(format=frame.format.name[:-2] + "le")
        try:
            return self._reformatter.reformat(frame, width, height, pix_fmt, interpolation=_SWSCALE_FLAGS)
        except av.error.OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            hint = "write the input anew in a usual one, such as rgb24"
            raise InputError(f"unsupported pixel format of the input: `{frame.format.name}`", hint=hint) from error


class RgbToFrame:
    """Converts RGB arrays to coded frames in `pix_fmt`. `tags` must come from `output_tags`."""

    def __init__(self, tags: ColorTags, pix_fmt: str) -> None:
        self._tags = tags
        self._pix_fmt = pix_fmt
        self._depth = bit_depth(av.VideoFormat(pix_fmt))
        self._reformatter = VideoReformatter()

    def __call__(self, pixels: np.ndarray, alpha: np.ndarray | None = None) -> av.VideoFrame:
        """A tagged frame, without a pts, from (H, W, 3) uint8 or uint16 RGB, and (H, W) `alpha` of the same type."""
        if pixels.dtype == np.uint16 and self._tags.matrix != RGB:
            frame = _rgb16_to_yuv(pixels, alpha, self._tags, self._depth)
            frame.colorspace, frame.color_range = self._tags.matrix, self._tags.range
        elif alpha is not None:
            pixels = np.concatenate([pixels, alpha[..., None]], axis=2)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.dtype == np.uint8 else "rgba64le")
        else:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.dtype == np.uint8 else "rgb48le")
        matrix = _SWSCALE_601 if self._tags.matrix == SMPTE170M else self._tags.matrix
        coded = self._reformatter.reformat(
            frame,
            format=self._pix_fmt,
            dst_colorspace=matrix,
            dst_color_range=self._tags.range,
            interpolation=_SWSCALE_FLAGS,
        )
        coded.color_primaries, coded.color_trc = self._tags.primaries, self._tags.transfer
        coded.colorspace, coded.color_range = self._tags.matrix, self._tags.range
        return coded


def _is_gray(pix_fmt: av.VideoFormat) -> bool:
    return not pix_fmt.has_palette and sum(not component.is_alpha for component in pix_fmt.components) == 1


def _planes(frame: av.VideoFrame) -> list[np.ndarray]:
    """Writable views of the planes, each (H, W) uint8 or uint16."""
    dtype = np.uint8 if bit_depth(frame.format) == 8 else np.uint16
    rows = [(plane, np.frombuffer(memoryview(plane), dtype).reshape(plane.height, -1)) for plane in frame.planes]
    return [padded[:, : plane.width] for plane, padded in rows]


def _rgb_from_codes(tags: ColorTags, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) `matrix` and (3, 1) `offset`, float64: RGB in 0..1 = matrix @ (YUV codes - offset) (H.273, 8.3)."""
    kr, kb = LUMA_WEIGHTS[tags.matrix]
    kg = 1 - kr - kb
    unit = 2.0 ** (depth - 8)
    luma, chroma = (219 * unit, 224 * unit) if tags.range == LIMITED else (2.0**depth - 1, 2.0**depth - 1)
    matrix = np.array(
        [
            [1, 0, 2 * (1 - kr)],
            [1, -2 * (1 - kb) * kb / kg, -2 * (1 - kr) * kr / kg],
            [1, 2 * (1 - kb), 0],
        ]
    )
    offset = np.array([[16 * unit if tags.range == LIMITED else 0], [128 * unit], [128 * unit]])
    return matrix / np.array([luma, chroma, chroma]), offset


def _bands(height: int, width: int) -> list[slice]:
    rows = max(1, _BAND_PIXELS // width)
    return [slice(top, top + rows) for top in range(0, height, rows)]


def _yuv_to_rgb16(planes: list[np.ndarray], tags: ColorTags, depth: int) -> np.ndarray:
    """(H, W, 3) uint16 from three (H, W) planes of `depth`-bit codes."""
    height, width = planes[0].shape
    to_rgb, offset = _rgb_from_codes(tags, depth)
    to_rgb, offset = (65535 * to_rgb).astype(np.float32), offset.astype(np.float32)
    rgb = np.empty((height, width, 3), np.uint16)
    for band in _bands(height, width):
        codes = np.stack([plane[band].ravel() for plane in planes]).astype(np.float32)  # (3, N)
        values = np.rint(to_rgb @ (codes - offset)).clip(0, 65535)
        rgb[band] = values.T.reshape(-1, width, 3)
    return rgb


def _rgb16_to_yuv(pixels: np.ndarray, alpha: np.ndarray | None, tags: ColorTags, depth: int) -> av.VideoFrame:
    """A 4:4:4 or 4:4:4:4 frame of `depth`-bit codes from (H, W, 3) and (H, W) uint16."""
    height, width, _ = pixels.shape
    to_rgb, offset = _rgb_from_codes(tags, depth)
    to_codes, offset = (np.linalg.inv(to_rgb) / 65535).astype(np.float32), offset.astype(np.float32)
    layout = "yuv444p" if alpha is None else "yuva444p"
    frame = av.VideoFrame(width, height, layout if depth == 8 else f"{layout}{depth}le")
    planes = _planes(frame)
    if alpha is not None:  # always full range
        planes[3][:] = np.rint(alpha.astype(np.float32) * ((2**depth - 1) / 65535))
    for band in _bands(height, width):
        codes = to_codes @ pixels[band].reshape(-1, 3).T.astype(np.float32) + offset  # (3, N)
        codes = np.rint(codes).clip(0, 2**depth - 1)
        for plane, channel in zip(planes, codes, strict=False):  # the alpha plane is done
            plane[band] = channel.reshape(-1, width)
    return frame

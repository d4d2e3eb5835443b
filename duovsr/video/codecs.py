"""Which encoder writes the output, in which pixel format, with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import av

from duovsr.errors import UsageError
from duovsr.video.color import bit_depth
from duovsr.video.info import VideoInfo


@dataclass(frozen=True)
class Codec:
    """An encoder with its defaults. Pixel formats are pairs: for 8-bit sources, for sources above 8 bit."""

    encoder: str
    pix_fmts: tuple[str, str]
    crf: int | None  # the default; None: the codec has no such setting
    max_crf: int = 51
    odd_pix_fmts: tuple[str, str] | None = None  # instead, where the encoder refuses odd sides in 4:2:0
    options: Mapping[str, str] = field(default_factory=dict)


CODECS: dict[str, Codec] = {
    "h264": Codec(
        "libx264",
        ("yuv420p", "yuv420p10le"),
        crf=18,
        odd_pix_fmts=("yuv444p", "yuv444p10le"),
        options={"preset": "medium"},
    ),
    "hevc": Codec(
        "libx265",
        ("yuv420p", "yuv420p10le"),
        crf=20,
        odd_pix_fmts=("yuv444p", "yuv444p10le"),
        options={"preset": "medium", "x265-params": "log-level=none"},
    ),
    "av1": Codec("libsvtav1", ("yuv420p", "yuv420p10le"), crf=24, max_crf=63, options={"preset": "6"}),
    "vp9": Codec(
        "libvpx-vp9",
        ("yuv420p", "yuv420p"),
        crf=22,
        max_crf=63,
        options={"b": "0", "row-mt": "1", "cpu-used": "2"},  # b=0: constant quality, not "constrained"
    ),
    "prores": Codec("prores_ks", ("yuv422p10le", "yuv422p10le"), crf=None),
    "ffv1": Codec("ffv1", ("bgr0", "gbrp16le"), crf=None, options={"level": "3", "slicecrc": "1"}),
}


@dataclass(frozen=True)
class Encoding:
    """A settled choice: what to hand to the encoder, and what to tell people about it."""

    name: str
    encoder: str
    pix_fmt: str
    options: dict[str, str]
    notices: tuple[str, ...]


X265_MIN_WIDTH = 64  # below its block size, libx265 corrupts memory and takes the process down


def choose_encoding(
    source: VideoInfo,
    width: int,
    height: int,
    format_name: str,
    *,
    codec: str | None,
    crf: int | None,
    pix_fmt: str | None,
) -> Encoding:
    """Settles codec, pixel format and quality; what is None follows the source and the container.

    Raises `UsageError` for an unknown codec, a crf the codec has not, or a pixel format it cannot write.
    """
    deep = source.bit_depth > 8
    name = codec or _default_codec(format_name, deep, width)
    if name not in CODECS:
        raise UsageError(f"unknown codec: `{name}`", hint=f"use one of {', '.join(CODECS)}")
    if name == "hevc" and width < X265_MIN_WIDTH:
        raise UsageError(f"hevc needs {X265_MIN_WIDTH} pixels of width, not {width}", hint="use --codec h264 or ffv1")
    entry = CODECS[name]
    chosen, notices = _pix_fmt(entry, deep, width, height) if pix_fmt is None else (pix_fmt, [])
    if pix_fmt is not None:
        _check_pix_fmt(name, entry, pix_fmt, width, height)
    if deep and bit_depth(av.VideoFormat(chosen)) == 8:
        notices.append(f"the source has {source.bit_depth} bits a channel, the output 8 ({name}, {chosen})")
    options = dict(entry.options)
    if crf is not None and entry.crf is None:
        raise UsageError(f"codec `{name}` has no crf", hint="leave out --crf")
    if crf is not None and not 0 <= crf <= entry.max_crf:
        raise UsageError(f"unsupported crf for {name}: `{crf}`", hint=f"use a whole number from 0 to {entry.max_crf}")
    if entry.crf is not None:
        options["crf"] = str(entry.crf if crf is None else crf)
    return Encoding(name, entry.encoder, chosen, options, tuple(notices))


def _default_codec(format_name: str, deep: bool, width: int) -> str:
    if format_name == "webm":
        return "av1" if deep else "vp9"
    return "hevc" if deep and width >= X265_MIN_WIDTH else "h264"


def _pix_fmt(entry: Codec, deep: bool, width: int, height: int) -> tuple[str, list[str]]:
    if entry.odd_pix_fmts is not None and (width % 2 or height % 2):
        chosen = entry.odd_pix_fmts[deep]
        return chosen, [f"{width}x{height} has an odd side: written as 4:4:4 ({chosen}), which some players refuse"]
    return entry.pix_fmts[deep], []


def _check_pix_fmt(name: str, entry: Codec, pix_fmt: str, width: int, height: int) -> None:
    # "yuvj" formats are an outdated spelling of full range, which is a tag of its own.
    formats = [fmt.name for fmt in av.Codec(entry.encoder, "w").video_formats or () if not fmt.name.startswith("yuvj")]
    if pix_fmt not in formats:
        hint = f"use one of {', '.join(formats)}"
        raise UsageError(f"codec `{name}` cannot write pixel format `{pix_fmt}`", hint=hint)
    chosen = av.VideoFormat(pix_fmt, width, height)
    odd = (width % 2 and chosen.chroma_width(2) == 1) or (height % 2 and chosen.chroma_height(2) == 1)
    if entry.odd_pix_fmts is not None and odd:
        hint = f"use --pix-fmt {entry.odd_pix_fmts[bit_depth(chosen) > 8]}, or leave it out"
        raise UsageError(f"codec `{name}` cannot write {width}x{height} in `{pix_fmt}`", hint=hint)

"""Which encoder writes the output, in which pixel format, with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import av

from duovsr.errors import Remark, UsageError
from duovsr.options import UpscaleOptions
from duovsr.video.color import bit_depth, chroma_samples, has_alpha_channel
from duovsr.video.encoder_options import Options, check_encoder, check_names, is_zero, merge, rate_options, spelt_for
from duovsr.video.hdr import svtav1_parameters, x265_parameters
from duovsr.video.info import VideoInfo
from duovsr.video.output import CONTAINERS, FORMATS, Target
from duovsr.video.sidedata import HDRMetadata


@dataclass(frozen=True)
class Codec:
    """An encoder with its defaults. Pixel formats are pairs: for 8-bit sources, for sources above 8 bit."""

    encoder: str
    pix_fmts: tuple[str, str]
    crf: int | None  # the default; None: the codec has no such setting
    min_crf: int = 0
    max_crf: int = 51
    crf_option: str = "crf"
    odd_pix_fmts: tuple[str, str] | None = None  # instead, where the encoder refuses odd sides in 4:2:0
    alpha_pix_fmts: tuple[str, str] | None = None  # instead, for transparency
    alpha_containers: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    hardware: bool = False  # works on some machines only


# b=0: no rate is aimed at, `cq` alone decides; a `cq` of 0 would leave it to the encoder.
_nvenc = partial(Codec, min_crf=1, crf_option="cq", options={"preset": "p5", "b": "0"}, hardware=True)

# A piece that is encoded again, after an interruption, must come out the same: every setting here was run with the
# heap's fresh memory filled with different bytes (MALLOC_PERTURB_), which tells an encoder that reads memory it never
# wrote, and several times over, which tells a race between threads.
CODECS: dict[str, Codec] = {
    "h264": Codec(
        "libx264",
        ("yuv420p", "yuv420p10le"),
        crf=18,
        odd_pix_fmts=("yuv444p", "yuv444p10le"),
        # The macroblock tree of the wheel's x264 reads memory that it never wrote where there are B-frames: no two runs
        # are alike, at any number of threads, at 64x48 as at 854x480. Without it: 0.1 to 0.8 dB less for the same bytes
        # (PSNR of luma, 60 frames of benchmarks/sample.mp4, crf 14 to 26).
        options={"preset": "medium", "mbtree": "0"},
    ),
    "hevc": Codec(
        "libx265",
        ("yuv420p", "yuv420p10le"),
        crf=20,
        odd_pix_fmts=("yuv444p", "yuv444p10le"),
        # Closed groups of pictures: no picture of a piece may refer to one of the piece before, nor may a seek fail.
        options={"preset": "medium", "x265-params": "log-level=none:open-gop=0"},
    ),
    "av1": Codec("libsvtav1", ("yuv420p", "yuv420p10le"), crf=24, max_crf=63, options={"preset": "6"}),
    "vp9": Codec(
        "libvpx-vp9",
        ("yuv420p", "yuv420p"),
        crf=22,
        max_crf=63,
        alpha_pix_fmts=("yuva420p", "yuva420p"),
        alpha_containers=("matroska", "webm"),
        options={"b": "0", "row-mt": "1", "cpu-used": "2"},  # b=0: constant quality, not "constrained"
    ),
    "prores": Codec(
        "prores_ks",
        ("yuv422p10le", "yuv422p10le"),
        crf=None,
        alpha_pix_fmts=("yuva444p10le", "yuva444p10le"),  # ProRes 4444
        alpha_containers=("matroska", "mov"),
    ),
    "rawvideo": Codec("rawvideo", ("yuv420p", "yuv420p10le"), crf=None, odd_pix_fmts=("yuv444p", "yuv444p10le")),
    "ffv1": Codec(
        "ffv1",
        ("bgr0", "gbrp16le"),
        crf=None,
        alpha_pix_fmts=("bgra", "gbrap16le"),
        alpha_containers=("matroska", "mp4", "nut"),
        options={"level": "3", "slicecrc": "1"},
    ),
    # H.264 at 10 bit is beyond all but the newest of NVIDIA's encoders.
    "h264_nvenc": _nvenc("h264_nvenc", ("yuv420p", "yuv420p"), crf=19),
    "hevc_nvenc": _nvenc("hevc_nvenc", ("yuv420p", "p010le"), crf=22),
    "av1_nvenc": _nvenc("av1_nvenc", ("yuv420p", "p010le"), crf=28, max_crf=63),
}


@dataclass(frozen=True)
class Encoding:
    """A settled choice: what to hand to the encoder, and what to tell people about it.

    `alpha`: the frames' transparency is written too; otherwise it is to be flattened on black.
    """

    name: str
    encoder: str
    pix_fmt: str
    options: dict[str, str]
    notices: tuple[str, ...]
    alpha: bool = False


# FFmpeg lists none for raw video. These are given back as they were written by Y4M, and by NUT, too.
_RAW_PIX_FMTS = [f"gray{depth}" for depth in ("", "9le", "10le", "12le", "16le")] + [
    f"yuv{sampling}p{depth}"
    for sampling in ("420", "422", "444")
    for depth in ("", "9le", "10le", "12le", "14le", "16le")
]
X265_MIN_WIDTH = 64  # below its block size, libx265 corrupts memory and takes the process down
# libsvtav1 4.1 never ends where one side is at most SVT_AV1_STRIP, and the other larger than its block.
SVT_AV1_STRIP, SVT_AV1_BLOCK = 24, 64
SVT_AV1_MAX_RATE = 240  # frames a second, beyond which it does not open


def choose_encoding(
    source: VideoInfo,
    width: int,
    height: int,
    format_name: str,
    *,
    codec: str | None,
    crf: int | None,
    pix_fmt: str | None,
    encoder_options: Options = (),
) -> Encoding:
    """Settles codec, pixel format and quality; what is None follows the source and the container.

    `encoder_options` are the encoder's own, and override what would be chosen: where one decides the rate, there is no
    crf. Raises `UsageError` for an unknown codec, a crf the codec has not or beside such an option, a pixel format it
    cannot write, an option it does not know or whose value it refuses, and an encoder that does not work on this
    machine.
    """
    name = codec or _default_codec(source, format_name, width)
    entry = _known_codec(name)
    if name == "rawvideo" and format_name in CONTAINERS.values():
        raise UsageError("codec `rawvideo` is for pipes alone", hint="use --codec ffv1, which is lossless too")
    check_names(entry.encoder, encoder_options)
    quality = _quality(name, entry, crf, encoder_options)
    _check_size(name, width, height)
    holds_alpha = format_name in entry.alpha_containers
    chosen, notices = _pix_fmt(entry, source, holds_alpha, width, height) if pix_fmt is None else (pix_fmt, [])
    if pix_fmt is not None:
        _check_pix_fmt(name, entry, pix_fmt, width, height)
    alpha = source.has_alpha and holds_alpha and has_alpha_channel(av.VideoFormat(chosen))
    if source.has_alpha and not alpha:
        notices.append(f"transparency is flattened on black: {name} in {format_name} ({chosen}) does not hold it")
    if source.bit_depth > 8 and bit_depth(av.VideoFormat(chosen)) == 8:
        notices.append(f"the source has {source.bit_depth} bits a channel, the output 8 ({name}, {chosen})")
    hdr_options, lost = _hdr_options(name, source.hdr)
    options = merge(entry.options, spelt_for(entry.encoder, quality + hdr_options + encoder_options))
    if encoder_options or entry.hardware:
        check_encoder(entry.encoder, chosen, width, height, options, encoder_options, entry.hardware)
    return Encoding(name, entry.encoder, chosen, options, (*notices, *lost), alpha)


def encoding_for(target: Target, info: VideoInfo, size: tuple[int, int], options: UpscaleOptions) -> Encoding:
    """How the frames are encoded for `target`. Raises UsageError for what its container or codec cannot do."""
    if target.kind in ("image", "images"):
        return _encoding_of_pictures(target, info, size, options)
    encoding = choose_encoding(
        info,
        *size,
        target.format_name,
        codec=options.codec or ("rawvideo" if target.kind == "pipe" else None),
        crf=options.crf,
        pix_fmt=options.pix_fmt,
        encoder_options=options.encoder_options,
    )
    if options.pix_fmt is not None:
        return encoding
    return replace(encoding, notices=(*encoding.notices, *_coarser_chroma(info, encoding, size, target.format_name)))


def check_settings(options: UpscaleOptions) -> None:
    """Raises `UsageError` where no source could be encoded so: for an unknown codec, and what it does not take."""
    if options.codec is not None:
        entry = _known_codec(options.codec)
        check_names(entry.encoder, options.encoder_options)
        _quality(options.codec, entry, options.crf, options.encoder_options)


def _known_codec(name: str) -> Codec:
    if name not in CODECS:
        names = [known for known in CODECS if known != "rawvideo"]
        raise UsageError(f"unknown codec: `{name}`", hint=f"use one of {', '.join(names)}")
    entry = CODECS[name]
    if entry.encoder not in av.codecs_available:
        raise UsageError(f"this build of FFmpeg has no encoder `{entry.encoder}`", hint="use another --codec")
    return entry


def _encoding_of_pictures(target: Target, info: VideoInfo, size: tuple[int, int], options: UpscaleOptions) -> Encoding:
    """Lossless pieces, with as much in them as the pictures' own format will hold."""
    flags = {
        "--codec": options.codec is not None,
        "--crf": options.crf is not None,
        "--pix-fmt": options.pix_fmt is not None,
        "--encoder-opt": bool(options.encoder_options),
    }
    for flag, given in flags.items():
        if given:
            raise UsageError(f"{flag} is for videos, not for images: `{target.path}`", hint=f"leave out {flag}")
    suffix = target.path.suffix.lower()
    entry = FORMATS[suffix]
    held = replace(
        info, bit_depth=min(info.bit_depth, entry.bit_depth), has_alpha=info.has_alpha and bool(entry.translucent)
    )
    encoding = choose_encoding(held, *size, target.format_name, codec="ffv1", crf=None, pix_fmt=None)
    lost = []
    if held.has_alpha != info.has_alpha:
        lost.append(f"transparency is flattened on black: {suffix} does not hold it")
    if held.bit_depth != info.bit_depth:
        lost.append(f"the source has {info.bit_depth} bits a channel, the output {held.bit_depth} ({suffix})")
    if not entry.holds_aspect and (aspect := info.aspect_at(*size)) not in (None, 1):
        lost.append(f"the pixel aspect ratio {aspect} is not kept: {suffix} does not hold it")
    return replace(encoding, notices=(*lost, *encoding.notices))


def _coarser_chroma(source: VideoInfo, encoding: Encoding, size: tuple[int, int], format_name: str) -> list[str]:
    """What to say where the output has fewer samples of colour a pixel than the source, without being asked to."""
    chosen = av.VideoFormat(encoding.pix_fmt)
    if chroma_samples(chosen) >= source.chroma_samples:
        return []
    finer = [
        fmt
        for fmt in av.Codec(encoding.encoder, "w").video_formats or ()
        if fmt.name.startswith(("yuv4", "yuva4"))
        and (bit_depth(fmt), has_alpha_channel(fmt)) == (bit_depth(chosen), encoding.alpha)
        and chroma_samples(fmt) >= source.chroma_samples
    ]
    lossless = "--codec ffv1 in .mkv" if format_name in ("mov", "webm") else "--codec ffv1"
    coarsest_first = (fmt.name for fmt in sorted(finer, key=chroma_samples))
    opening = next((name for name in coarsest_first if _does_open(encoding, name, size)), None)
    way_out = lossless if opening is None else f"--pix-fmt {opening}"
    return [Remark(f"the source's colours are sampled finer than {encoding.pix_fmt} holds: {way_out} keeps them")]


def _does_open(encoding: Encoding, pix_fmt: str, size: tuple[int, int]) -> bool:
    """Whether the encoder, which says that it has the pixel format, takes it: libvpx takes one with transparency."""
    try:
        check_encoder(encoding.encoder, pix_fmt, *size, encoding.options, (), hardware=False)
    except UsageError:
        return False
    return True


def _default_codec(source: VideoInfo, format_name: str, width: int) -> str:
    deep = source.bit_depth > 8
    if source.has_alpha and format_name == "mov":
        return "prores"
    if source.has_alpha and format_name in ("matroska", "webm"):
        return "vp9"  # h264 would lose the transparency, ffv1 makes files of 12 times the size (benchmarks/sample.mp4)
    if format_name == "webm":
        return "av1" if deep else "vp9"
    return "hevc" if deep and width >= X265_MIN_WIDTH else "h264"


def _pix_fmt(entry: Codec, source: VideoInfo, holds_alpha: bool, width: int, height: int) -> tuple[str, list[str]]:
    deep = source.bit_depth > 8
    if source.has_alpha and holds_alpha and entry.alpha_pix_fmts is not None:
        return entry.alpha_pix_fmts[deep], []
    if entry.odd_pix_fmts is not None and (width % 2 or height % 2):
        chosen = entry.odd_pix_fmts[deep]
        odd = f"{width}x{height} has an odd side: written as 4:4:4 ({chosen}), which some players refuse"
        return chosen, [Remark(odd)]
    return entry.pix_fmts[deep], []


def _check_size(name: str, width: int, height: int) -> None:
    if name == "hevc" and width < X265_MIN_WIDTH:
        raise UsageError(f"hevc needs {X265_MIN_WIDTH} pixels of width, not {width}", hint="use --codec h264 or ffv1")
    if name == "av1" and min(width, height) <= SVT_AV1_STRIP and max(width, height) > SVT_AV1_BLOCK:
        message = (
            f"av1 needs both sides above {SVT_AV1_STRIP} pixels, or none above {SVT_AV1_BLOCK}: `{width}x{height}`"
        )
        raise UsageError(message, hint="use --codec vp9 or ffv1")


def _check_pix_fmt(name: str, entry: Codec, pix_fmt: str, width: int, height: int) -> None:
    listed = av.Codec(entry.encoder, "w").video_formats
    # "yuvj" formats are an outdated spelling of full range, which is a tag of its own.
    formats = [fmt.name for fmt in listed if not fmt.name.startswith("yuvj")] if listed else _RAW_PIX_FMTS
    if pix_fmt not in formats:
        hint = f"use one of {', '.join(formats)}"
        raise UsageError(f"codec `{name}` cannot write pixel format `{pix_fmt}`", hint=hint)
    chosen = av.VideoFormat(pix_fmt, width, height)
    odd = (width % 2 and chosen.chroma_width(2) == 1) or (height % 2 and chosen.chroma_height(2) == 1)
    if entry.odd_pix_fmts is not None and odd:
        hint = f"use --pix-fmt {entry.odd_pix_fmts[bit_depth(chosen) > 8]}, or leave it out"
        raise UsageError(f"codec `{name}` cannot write {width}x{height} in `{pix_fmt}`", hint=hint)


def _quality(name: str, entry: Codec, crf: int | None, given: Options) -> Options:
    """The crf that is asked for; the default, where no `given` option decides the rate."""
    if entry.crf is None:
        if crf is not None:
            raise UsageError(f"codec `{name}` has no crf", hint="leave out --crf")
        return ()
    own = [value for option, value in given if option == entry.crf_option]
    asked = 0 if any(map(is_zero, own)) else crf
    if asked is not None and not entry.min_crf <= asked <= entry.max_crf:
        hint = f"use a whole number from {entry.min_crf} to {entry.max_crf}"
        raise UsageError(f"unsupported crf for {name}: `{asked}`", hint=hint)
    rivals = rate_options(given)
    if crf is None:
        return () if rivals else ((entry.crf_option, str(entry.crf)),)
    if name == "vp9":  # a crf with a rate as its limit is a mode of libvpx
        rivals = [option for option in rivals if option != "b"]
    if rivals:
        message = f"--crf and the encoder's own `{rivals[0]}` would both decide the rate"
        raise UsageError(message, hint="leave one of them out")
    return ((entry.crf_option, str(crf)),)


def _hdr_options(name: str, hdr: HDRMetadata | None) -> tuple[Options, list[str]]:
    if hdr is None:
        return (), []
    if name == "hevc":
        return (("x265-params", x265_parameters(hdr)),), []
    if name == "av1":
        return (("svtav1-params", svtav1_parameters(hdr)),), []
    return (), [f"HDR10 mastering data is not kept: {name} does not write it here, hevc and av1 do"]

"""The encoder's own settings: those that people give over those of duovsr, and checked before any work is done."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction

import av
from av.codec.context import CodecContext, OptionFlags
from av.video.codeccontext import VideoCodecContext

from duovsr.errors import UsageError

Options = tuple[tuple[str, str], ...]

_LISTS = {"x264opts", "x264-params", "x265-params", "svtav1-params"}  # options that are lists, as in `a=1:b=2`
# Tags of colour, by the names that encoders and their lists give them: the output's are the source's, and to name
# others converts nothing.
_TAGS = {"color_range", "colorspace", "color_primaries", "color_trc"}
_TAGS |= {"colormatrix", "colorprim", "transfer", "range", "fullrange"}
_TAGS |= {"color-range", "matrix-coefficients", "color-primaries", "transfer-characteristics"}
# What decides how many bits there are, by its names in encoders and their lists, with the values that do not.
_RATES = {
    "crf": ["-1"],
    "cq": ["-1"],
    "qp": ["-1"],
    "b": ["0"],
    "bitrate": ["0"],
    "tbr": ["0"],
    "lossless": ["-1", "0"],
}
_FOR_VIDEO = OptionFlags.ENCODING_PARAM | OptionFlags.VIDEO_PARAM
# What encoders log of a part of such a list that they do not take: they go on without it.
_REFUSED = re.compile(r"(Error parsing option|Unknown option|Invalid value)")


def merge(options: Mapping[str, str], given: Options) -> dict[str, str]:
    """`options` with `given` over them; lists of options are joined, and of one that comes twice the last counts."""
    merged = dict(options)
    for name, value in given:
        merged[name] = f"{merged[name]}:{value}" if name in _LISTS and name in merged else value
    return merged


def rate_options(given: Options) -> list[str]:
    """The names of those that decide how many bits there are, as a crf does."""
    settings = [setting for option in given for setting in _settings(*option)]
    return [name for name, value in settings if name in _RATES and value not in _RATES[name]]


def is_zero(value: str) -> bool:
    """Whether the value of an option is a number, and 0."""
    return re.fullmatch(r"[+-]?0*\.?0+", value) is not None


def spelt_for(encoder: str, options: Options) -> Options:
    """The options as FFmpeg hands them on: a crf or qp of 0 is none to its libsvtav1, unless the list has it."""
    if encoder != "libsvtav1":
        return options
    return tuple(
        ("svtav1-params", f"{name}=0") if name in ("crf", "qp") and is_zero(value) else (name, value)
        for name, value in options
    )


def _settings(name: str, value: str) -> Options:
    """The option itself, or what its list holds."""
    if name not in _LISTS:
        return ((name, value),)
    return tuple((key, setting) for key, _, setting in (part.partition("=") for part in value.split(":")))


def check_names(encoder: str, given: Options) -> None:
    """Raises `UsageError` for an option that the encoder does not have, and for colour tags."""
    supported = CodecContext.create(encoder, "w").supported_options
    names = [option.name for option in supported.private]
    names += [option.name for option in supported.generic if option.flags & _FOR_VIDEO == _FOR_VIDEO]
    for name, value in given:
        if tag := next((key for key, _ in _settings(name, value) if key in _TAGS), None):
            raise UsageError(f"encoder option `{tag}` would tag colours falsely", hint="leave it out: tags are kept")
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"`ffmpeg -h encoder={encoder}` lists them"
            raise UsageError(f"encoder {encoder} has no option `{name}`", hint=hint)


def silence(encoder: str) -> None:
    """Before it is opened. SVT-AV1 writes to stderr, and only the environment can stop it."""
    if encoder == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "0")


def check_encoder(
    encoder: str, pix_fmt: str, width: int, height: int, options: Mapping[str, str], given: Options, hardware: bool
) -> None:
    """Opens the encoder for a moment. Raises `UsageError` where it refuses the `given` options among `options`, or is
    hardware that this machine does not have.
    """
    silence(encoder)
    context = CodecContext.create(encoder, "w")
    assert isinstance(context, VideoCodecContext)
    context.width, context.height, context.pix_fmt = width, height, pix_fmt
    context.time_base, context.framerate = Fraction(1, 25), Fraction(25)
    context.options = dict(options)
    settings = " ".join(f"{name}={value}" for name, value in given)
    try:
        with _warnings() as logs:
            context.open()
    except av.error.FFmpegError as error:
        if hardware:
            hint = "it needs an NVIDIA GPU with an encoder and its driver; use --codec h264, hevc or av1"
            raise UsageError(f"{encoder} does not open on this machine ({error.strerror})", hint=hint) from error
        message = f"encoder {encoder} refuses `{settings}` for {width}x{height} in `{pix_fmt}`"
        raise UsageError(message, hint=f"`ffmpeg -h encoder={encoder}` lists what it takes") from error
    refused = next((text.strip().rstrip(".") for _, _, text in logs if _REFUSED.match(text)), None)
    if refused is not None:
        raise UsageError(f"encoder {encoder} refuses `{settings}`: {refused}", hint="see the encoder's own manual")


@contextmanager
def _warnings() -> Iterator[list[tuple[int, str, str]]]:
    """What FFmpeg warns of in this thread: (level, who, text)."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.WARNING)
    try:
        with av.logging.Capture() as logs:
            yield logs
    finally:
        av.logging.set_level(level)

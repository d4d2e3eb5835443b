"""`duovsr upscale`: its flags, and what they say."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from duovsr.cli.file import upscale_file
from duovsr.cli.folder import upscale_folder
from duovsr.cli.parameters import Device, Dtype, Json, Model, Vae, parse_size
from duovsr.errors import UsageError
from duovsr.options import Position, UpscaleOptions

if TYPE_CHECKING:
    from duovsr.engine.upscaler import Upscaler


_CRF = "Quality, lower is better: 0 to 51 for h264 (default 18), hevc (20); 0 to 63 for vp9 (22), av1 (24)."


def upscale(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            readable=False,  # typer's check would be a usage error: opening tells better
            help="A video, an image, images as frames/%05d.png or a folder of them, a folder of videos, or -.",
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="DST", readable=False, help="A .mp4, .mkv, .mov or .webm, image(s), a folder of videos, or -."
        ),
    ],
    scale: Annotated[float | None, typer.Option(help="Factor of both sides, 1 to 4. Default: 4.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Target size instead of a scale.")] = None,
    model: Model = "tiny",
    device: Device = "auto",
    dtype: Dtype = "auto",
    vae: Vae = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise that detail is drawn from.")] = 0,
    strength: Annotated[
        float | None, typer.Option(help="0: faithful, 1: full detail. Default: the model's own.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Frames a model call. Default: by memory.")] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            help="Begin chunks anew, so many frames early. Default: state is carried over; 1.3b cannot, and has 4."
        ),
    ] = None,
    tile: Annotated[str, typer.Option(help="Side of a tile in output pixels, `auto` or `off`.")] = "auto",
    window: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="Look no further than windows of this side. For models of full attention (1.3b)."
        ),
    ] = None,
    attention: Annotated[
        str, typer.Option(help="auto, triton, cudnn, sdpa or xformers. auto: the fastest, as measured.")
    ] = "auto",
    color: Annotated[
        str | None,
        typer.Option(help="Colour transfer from the source: wavelet, adain or none. Default: the model's own."),
    ] = None,
    start: Annotated[str | None, typer.Option(help="Where to begin: 90.5, 0:01:30.5, or a frame: 2250f.")] = None,
    end: Annotated[str | None, typer.Option(help="The first time or frame that is not wanted.")] = None,
    fps: Annotated[str | None, typer.Option(help="Frame rate of images: 24 or 24000/1001. Default: 25.")] = None,
    decoder: Annotated[
        str, typer.Option(help="software, or nvdec: an NVIDIA GPU's, of H.264 and HEVC files, to the same pictures.")
    ] = "software",
    no_audio: Annotated[bool, typer.Option("--no-audio", help="Leave the sound out.")] = False,
    no_subs: Annotated[bool, typer.Option("--no-subs", help="Leave subtitles out.")] = False,
    no_deinterlace: Annotated[bool, typer.Option("--no-deinterlace", help="Take fields as they are woven.")] = False,
    no_scene_cuts: Annotated[
        bool, typer.Option("--no-scene-cuts", help="Carry the model's state over cuts, too.")
    ] = False,
    codec: Annotated[
        str | None, typer.Option(help="h264, hevc, av1, vp9, prores, ffv1 (lossless), or one with _nvenc.")
    ] = None,
    crf: Annotated[int | None, typer.Option(help=_CRF)] = None,
    pix_fmt: Annotated[str | None, typer.Option(help="Pixel format, such as yuv444p10le.")] = None,
    encoder_opt: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="The encoder's own, as preset=slow; may be repeated.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="SRC is a folder: take those below it, too.")] = False,
    pattern: Annotated[
        str | None, typer.Option(metavar="GLOB", help="SRC is a folder: take only such names, as '*.mp4' or '*.png'.")
    ] = None,
    suffix: Annotated[
        str, typer.Option(metavar="TEXT", help="SRC is a folder: end the outputs' names so, as _x4 or _x4.mkv.")
    ] = "",
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished job and begin anew.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an existing target; of a whole clip's images, later numbers are removed, too."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and a measured estimate only.")] = False,
    as_json: Json = False,
) -> None:
    """Upscale a video, with its sound and its timing. What was interrupted goes on with the same command."""
    if size is not None and scale is not None:
        raise UsageError("--size and --scale are two ways to say the same", hint="leave one of them out")
    options = UpscaleOptions(
        scale=UpscaleOptions.scale if scale is None else scale,
        size=None if size is None else parse_size(size),
        seed=seed,
        strength=strength,
        chunk=chunk,
        overlap=overlap,
        tile=_parse_tile(tile),
        color=color,  # type: ignore[arg-type]  # checked by UpscaleOptions
        codec=codec,
        crf=crf,
        pix_fmt=pix_fmt,
        encoder_options=tuple(map(_parse_encoder_option, encoder_opt or ())),
        start=None if start is None else Position.parse(start),
        end=None if end is None else Position.parse(end),
        frame_rate=_parse_frame_rate(fps),
        decoder=decoder,  # type: ignore[arg-type]  # checked by UpscaleOptions
        audio=not no_audio,
        subtitles=not no_subs,
        deinterlace=not no_deinterlace,
        scene_cuts=not no_scene_cuts,
        restart=restart,
        overwrite=overwrite,
    )
    load = partial(_load, model, device, dtype, vae, window, attention)
    from duovsr.engine.batch import Selection, is_batch

    selection = Selection(recursive, pattern, suffix)
    if is_batch(source, selection):
        _check_for_all(model, vae, options)
        upscale_folder(source, destination, selection, options, load, dry_run, as_json)
    elif selection != Selection():
        raise UsageError(
            f"not a folder of videos: `{source}`", hint="--recursive, --pattern and --suffix are for folders of videos"
        )
    else:
        upscale_file(source, destination, options, load, dry_run, as_json)


def _check_for_all(model: str, vae: str | None, options: UpscaleOptions) -> None:
    """Raises, before anything is loaded or written, for a model, a codec or settings of it that no file can have."""
    from duovsr.hub import find_model
    from duovsr.video.codecs import check_settings

    check_settings(options)
    find_model(model).preset.with_vae(vae)


def _load(model: str, device: str, dtype: str, vae: str | None, window: int | None, attention: str) -> Upscaler:
    from duovsr.engine.upscaler import Upscaler

    return Upscaler.from_preset(model, device=device, dtype=dtype, window=window, vae=vae, attention=attention)


def _parse_tile(text: str) -> int | None:
    if text in ("auto", "off"):
        return None if text == "auto" else 0
    if not re.fullmatch(r"\d{1,9}", text) or int(text) == 0:
        raise UsageError(f"unsupported tile: `{text}`", hint="use `auto`, `off` or a number of pixels")
    return int(text)


def _parse_frame_rate(text: str | None) -> Fraction | None:
    if text is None:
        return None
    hint = "use a number from 1/1000 to 1000, such as 24 or 24000/1001"
    try:
        rate = Fraction(text) if re.fullmatch(r"[0-9./]{1,40}", text) else Fraction(0)  # 1e999999999 would take hours
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"unsupported frame rate: `{text}`", hint=hint) from error
    if not Fraction(1, 1000) <= rate <= 1000:
        raise UsageError(f"unsupported frame rate: `{text}`", hint=hint)
    return rate.limit_denominator(1001000)  # FFmpeg counts with 32 bits


def _parse_encoder_option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"unsupported encoder option: `{text}`", hint="use `--encoder-opt KEY=VALUE`: preset=slow")
    return key, value

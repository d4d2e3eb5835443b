"""The command line: parsing, progress, exit codes. People read stderr; data (`--json`) goes to stdout.

Commands import what they need when they run, so that `duovsr --help` loads no torch.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from duovsr import __version__
from duovsr.errors import EXIT_OK, EXIT_WARNINGS, DuovsrError, NoSpaceError, UsageError
from duovsr.options import UpscaleOptions
from duovsr.progress import Reporter, stderr

if TYPE_CHECKING:
    from duovsr.engine.plan import Plan
    from duovsr.metrics.report import Report

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_ClickUsageError: Any = typer.BadParameter.__base__  # typer's only public name for it is through its child

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)
app.info.help = "One-step diffusion video super-resolution."

Model = Annotated[str, typer.Option(help="A shipped model, see `duovsr doctor`, or the folder of an exported one.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print a report as JSON to stdout.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def upscale(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The video to upscale.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The file to write: .mp4, .mkv, .mov or .webm.")],
    scale: Annotated[float, typer.Option(help="Factor of both sides, 1 to 4.")] = 4.0,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Target size instead of a scale.")] = None,
    model: Model = "tiny",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of the noise that detail is drawn from.")] = 0,
    strength: Annotated[
        float | None, typer.Option(help="0: faithful, 1: full detail. Default: the model's own.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Frames a model call. Default: by memory.")] = None,
    overlap: Annotated[
        int | None,
        typer.Option(help="Make chunks independent, each warmed up by so many frames. Default: state is carried over."),
    ] = None,
    tile: Annotated[str, typer.Option(help="Side of a tile in output pixels, `auto` or `off`.")] = "auto",
    color: Annotated[str, typer.Option(help="Colour transfer from the source: wavelet, adain or none.")] = "wavelet",
    codec: Annotated[str | None, typer.Option(help="h264, hevc, av1, vp9, prores, ffv1 (lossless).")] = None,
    crf: Annotated[int | None, typer.Option(help="Quality of the codec; lower is better.")] = None,
    pix_fmt: Annotated[str | None, typer.Option(help="Pixel format, such as yuv444p10le.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing target.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and a measured estimate only.")] = False,
    as_json: Json = False,
) -> None:
    """Upscale a video, with its sound and its timing."""
    options = UpscaleOptions(
        scale=scale,
        size=_parse_size(size),
        seed=seed,
        strength=strength,
        chunk=chunk,
        overlap=overlap,
        tile=_parse_tile(tile),
        color=color,  # type: ignore[arg-type]  # checked by UpscaleOptions
        codec=codec,
        crf=crf,
        pix_fmt=pix_fmt,
        overwrite=overwrite,
    )
    from duovsr.video.codecs import choose_encoding
    from duovsr.video.info import probe
    from duovsr.video.output import check_target, container_format

    info = probe(source)  # bad input is refused before seconds are spent on loading a model
    check_target(source, destination, overwrite or dry_run)
    target_size = options.target_size(info.width, info.height)
    choose_encoding(info, *target_size, container_format(destination), codec=codec, crf=crf, pix_fmt=pix_fmt)
    from duovsr.engine.upscaler import Upscaler

    upscaler = Upscaler.from_preset(model, device=device, dtype=dtype)
    if dry_run:
        from duovsr.engine.bench import seconds_per_frame

        plan = upscaler.plan(info.width, info.height, options)
        _show_plan(plan, info.num_frames, seconds_per_frame(upscaler, plan, options), as_json)
        return
    with Reporter(source.name) as reporter:
        report = upscaler.upscale_file(source, destination, options, on_progress=reporter)
    for notice in report.notices:
        stderr.print(f"note: {notice}", markup=False)
    rate = report.frames / max(report.seconds, 1e-9)
    width, height = report.plan.target_size
    stderr.print(f"{destination}: {report.frames} frames, {width}x{height}, {rate:.2f} fps", markup=False)
    if as_json:
        record = {"source": str(source), "output": str(destination), "frames": report.frames}
        _print_json({**record, "seconds": report.seconds, "notices": report.notices, "plan": report.plan.to_json()})
    if report.notices:
        raise typer.Exit(EXIT_WARNINGS)


@app.command()
def bench(
    clip: Annotated[Path | None, typer.Argument(metavar="[CLIP]", help="Default: a synthetic 320x180 clip.")] = None,
    scale: Annotated[float, typer.Option(help="Factor of both sides, 1 to 4.")] = 4.0,
    model: Model = "tiny",
    device: Device = "auto",
    dtype: Dtype = "auto",
    repeat: Annotated[int, typer.Option(min=1, help="Measured runs; the median is shown.")] = 3,
    as_json: Json = False,
) -> None:
    """Measure load time, the share of every stage, speed and peak memory."""
    from duovsr.engine.bench import run_bench

    result = run_bench(clip, UpscaleOptions(scale=scale), model=model, device=device, dtype=dtype, repeat=repeat)
    _show(result, as_json)


@app.command(name="eval")
def evaluate_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="An upscaled clip, or a folder of clips.")],
    ref: Annotated[Path | None, typer.Option(help="The truth: a clip, or a folder paired by name.")] = None,
    lq: Annotated[Path | None, typer.Option(help="Without a truth: what OUT was made from.")] = None,
    niqe_parameters: Annotated[Path | None, typer.Option(help="NIQE's parameters. Default: from the hub.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Only this metric; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Measure quality: PSNR, SSIM, VMAF, NIQE and warping error."""
    from duovsr.metrics.evaluate import evaluate

    report = evaluate(
        output,
        ref=ref,
        lq=lq,
        niqe_parameters=niqe_parameters,
        metrics=metric or None,
        on_clip=lambda clip: stderr.print(f"{clip.name}: {clip.frames} frames", markup=False),
    )
    if as_json:
        _print_json(report.to_json())
    else:
        _show_report(report)
    for name, reason in report.skipped.items():
        stderr.print(f"skipped: {name}: {reason}", markup=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show devices, versions, codecs and model files; exit code 1 if something needed is broken."""
    from duovsr.engine.doctor import examine

    findings, problems = examine()
    _show({**findings, "problems": problems}, as_json)
    if problems:
        raise typer.Exit(EXIT_WARNINGS)


@app.command()
def train(
    stage: Annotated[
        str,
        typer.Argument(
            help="pool, vae, latents, base, cfg, progressive, dual, prefs, dpo, refine, export, recipe or tune."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; an unfinished run in it is resumed.")],
    name: Annotated[str | None, typer.Argument(help="Of a recipe: tiny or paper.")] = None,
    preset: Annotated[str, typer.Option("--preset", "--model", help="The model's shape.")] = "tiny",
    data: Annotated[
        list[Path] | None, typer.Option(help="Sources (pool, tune), a pool, latents or pairs; may be repeated.")
    ] = None,
    validation: Annotated[list[Path] | None, typer.Option(help="A pool of held-out sources; may be repeated.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="What to start from: a finished run, an exported model or a Wan2.1 folder.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As steps=100.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration and the plan only.")] = False,
    devices: Annotated[int, typer.Option(min=1, help="How many devices --dry-run plans for.")] = 1,
) -> None:
    """Train a model, stage by stage (needs duovsr[train])."""
    try:
        from duovsr.train.memory import describe
        from duovsr.train.stages import Job, resolve, run_job
    except ModuleNotFoundError as error:
        raise UsageError(f"package `{error.name}` is missing", hint="pip install 'duovsr[train]'") from error

    job = Job(stage, out, preset, tuple(data or ()), tuple(validation or ()), init, name)
    config = resolve(job, settings or [])
    if dry_run:
        _show(describe(job, config, devices), as_json=False)
        return
    try:
        run_job(job, config)
    except OSError as error:
        where = f"cannot write to `{error.filename or out}`: {error.strerror or error}"
        raise (NoSpaceError if error.errno == errno.ENOSPC else UsageError)(where) from error
    except (KeyboardInterrupt, _Terminated) as error:
        code = EXIT_TERMINATED if isinstance(error, _Terminated) else EXIT_INTERRUPTED
        _fail("interrupted", "run the same command to go on, or to start the stage again", code)


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UsageError(f"unsupported size: `{text}`", hint="use `--size WIDTHxHEIGHT`, such as 1280x720")
    return int(width), int(height)


def _parse_tile(text: str) -> int | None:
    if text in ("auto", "off"):
        return None if text == "auto" else 0
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"unsupported tile: `{text}`", hint="use `auto`, `off` or a number of pixels")
    return int(text)


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=2, default=str))


def _show_plan(plan: Plan, frames: int | None, seconds: float, as_json: bool) -> None:
    estimate = None if frames is None else frames * seconds
    if as_json:
        measured = {"frames": frames, "seconds_per_frame": seconds, "estimated_seconds": estimate}
        _print_json({**plan.to_json(), **measured})
        return
    (width, height), (target_width, target_height) = plan.source_size, plan.target_size
    state = "state carried over" if plan.overlap is None else f"independent, {plan.overlap} frames of warm-up"
    tile = plan.tiles[0]
    tiles = "whole frames" if len(plan.tiles) == 1 else f"{len(plan.tiles)} of up to {tile.width}x{tile.height}"
    lines = {
        "size": f"{width}x{height} -> {target_width}x{target_height}",
        "frames": "unknown" if frames is None else f"about {frames}",
        "chunks": f"{plan.chunk} frames, {state}",
        "tiles": tiles,
        "device": f"{plan.device}, {plan.dtype}",
        "memory": f"about {plan.memory_bytes / 2**30:.1f} GiB",
        "estimate": f"{seconds:.2f} s a frame" + ("" if estimate is None else f", {estimate:.0f} s in all"),
    }
    _show(lines, as_json=False)


def _show(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(record)
        return
    from rich.table import Table

    rows = _flatten(record)
    stdout = Console(emoji=False, markup=False)
    if not stdout.is_terminal:
        print("\n".join(f"{key}: {value}" for key, value in rows))
        return
    table = Table(box=None, show_header=False)
    for key, value in rows:
        table.add_row(key, value)
    stdout.print(table)


def _flatten(record: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key} ")
        elif isinstance(value, list | tuple):
            rows.append((prefix + key, ", ".join(map(str, value)) or "none"))
        else:
            rows.append((prefix + key, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return rows


def _show_report(report: Report) -> None:
    from rich.table import Table

    table = Table("clip", *report.means)
    for clip in report.clips:
        table.add_row(clip.name, *(_score(clip.scores.get(name)) for name in report.means))
    table.add_row("mean", *map(_score, report.means.values()))
    Console(emoji=False, markup=False).print(table)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    """Run the command line; every failure is one line, a hint, and the exit code of DESIGN section 1.7."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, _terminate)
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code = app(standalone_mode=False)
    except DuovsrError as error:
        _fail(str(error), error.hint, error.exit_code)
    except _ClickUsageError as error:
        context = error.ctx
        command = context.command_path if context else "duovsr"
        _fail(error.format_message(), f"see `{command} --help`", UsageError.exit_code)
    except _Terminated:
        _fail("terminated; no output was written", None, EXIT_TERMINATED)
    if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this code
        _fail("interrupted; no output was written", None, EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else EXIT_OK)


class _Terminated(BaseException):
    """SIGTERM or a closed terminal, as an exception: every `with` on the way out cleans up, as for Ctrl-C."""


def _terminate(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # one is enough: cleaning up must not be cut short
        signal.signal(number, signal.SIG_IGN)
    raise _Terminated


def _fail(message: str, hint: str | None, code: int) -> NoReturn:
    stderr.print(f"error: {message}", markup=False)
    if hint:
        stderr.print(f"hint: {hint}", markup=False)
    sys.exit(code)

"""`duovsr bench`, `eval` and `doctor`: what the machine and the outputs are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from duovsr.cli.parameters import Device, Dtype, Json, Model, Vae, parse_size
from duovsr.cli.show import print_json, say, show, show_scores
from duovsr.errors import EXIT_WARNINGS, UsageError
from duovsr.options import UpscaleOptions


def bench(
    clip: Annotated[
        Path | None, typer.Argument(metavar="[CLIP]", readable=False, help="Default: a synthetic 320x180 clip.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of both sides, 1 to 4. Default: 4.")] = None,
    model: Model = "tiny",
    device: Device = "auto",
    dtype: Dtype = "auto",
    vae: Vae = None,
    repeat: Annotated[int, typer.Option(min=1, help="Measured runs; the median is shown.")] = 3,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="One call of the preset's networks, against their counted work.")
    ] = False,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Output size with --random-weights. Default: 1920x1080.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames with --random-weights, 4k + 1. Default: 21.")] = None,
    window: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Side of attention's windows with --random-weights.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure load time, the share of every stage, speed and peak memory."""
    from duovsr.engine.bench import run_bench, run_workload

    if random_weights:
        if clip is not None:
            raise UsageError("--random-weights measures a clip of its own", hint=f"leave out `{clip}`")
        if scale is not None:
            raise UsageError("--random-weights has a scale of its own", hint="leave out --scale, or use --size")
        target = parse_size(size or "1920x1080")
        count = 21 if frames is None else frames
        result = run_workload(model, target, count, device=device, dtype=dtype, window=window, repeat=repeat, vae=vae)
        show(result, as_json)
        return
    if (size, frames, window) != (None, None, None):
        raise UsageError("--size, --frames and --window are for --random-weights", hint="add it, or use --scale")
    options = UpscaleOptions(scale=4.0 if scale is None else scale)
    result = run_bench(clip, options, model=model, device=device, dtype=dtype, repeat=repeat, vae=vae)
    show(result, as_json)


def evaluate_command(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", readable=False, help="An upscaled clip, or a folder of clips.")
    ],
    ref: Annotated[
        Path | None, typer.Option(readable=False, help="The truth: a clip, or a folder paired by name.")
    ] = None,
    lq: Annotated[Path | None, typer.Option(readable=False, help="Without a truth: what OUT was made from.")] = None,
    niqe_parameters: Annotated[
        Path | None, typer.Option(readable=False, help="NIQE's parameters. Default: from the hub.")
    ] = None,
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
        on_clip=lambda clip: say(f"{clip.name}: {clip.frames} frames"),
    )
    if as_json:
        print_json(report.to_json())
    else:
        show_scores(report)
    for notice in (notice for clip in report.clips for notice in clip.notices):
        say(f"note: {notice}")
    for name, reason in report.skipped.items():
        say(f"skipped: {name}: {reason}")
    for name, reason in report.failed.items():
        say(f"failed: {name}: {reason}")
    if report.failed or any(clip.warnings for clip in report.clips):
        raise typer.Exit(EXIT_WARNINGS)


def doctor(as_json: Json = False) -> None:
    """Show devices, versions, codecs and model files; exit code 1 if something needed is broken."""
    from duovsr.engine.doctor import examine

    findings, problems = examine()
    show({**findings, "problems": problems}, as_json)
    if problems:
        raise typer.Exit(EXIT_WARNINGS)

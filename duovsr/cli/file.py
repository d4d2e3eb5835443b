"""One file: refused early where it can be, upscaled, and reported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from duovsr.cli.show import discard_stdout, file_record, print_json, say_result, show_plan
from duovsr.cli.signals import StopRequest, resumable
from duovsr.errors import EXIT_WARNINGS, DuovsrError, UsageError
from duovsr.options import PIPE, UpscaleOptions
from duovsr.progress import Reporter

if TYPE_CHECKING:
    from duovsr.engine.upscaler import Upscaler
    from duovsr.video.info import VideoInfo
    from duovsr.video.output import Target


def upscale_file(
    source: Path, destination: Path, options: UpscaleOptions, load: Callable[[], Upscaler], dry_run: bool, as_json: bool
) -> None:
    """`load` is called once bad input and bad targets are refused: it takes seconds."""
    from duovsr.video.output import check_target, job_folder, may_replace

    _check_pipes(source, destination, dry_run, as_json)
    target = check_target(
        source, destination, dry_run or may_replace(destination, options), options.codec, restart=options.restart
    )
    info = None if source == PIPE else _look(source, target, options)
    if dry_run:
        assert info is not None, "a dry run is of a file"
        _show_estimate(load(), info, options, as_json)
        return
    with _closed_pipe(), resumable(lambda: source != PIPE and job_folder(destination).exists()):
        upscaler = load()
        with Reporter() as reporter, StopRequest(piped=PIPE in (source, destination)) as should_stop:
            report = upscaler.upscale_file(source, destination, options, partial(reporter, source.name), should_stop)
    say_result(destination, report)
    if as_json:
        print_json(file_record(source, destination, report))
    if report.warnings:
        raise typer.Exit(EXIT_WARNINGS)


def _check_pipes(source: Path, destination: Path, dry_run: bool, as_json: bool) -> None:
    if source == PIPE and dry_run:
        raise UsageError("--dry-run cannot look into a pipe", hint="give a file as SRC")
    if destination != PIPE or dry_run:
        return
    if as_json:
        raise UsageError(
            "--json and the video would share standard output", hint="write to a file, or leave out --json"
        )
    if sys.stdout is None:
        raise DuovsrError("standard output is closed", hint="duovsr upscale ... - | ffplay -")
    if sys.stdout.isatty():
        raise UsageError("`-` would write the video to the terminal", hint="duovsr upscale ... - | ffplay -")


@contextmanager
def _closed_pipe() -> Iterator[None]:
    """Says so where nobody reads standard output any more."""
    try:
        yield
    except DuovsrError as error:
        if not isinstance(error.__cause__, BrokenPipeError):
            raise
        discard_stdout()
        raise DuovsrError("standard output was closed before the end of the video") from error


def _look(source: Path, target: Target, options: UpscaleOptions) -> VideoInfo:
    """What the source is. Raises InputError for what is not a video, UsageError for what cannot be made of it."""
    from duovsr.video.codecs import encoding_for
    from duovsr.video.pictures import only_one
    from duovsr.video.reader import VideoReader

    with VideoReader(
        source, start=options.start, end=options.end, frame_rate=options.frame_rate, decoder=options.decoder
    ) as reader:
        info = reader.info
        encoding_for(target, info, options.target_size(info.width, info.height), options)
        frames = info.frames_between(options.start, options.end)
        is_image = target.kind == "image"
        if frames == 0 or (is_image and frames != 1):  # an estimate: reading tells
            for _ in islice(only_one(reader, target.path) if is_image else reader, 2):
                continue
    return info


def _show_estimate(upscaler: Upscaler, info: VideoInfo, options: UpscaleOptions, as_json: bool) -> None:
    from duovsr.engine.bench import seconds_per_frame

    plan = upscaler.plan(info.width, info.height, options)
    streams = upscaler.model.preset.transformer.streams
    frames = info.frames_between(options.start, options.end)
    show_plan(plan, frames, seconds_per_frame(upscaler, plan, options), streams, as_json)

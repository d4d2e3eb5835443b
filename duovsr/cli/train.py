"""`duovsr train`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from duovsr.cli.show import fail, show
from duovsr.cli.signals import Terminated, exit_code_of
from duovsr.errors import DuovsrError, InputError, NoSpaceError, OutOfMemoryError, UsageError, says_no_space


def train(
    stage: Annotated[
        str,
        typer.Argument(
            help="pool, vae, latents, base, cfg, progressive, dual, prefs, dpo, refine, export, recipe, tune,"
            " or encode-prompt."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder (encode-prompt: file) to write; an unfinished run in it is resumed.")
    ],
    name: Annotated[str | None, typer.Argument(help="For `recipe`: tiny or paper.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", "--model", help="Default: tiny, or the recipe's.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Sources (pool, tune), a pool, latents or pairs; may be repeated.")
    ] = None,
    validation: Annotated[list[Path] | None, typer.Option(help="A pool of held-out sources; may be repeated.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="What to start from: a finished run, an exported model or a Wan2.1 folder.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As steps=100.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the configuration and the plan only.")] = False,
    devices: Annotated[int | None, typer.Option(min=1, help="What --dry-run plans for. Default: 1.")] = None,
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
        show(describe(job, config, devices or 1), as_json=False)
        return
    if devices is not None:
        raise UsageError("--devices is for --dry-run alone", hint="torchrun's --nproc-per-node makes a job of many")
    inputs = [*job.data, *job.held_out, *([init] if init else [])]
    try:
        with _told(out, inputs):
            run_job(job, config)
    except (KeyboardInterrupt, Terminated) as error:
        fail("interrupted", "run the same command to go on", exit_code_of(error))


@contextmanager
def _told(out: Path, inputs: list[Path]) -> Iterator[None]:
    """The machine's failures (disks, memory, killed processes) as errors of one line and a hint."""
    from concurrent.futures.process import BrokenProcessPool

    from duovsr.engine.memory import memory_errors

    smaller = "set smaller windows (`crop`, `side`, `frames`), or a smaller `batch` or a larger `accumulate`"
    try:
        with memory_errors(smaller):
            yield
    except OSError as error:
        raise _disk_error(error, Path(str(error.filename or out)), inputs) from error
    except BrokenProcessPool as error:
        hint = "set fewer `workers`; the same command goes on"
        raise OutOfMemoryError("a worker was killed, probably for want of memory", hint=hint) from error


def _disk_error(error: OSError, path: Path, inputs: list[Path]) -> DuovsrError:
    reason = error.strerror or str(error)
    if says_no_space(error):
        return NoSpaceError(f"no space left to write `{path}`", hint="free some space; the same command goes on")
    if any(path.is_relative_to(folder) for folder in inputs):
        return InputError(f"cannot read `{path}`: {reason}", hint="see its permissions and its disk")
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UsageError(f"not a folder: `{path}`", hint="choose another `--out`")
    return DuovsrError(f"cannot write `{path}`: {reason}", hint="see its permissions and its disk")

"""`duovsr train`."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated

import typer

from duovsr.cli.show import fail, show
from duovsr.cli.signals import Terminated, exit_code_of
from duovsr.errors import NoSpaceError, UsageError


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
    try:
        run_job(job, config)
    except OSError as error:
        where = f"cannot write to `{error.filename or out}`: {error.strerror or error}"
        raise (NoSpaceError if error.errno == errno.ENOSPC else UsageError)(where) from error
    except (KeyboardInterrupt, Terminated) as error:
        fail("interrupted", "run the same command to go on", exit_code_of(error))

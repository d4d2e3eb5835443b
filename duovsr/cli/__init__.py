"""The command line: parsing, progress, exit codes. People read stderr; data (`--json`) goes to stdout.

Commands import what they need when they run, so that `duovsr --help` loads no torch.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer

from duovsr import __version__
from duovsr.cli.measure import bench, doctor, evaluate_command
from duovsr.cli.models import models
from duovsr.cli.show import fail, print_line
from duovsr.cli.signals import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, handle_termination
from duovsr.cli.train import train
from duovsr.cli.upscale import upscale
from duovsr.errors import EXIT_OK, DuovsrError, OutOfMemoryError, UsageError

_ClickUsageError: Any = typer.BadParameter.__base__  # typer's only public name for it is through its child

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="One-step diffusion video super-resolution.",
)
app.command()(upscale)
app.command()(bench)
app.command(name="eval")(evaluate_command)
app.command()(doctor)
app.command()(train)
app.add_typer(models, name="models")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print_line(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; every failure is one line, a hint, and the exit code of DESIGN section 1.7."""
    handle_termination()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files may be any bytes, and leave as they came
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code = app(standalone_mode=False)
    except DuovsrError as error:
        fail(str(error), error.hint, error.exit_code)
    except _ClickUsageError as error:
        context = error.ctx
        command = context.command_path if context else "duovsr"
        fail(error.format_message(), f"see `{command} --help`", UsageError.exit_code)
    except (MemoryError, RuntimeError) as error:
        _fail_for_memory(error)
    except Terminated:
        fail("terminated", None, EXIT_TERMINATED)
    if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this code
        fail("interrupted", None, EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else EXIT_OK)


def _fail_for_memory(error: MemoryError | RuntimeError) -> NoReturn:
    """What is neither the work on a file nor training, which have hints of their own: a model that is loaded, say."""
    if not isinstance(error, MemoryError):  # for which alone torch need not be there
        from duovsr.engine.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise error
    fail("out of memory", "free some memory, or use a smaller clip or model", OutOfMemoryError.exit_code)

"""Signals: asked once, `upscale` stops where it can go on from; else, and asked twice, a command stops now."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn

from duovsr.errors import Interrupted
from duovsr.progress import stderr

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_TERMINATION = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # Windows has no SIGHUP


class Terminated(BaseException):
    """SIGTERM or a closed terminal, as an exception: every `with` on the way out cleans up, as for Ctrl-C."""


def handle_termination() -> None:
    """From here on these signals raise `Terminated`, but for those that are ignored, as by `nohup`."""
    for number in _TERMINATION:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminate)


def exit_code_of(stop: KeyboardInterrupt | Terminated | Interrupted) -> int:
    if isinstance(stop, Interrupted):
        return stop.exit_code
    return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED


@contextmanager
def resumable(unfinished: Callable[[], bool]) -> Iterator[None]:
    """Whatever stops the work inside ends as `Interrupted`; where something is `unfinished`, it says how to go on."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt, Terminated) as stop:
        goes_on = unfinished()
        message = str(stop) or ("interrupted" if goes_on else "interrupted; no output was written")
        # --restart would discard what is there.
        command = shlex.join(["duovsr", *(argument for argument in sys.argv[1:] if argument != "--restart")])
        hint = f"the same command goes on: {command}" if goes_on else None
        raise Interrupted(message, hint=hint, exit_code=exit_code_of(stop)) from stop


class StopRequest:
    """In its context the first signal is a request, and calling it tells whether there was one.

    The second signal does what signals do outside; with `piped` it ends the process, whose threads may wait for a
    pipe for ever. An `Interrupted` that leaves the context has the exit code of the signal.
    """

    def __init__(self, *, piped: bool = False) -> None:
        self._piped = piped
        self._exit_code: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._exit_code is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, *_TERMINATION):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN and number not in self._before:
                self._before[number] = before
                signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if isinstance(error, Interrupted) and self._exit_code is not None:
            error.exit_code = self._exit_code

    def _ask(self, number: int, _: object) -> None:
        self._exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED
        if self._piped:
            for other in self._before:
                signal.signal(other, self._leave)
        else:
            self._restore()
        with suppress(OSError):  # the terminal may be what has gone
            stderr.print("finishing the piece at work; once more to stop now")

    def _leave(self, number: int, _: object) -> NoReturn:
        with suppress(OSError):
            stderr.print("error: interrupted; no output was written to its end")
        os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def _terminate(*_: object) -> None:
    for number in (*_TERMINATION, signal.SIGINT):  # one is enough: cleaning up must not be cut short
        signal.signal(number, signal.SIG_IGN)
    raise Terminated

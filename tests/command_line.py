"""The command line, called in the test's own process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from duovsr import cli
from duovsr.engine.upscaler import Upscaler


class Run:
    """`run("upscale", source, target)` gives the exit code, and keeps what was printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        self._monkeypatch.setattr(sys, "argv", ["duovsr", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        self.out, self.err = self._capsys.readouterr()
        code = exit_info.value.code
        assert isinstance(code, int)
        return code

    def fails(self, code: int, words: str, *arguments: object) -> None:
        assert self(*arguments) == code, self.err
        first, *rest = self.err.strip().splitlines()
        assert first.startswith("error: ")
        assert words in first
        assert all(line.startswith("hint: ") for line in rest)
        assert len(rest) <= 1
        assert "Traceback" not in self.err
        assert self.out == ""


def running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], upscaler: Upscaler | None = None
) -> Iterator[Run]:
    """With `upscaler`, if any, in place of what is asked for; signals are handled as before when it is over."""
    if upscaler is not None:
        monkeypatch.setattr(Upscaler, "from_preset", classmethod(lambda *_, **__: upscaler))
    with python_signals():
        yield Run(monkeypatch, capsys)


@contextmanager
def python_signals() -> Iterator[None]:
    """Signals as Python sets them up, for this process and those it starts, though a parent (nohup) ignores them."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What people see on stderr while a command works."""

from __future__ import annotations

import re
import time
from collections import deque

from rich.console import Console

from duovsr.options import Progress

stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` as one line that does what it says: names and tags of files may hold sequences that steer a terminal."""
    return _CONTROL.sub("?", text)


class Reporter:
    """Progress of one file after another: a bar with frames, fps and ETA on a terminal, lines now and then elsewhere.

    The speed is that of the last half minute: frames that an earlier run has done go by at once.
    """

    INTERVAL = 5.0
    WINDOW = 30.0

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._name: str | None = None
        self._last = 0.0
        self._recent: deque[tuple[float, int]] = deque()  # when how many frames were done
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[fps]:.2f} fps"),
            TimeRemainingColumn(),
        )
        self._lines = not stderr.is_terminal or stderr.is_dumb_terminal
        self._bar = Bar(*columns, console=stderr, transient=True, disable=self._lines)
        self._task = self._bar.add_task("", total=None, fps=0.0)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, name: str, progress: Progress) -> None:
        """A report on the file `name`; a new name begins a new file."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._last = name, now
            self._recent.clear()
            self._bar.remove_task(self._task)  # `reset` would keep the total where the new one is unknown
            self._task = self._bar.add_task(printable(name), total=None, fps=0.0)
        fps = self._speed(now, progress.done)
        self._bar.update(self._task, completed=progress.done, total=progress.total, fps=fps)
        if self._lines and now - self._last >= self.INTERVAL:
            self._last = now
            of = f" of {progress.total}" if progress.total else ""
            left = f", {max(0, progress.total - progress.done) / fps:.0f} s left" if progress.total and fps else ""
            stderr.print(f"{printable(name)}: {progress.done}{of} frames, {fps:.2f} fps{left}", markup=False)

    def _speed(self, now: float, done: int) -> float:
        self._recent.append((now, done))
        while len(self._recent) > 2 and now - self._recent[0][0] > self.WINDOW:
            self._recent.popleft()
        then, before = self._recent[0]
        return (done - before) / (now - then) if now > then else 0.0

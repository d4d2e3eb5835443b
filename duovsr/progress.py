"""What people see on stderr while a command works."""

from __future__ import annotations

import time

from rich.console import Console

from duovsr.options import Progress

stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


class Reporter:
    """Progress of one file: a bar with frames, fps and ETA on a terminal, a line every few seconds elsewhere."""

    INTERVAL = 5.0

    def __init__(self, name: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._name, self._began, self._last = name, time.monotonic(), time.monotonic()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[fps]:.2f} fps"),
            TimeRemainingColumn(),
        )
        self._lines = not stderr.is_terminal or stderr.is_dumb_terminal
        self._bar = Bar(*columns, console=stderr, transient=True, disable=self._lines)
        self._task = self._bar.add_task(name, total=None, fps=0.0)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        fps = progress.done / max(now - self._began, 1e-9)
        self._bar.update(self._task, completed=progress.done, total=progress.total, fps=fps)
        if self._lines and now - self._last >= self.INTERVAL:
            self._last = now
            of = f" of {progress.total}" if progress.total else ""
            left = f", {max(0, progress.total - progress.done) / fps:.0f} s left" if progress.total else ""
            stderr.print(f"{self._name}: {progress.done}{of} frames, {fps:.2f} fps{left}", markup=False)

"""What commands print: tables for people, JSON for programs, and the line that ends a failure."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from duovsr.errors import DuovsrError
from duovsr.progress import printable, stderr

if TYPE_CHECKING:
    from duovsr.engine.batch import Outcome
    from duovsr.engine.files import UpscaleReport
    from duovsr.engine.plan import Plan
    from duovsr.metrics.report import Report


def fail(message: str, hint: str | None, code: int) -> NoReturn:
    say(f"error: {message}")
    if hint:
        say(f"hint: {hint}")
    sys.exit(code)


def say(text: str) -> None:
    stderr.print(printable(text), markup=False)


@contextmanager
def to_stdout() -> Iterator[None]:
    """What is printed inside has gone out afterwards. Raises `DuovsrError` where it cannot, as on a full disk."""
    try:
        yield
        if sys.stdout is not None:  # as it is where the shell closed it
            sys.stdout.flush()
    except BrokenPipeError:  # of a reader such as `head`, which wants no more: typer ends with code 1
        raise
    except OSError as error:
        discard_stdout()
        raise DuovsrError(f"standard output cannot be written: {error.strerror}") from error


def discard_stdout() -> None:
    """Python would try to write the rest on leaving."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_line(text: object) -> None:
    with to_stdout():
        print(text)


def print_json(data: object) -> None:
    print_line(json.dumps(data, indent=2, default=str))


def show(record: dict[str, Any], as_json: bool) -> None:
    """Name and value a line, to stdout."""
    if as_json:
        print_json(record)
        return
    from rich.table import Table

    rows = _flatten(record)
    stdout = Console(emoji=False, markup=False)
    if not stdout.is_terminal:
        print_line("\n".join(f"{key}: {value}" for key, value in rows))
        return
    table = Table(box=None, show_header=False)
    for key, value in rows:
        table.add_row(key, value)
    with to_stdout():
        stdout.print(table)


def show_plan(plan: Plan, frames: int | None, seconds: float, streams: bool, as_json: bool) -> None:
    """`seconds`: measured for a frame; `streams`: the model takes state from chunk to chunk."""
    estimate = None if frames is None else frames * seconds
    if as_json:
        measured = {"frames": frames, "seconds_per_frame": seconds, "estimated_seconds": estimate}
        print_json({**plan.to_json(), **measured})
        return
    (width, height), (target_width, target_height) = plan.source_size, plan.target_size
    if plan.fade:
        state = f"{plan.fade} frames cross-faded with the chunk before"
    else:
        state = "state carried over" if plan.overlap is None else f"independent, {plan.overlap} frames of warm-up"
    tile = plan.tiles[0]
    tiles = "whole frames" if len(plan.tiles) == 1 else f"{len(plan.tiles)} of up to {tile.width}x{tile.height}"
    lines = {
        "size": f"{width}x{height} -> {target_width}x{target_height}",
        "frames": "unknown" if frames is None else f"about {frames}",
        "chunks": f"{plan.chunk} frames, {state}",
        "tiles": tiles,
        **({} if streams else {"autoencoder": plan.pieces}),
        "device": f"{plan.device}, {plan.dtype}",
        "memory": f"about {plan.memory_bytes / 2**30:.1f} GiB",
        "estimate": f"{seconds:.2f} s a frame" + ("" if estimate is None else f", {estimate:.0f} s in all"),
    }
    show(lines, as_json=False)


def show_scores(report: Report) -> None:
    from rich.table import Table

    table = Table("clip", *report.means)
    for clip in report.clips:
        table.add_row(clip.name, *(_score(clip.scores.get(name)) for name in report.means))
    every = len(report.clips) + len(report.failed)
    label = f"mean of {len(report.clips)} of {every} clips" if report.failed else "mean"
    table.add_row(label, *map(_score, report.means.values()))
    with to_stdout():
        Console(emoji=False, markup=False).print(table)


def say_result(destination: Path, report: UpscaleReport) -> None:
    """What became of one file, to stderr."""
    for notice in report.notices:
        say(f"note: {notice}")
    width, height = report.plan.target_size
    earlier = f", {report.reused} of them from an earlier run" if report.reused else ""
    say(f"{destination}: {report.frames} frames, {width}x{height}, {_fps(report):.2f} fps{earlier}")


def say_summary(outcomes: Sequence[Outcome]) -> None:
    """A line a file, and what they add up to, to stderr."""
    say(f"{'status':8}{'frames':>8}{'fps':>8}  file")
    for outcome in outcomes:
        report = outcome.report
        numbers = f"{report.frames:>8}{_fps(report):>8.2f}" if report else f"{'-':>8}{'-':>8}"
        reason = f": {outcome.reason}" if outcome.reason else ""
        say(f"{outcome.status:8}{numbers}  {outcome.item.source}{reason}")
    say(", ".join(f"{count} {status}" for status, count in counts(outcomes).items()))


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many files there are of each status that occurs."""
    statuses = [outcome.status for outcome in outcomes]
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def file_record(source: Path, destination: Path, report: UpscaleReport) -> dict[str, Any]:
    """What `--json` tells of one file."""
    return {
        "source": str(source),
        "output": str(destination),
        "frames": report.frames,
        "reused": report.reused,
        "seconds": report.seconds,
        "notices": report.notices,
        "plan": report.plan.to_json(),
    }


def outcome_record(outcome: Outcome) -> dict[str, Any]:
    """What `--json` tells of one file of many."""
    item, status = outcome.item, {"status": outcome.status}
    if outcome.report is not None:
        return {**file_record(item.source, item.target, outcome.report), **status}
    reason = {"reason": outcome.reason} if outcome.reason else {}
    return {"source": str(item.source), "output": str(item.target), **status, **reason}


def _fps(report: UpscaleReport) -> float:
    return (report.frames - report.reused) / max(report.seconds, 1e-9)


def _flatten(record: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key} ")
        elif isinstance(value, list | tuple):
            rows.append((prefix + key, ", ".join(map(_short, value)) or "none"))
        else:
            rows.append((prefix + key, _short(value)))
    return rows


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

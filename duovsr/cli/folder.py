"""A folder of videos: one after another with one loaded model, and a summary."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from duovsr.cli.show import counts, outcome_record, print_json, say, say_result, say_summary, show
from duovsr.cli.signals import StopRequest, resumable
from duovsr.errors import EXIT_WARNINGS
from duovsr.options import Progress, UpscaleOptions
from duovsr.progress import Reporter

if TYPE_CHECKING:
    from duovsr.engine.batch import Item, Outcome, Selection
    from duovsr.engine.upscaler import Upscaler


def upscale_folder(
    source: Path,
    destination: Path,
    selection: Selection,
    options: UpscaleOptions,
    load: Callable[[], Upscaler],
    dry_run: bool,
    as_json: bool,
) -> None:
    """`load` is called if there is something to do. The summary is given however the work ends."""
    from duovsr.engine.batch import Outcome, find_items

    items = find_items(source, destination, selection)
    finished = {item for item in items if item.is_finished and not options.overwrite}
    outcomes = {item: Outcome(item, "skipped" if item in finished else "to do") for item in items}
    if dry_run:
        _show_outcomes(outcomes, as_json)
        return
    try:
        # With --overwrite the same command would not go on, but make all outputs again.
        with nullcontext() if options.overwrite else resumable(lambda: True):
            if todo := [item for item in items if item not in finished]:
                _upscale(todo, destination, options, load, outcomes)
    finally:
        say_summary(list(outcomes.values()))
        if as_json:
            _print_json(outcomes)
    if any(outcome.status == "failed" or (outcome.report and outcome.report.warnings) for outcome in outcomes.values()):
        raise typer.Exit(EXIT_WARNINGS)


def _upscale(
    items: list[Item],
    destination: Path,
    options: UpscaleOptions,
    load: Callable[[], Upscaler],
    outcomes: dict[Item, Outcome],
) -> None:
    """Fills in `outcomes` on the way."""
    upscaler = load()
    from duovsr.engine.batch import upscale_items
    from duovsr.video.output import disk_errors

    with disk_errors(destination):
        destination.mkdir(exist_ok=True)
    places = {item: f"[{place}/{len(items)}] {item.source}" for place, item in enumerate(items, start=1)}
    with Reporter() as reporter, StopRequest() as should_stop:

        def on_progress(item: Item, progress: Progress) -> None:
            reporter(places[item], progress)

        for outcome in upscale_items(upscaler, items, options, on_progress, should_stop):
            outcomes[outcome.item] = outcome
            if outcome.report is not None:
                say_result(outcome.item.target, outcome.report)
            else:
                say(f"failed: {outcome.item.source}: {outcome.reason}")


def _show_outcomes(outcomes: dict[Item, Outcome], as_json: bool) -> None:
    if as_json:
        _print_json(outcomes)
        return
    show({f"{item.source}": f"{item.target} ({outcome.status})" for item, outcome in outcomes.items()}, as_json=False)


def _print_json(outcomes: dict[Item, Outcome]) -> None:
    files = list(outcomes.values())
    print_json({"files": [outcome_record(outcome) for outcome in files], "counts": counts(files)})

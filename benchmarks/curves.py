"""The curves of training runs, from their logs, and whether a fresh run repeats the first steps of one.

    python benchmarks/curves.py runs/refine12 runs/refine13 ... [--again runs/fresh]

Of every run, in the order given: its settings, the means of its losses over 200 steps, and every validation. With
`--again`, the folder of a second run of one's command (it may be stopped after some steps): the losses of the steps
that both noted, beside each other. Writes `results/training.json`, which `charts.py` draws; what it has of
other runs, whose logs may be gone, stays in it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from measuring import RESULTS, write_json

from duovsr.train.journal import METRICS, SETTINGS

RESULT = RESULTS / "training.json"
SPAN = 200  # steps
APART = ("step", "seconds")
Row = dict[str, Any]


def rows_of(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def is_validation(row: Row) -> bool:
    return any(name.startswith("validation_") for name in row)


def curves(run: Path) -> Row:
    """Settings, losses and validations of one run; a span's `step` is its first."""
    rows = rows_of(run)
    spans: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if not is_validation(row):
            spans[row["step"] // SPAN * SPAN].append(row)
    record = json.loads((run / SETTINGS).read_text())
    return {
        "stage": record["stage"],
        "settings": record["settings"],
        "init": Path(record["inputs"]["init"]).name,
        "pools": [Path(pool).name for pool in record["inputs"]["data"]],
        "held_out": [Path(pool).name for pool in record["inputs"]["held_out"]],
        "versions": record["versions"],
        "losses": [{"step": step, **means(span)} for step, span in sorted(spans.items())],
        "validation": [rounded(row) for row in rows if is_validation(row)],
    }


def means(rows: list[Row]) -> Row:
    """Of every value, over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row if name not in APART)
    return rounded({name: fmean(row[name] for row in rows if name in row) for name in names})


def rounded(row: Row) -> Row:
    return {name: round(value, 5) for name, value in row.items() if name != "seconds"}


def command_of(run: Path) -> Row:
    record = json.loads((run / SETTINGS).read_text())
    return {"settings": record["settings"], "inputs": record["inputs"]}


def repeated(runs: list[Path], again: Path) -> Row:
    """The losses of `again` and of the run with its settings and inputs, at the steps that both noted."""
    run = next((run for run in runs if command_of(run) == command_of(again)), None)
    if run is None:
        raise SystemExit(f"no run has the settings and inputs of {again}")
    first, second = ({row["step"]: row["loss"] for row in rows_of(each) if "loss" in row} for each in (run, again))
    steps = sorted(first.keys() & second.keys())
    return {
        "run": run.name,
        "losses": [{"step": step, "logged": first[step], "again": second[step]} for step in steps],
        "largest_difference": max(abs(first[step] - second[step]) for step in steps),  # step 0 is always noted
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--again", type=Path)
    options = parser.parse_args()
    record: Row = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}}
    record["runs"] |= {run.name: curves(run) for run in options.runs}
    if options.again:
        record["again"] = repeated(options.runs, options.again)
        print(f"{record['again']['run']} again: losses differ by {record['again']['largest_difference']:g} at most")
    write_json(RESULT, record)
    print(RESULT)


if __name__ == "__main__":
    main()

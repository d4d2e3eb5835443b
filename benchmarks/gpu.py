"""All that a GPU is to tell, in one command, the most valuable first: are the kernels right, and how fast is it all?

    PYTHONPATH=. python benchmarks/gpu.py

Needs torch, triton, numpy and safetensors; no PyAV. The kernels are checked against float64 at the presets' shapes, and
if one is wrong it ends there. Then `1.3b` and `tiny` with random weights restore clips from frames in host memory to
frames in host memory: time, peak memory against the plan, and stage by stage the work, the floor and how far it is.
`results/gpu_<device>.json` is written after each part, so that what stops it costs a part; a part that fails is noted
there and the next one begins, and none begins after `--limit-minutes`. Prints the table for the README.

`--device cpu --small --out FILE` runs all of it on toy sizes: a test of this script, of which no time means anything.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kernel_cases
import kernels
import torch
from beside_diffusers import measure as measure_beside_diffusers
from kernel_cases import Case, run_fused, run_twin
from measuring import RESULTS, describe, measure_peaks, write_json
from workloads import Workload, measure, preset_of, table

from duovsr.engine.memory import release_memory
from duovsr.engine.precision import choose_device, choose_dtype
from duovsr.kernels.dispatch import triton_failure
from duovsr.options import WindowConfig

Rows = list[dict[str, Any]]


class WrongError(Exception):
    """A kernel does not compute what it should: no time of it is worth anything."""


class Session:
    """The parts that were run, and the file that holds what they gave."""

    def __init__(self, device: torch.device, small: bool, path: Path, minutes: float) -> None:
        self.device, self.small, self.path = device, small, path
        self.deadline = time.monotonic() + 60 * minutes
        self.parts: dict[str, dict[str, Any]] = {}
        self.record = {"benchmark": "gpu", "machine": describe(device), "small": small, "parts": self.parts}

    def run(self, name: str, part: Callable[[], Rows]) -> Rows:
        """The part's rows, none where it failed or there is no time left for it."""
        began = time.monotonic()
        if began > self.deadline:
            self.parts[name] = {"skipped": "the time was up"}
            rows: Rows = []
        else:
            try:
                rows = part()
                self.parts[name] = {"rows": rows}
            except WrongError:
                raise
            except Exception as error:  # noqa: BLE001  # whatever it is: it is said, and the other parts still run
                traceback.print_exc()
                self.parts[name] = {"failed": f"{type(error).__name__}: {error}"}
                rows = []
            self.parts[name]["part_seconds"] = round(time.monotonic() - began, 2)
        write_json(self.path, self.record)
        print(f"== {name}: {self.parts[name].get('skipped') or time.monotonic() - began}", file=sys.stderr, flush=True)
        gc.collect()
        release_memory(self.device)
        return rows


def shrink_cases() -> None:
    """Toy sizes for the kernels' cases."""
    kernel_cases.MODELS |= {"1.3b": (32, 2), "tiny": (32, 2)}
    kernel_cases.PLACES |= dict.fromkeys(kernel_cases.PLACES, (2, 4, 5))
    kernel_cases.WINDOWS |= {"1.3b": WindowConfig(4, 4, past=None), "tiny": WindowConfig(4, 4, past=1)}
    kernel_cases.VAE_STAGES |= dict.fromkeys(kernel_cases.VAE_STAGES, (12, 2, 5, 7))


def checked(cases: list[Case], session: Session, dtypes: list[torch.dtype]) -> Rows:
    """Raises WrongError."""
    fused = session.device.type == "cuda"
    rows = kernels.check(cases, session.device, dtypes, run_fused if fused else run_twin)
    wrong = [row for row in rows if not row["right"]]
    if wrong:
        session.parts["wrong"] = {"rows": wrong}
        write_json(session.path, session.record)
        raise WrongError(", ".join(f"{row['kernel']} {row['shape']} {row['dtype']}" for row in wrong))
    return rows


def workloads(small: bool) -> dict[str, Workload]:
    """By the name of the part; the paper's own first: 21 frames of 1920x1080."""
    wan, light = (preset_of("1.3b", vae, small) for vae in ("wan", "tiny"))
    tiny = preset_of("tiny", small=small)
    full_hd, hd, frames, many = ((64, 48), (48, 32), 5, 9) if small else ((1920, 1080), (1280, 720), 21, 101)
    window = 32 if small else 512
    return {
        "1.3b": Workload("`1.3b`, Wan2.1's autoencoder", wan, full_hd, frames),
        "1.3b, TinyVAE": Workload("`1.3b`, TinyVAE", light, full_hd, frames),
        "tiny": Workload("`tiny`", tiny, full_hd, frames),
        "tiny, long": Workload("`tiny`, call after call", tiny, full_hd, many, whole=False),
        "1.3b, 720p": Workload("`1.3b`, Wan2.1's autoencoder", wan, hd, frames),
        "1.3b, windows": Workload(f"`1.3b`, `--window {window}`", wan, full_hd, frames, window=window),
        "1.3b, long": Workload("`1.3b`, clip after clip", wan, hd, many, whole=False),
    }


def measure_all(session: Session, dtype: torch.dtype) -> Rows:
    """The rows of all workloads. Raises WrongError."""
    device, small = session.device, session.small
    cases = kernel_cases.cases()
    attention = [case for case in cases if case.kernel == "attention"]
    held = "auto" if device.type == "cuda" else "float32"
    # In bfloat16 first, with which the presets run; the other dtypes later.
    if not session.run("kernels are right, bfloat16", lambda: checked(cases, session, [torch.bfloat16])):
        raise WrongError("they could not be checked")
    peaks = measure_peaks(device, dtype, small)
    session.run("peaks", lambda: [asdict(peaks)])
    todo = workloads(small)

    def work(*names: str) -> Rows:
        return [row for name in names for row in session.run(name, lambda name=name: one(todo[name]))]  # type: ignore[misc]

    def one(workload: Workload) -> Rows:
        return [measure(workload, device, held, peaks, 2 if small else 5, session.deadline)]

    rows = work("1.3b", "1.3b, TinyVAE", "tiny")
    tuned = session.run("block sizes of attention", lambda: tune(attention, device))
    session.run("attention", lambda: [kernels.measure(case, device, peaks) for case in attention])
    if find_spec("diffusers") is not None:
        session.run("autoencoder beside diffusers", lambda: beside_diffusers(session, dtype))
    rows += work("tiny, long", "1.3b, 720p", "1.3b, windows")
    ours = replace(todo["1.3b"], attention="triton")
    session.run("1.3b, tuned blocks", lambda: with_tuned_blocks(tuned, lambda: one(ours)))
    session.run(
        "other kernels", lambda: [kernels.measure(case, device, peaks) for case in cases if case not in attention]
    )
    rows += work("1.3b, long")
    session.run("kernels are right, other dtypes", lambda: checked(cases, session, [torch.float16, torch.float32]))
    return rows


def tune(cases: list[Case], device: torch.device) -> Rows:
    """The first case of full attention and of each kind of windows. Nothing to tune where Triton does not run."""
    if not kernels.triton_runs(device):
        return []
    kinds = {case.shape.split(",")[0]: case for case in reversed(cases)}
    return [kernels.tune_blocks(case, device) for case in reversed(kinds.values())]


def with_tuned_blocks(tuned: Rows, one: Callable[[], Rows]) -> Rows:
    """The rows of `one` with the block sizes that were the fastest of full attention."""
    timed = [entry for row in tuned[:1] for entry in row["tuned"] if "median" in entry["milliseconds"]]
    if not timed:
        return []
    best = min(timed, key=lambda entry: entry["milliseconds"]["median"])["blocks"]
    with kernels.with_blocks(best):
        return [{**row, "blocks": best} for row in one()]


def beside_diffusers(session: Session, dtype: torch.dtype) -> Rows:
    size, frames, repeat = ((64, 48), 5, 1) if session.small else ((1920, 1088), 21, 2)
    config = preset_of("1.3b", "wan", session.small).vae
    return [measure_beside_diffusers(config, session.device, dtype, size, frames, repeat)]  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="toy sizes, to test this script")
    parser.add_argument("--limit-minutes", type=float, default=8.0, help="no part begins later")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    if options.small and options.out is None:
        parser.error("--small: name a file by --out; such times are not kept")
    device = choose_device(options.device)
    failure = triton_failure(0) if device.type == "cuda" else None if options.small else "no CUDA device"
    if failure is not None:
        print(f"error: the kernels cannot run here: {failure}", file=sys.stderr)
        return 1
    if options.small:
        shrink_cases()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = options.out or RESULTS / f"gpu_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"
    session = Session(device, options.small, path, options.limit_minutes)
    try:
        rows = measure_all(session, choose_dtype("auto", device) if device.type == "cuda" else torch.float32)
    except WrongError as wrong:
        print(f"error: these kernels are wrong: {wrong}", file=sys.stderr)
        return 1
    print(table(rows))
    failed = {name: part["failed"] for name, part in session.parts.items() if "failed" in part}
    for name, reason in failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The Triton kernels at every shape of the presets: on an NVIDIA GPU first right, then fast.

`python benchmarks/kernels.py` checks each against float64 (relative Frobenius error: bfloat16 and float16 1e-2, float32
1e-3), then times each beside its twin, or attention's other backends, and writes `results/kernels_<gpu>.json`: medians
and spread by CUDA events, TFLOP/s and GB/s, and the time beside its floor, which is the work at what the GPU is
measured to do. `--tune` also times other block sizes of attention. (`gpu.py` does all this, and the models.)

`python benchmarks/kernels.py --check-compile` needs no GPU: it compiles all of them for sm_80, sm_89 and sm_90, prints
what they take as a table, and writes `results/kernels_compiled.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_cases import Case, cases, fits, relative_error, run_fused, run_twin
from measuring import RESULTS, Peaks, describe, measure_peaks, milliseconds, write_json

from duovsr.kernels.backends import usable
from duovsr.kernels.dispatch import triton_failure

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-3}
BLOCKS = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps, stages in (
        *((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3)),
        *((64, 128, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3)),
    )
]


def check(
    all_cases: list[Case],
    device: torch.device,
    dtypes: Iterable[torch.dtype] = tuple(BOUNDS),
    run: Callable[[Case, tuple[Any, ...]], tuple[torch.Tensor, ...]] = run_fused,
) -> list[dict[str, Any]]:
    """The error of every fused kernel (`run`), and of its twin beside it."""
    rows = []
    for dtype in dtypes:
        for case in all_cases:
            if fits(case, dtype):
                torch.manual_seed(0)
                arguments = case.make(device, dtype)
                error, twin = (relative_error(case, way(case, arguments), arguments) for way in (run, run_twin))
                row = {"kernel": case.kernel, "shape": case.shape, "dtype": str(dtype), "error": error, "twin": twin}
                rows.append({**row, "right": error <= BOUNDS[dtype]})
                print(f"{case.kernel:24} {case.shape:36} {dtype!s:15} {error:.1e} (twin {twin:.1e})", file=sys.stderr)
    return rows


def contenders(case: Case, arguments: tuple[Any, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    """By name, ours first where it runs: attention's other backends, or the twin."""
    if case.kernel == "attention":
        names = usable(device, arguments[0].dtype, arguments[0].shape[-1])
        return {name: (lambda name=name: case.run(*arguments, backend=name)) for name in names}  # type: ignore[misc]
    ways = {"fused": run_fused, "twin": run_twin} if triton_runs(device) else {"twin": run_twin}
    return {name: (lambda run=run: run(case, arguments)) for name, run in ways.items()}  # type: ignore[misc]


def triton_runs(device: torch.device) -> bool:
    return device.type == "cuda" and triton_failure(device.index or 0) is None


def measure(case: Case, device: torch.device, peaks: Peaks) -> dict[str, Any]:
    """Ours, or what stands for it where Triton does not run, beside the floor; in bfloat16, as the presets run."""
    torch.manual_seed(0)
    arguments = case.make(device, torch.bfloat16)
    times: dict[str, Any] = {}
    with torch.inference_mode():
        for name, compute in contenders(case, arguments, device).items():
            try:
                times[name] = milliseconds(compute, device)
            except RuntimeError as error:  # a library without kernels for this GPU; ours were run by `check`
                times[name] = {"failed": str(error).splitlines()[0]}
    ours = next(iter(times.values()))["median"]
    floor = 1000 * max(case.flops / peaks.flops, 2 * case.numbers / peaks.bytes)
    print(f"{case.kernel:24} {case.shape:36} {ours:8.3f} ms, floor {floor:.3f}", file=sys.stderr)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "milliseconds": times,
        "floor_milliseconds": floor,
        "times_floor": ours / floor,
        "tflop_per_second": case.flops / ours / 1e9,
        "gb_per_second": 2 * case.numbers / ours / 1e6,
    }


@contextmanager
def with_blocks(blocks: dict[str, int]) -> Iterator[None]:
    """Our attention is launched with these block sizes."""
    from duovsr.kernels.fused import attention

    chosen = attention.config
    attention.config = lambda *_: blocks
    try:
        yield
    finally:
        attention.config = chosen


def tune_blocks(case: Case, device: torch.device) -> dict[str, Any]:
    """Milliseconds of our attention by block sizes, in bfloat16: what `config` should hold."""
    torch.manual_seed(0)
    arguments, tuned = case.make(device, torch.bfloat16), []
    for blocks in BLOCKS:
        try:
            with torch.inference_mode(), with_blocks(blocks):
                times: dict[str, Any] = milliseconds(lambda: run_fused(case, arguments), device, repeat=5)
        except triton.runtime.errors.OutOfResources as error:
            times = {"failed": str(error)}
        tuned.append({"blocks": blocks, "milliseconds": times})
        print(f"{case.shape:36} {blocks}: {times}", file=sys.stderr)
    return {"kernel": case.kernel, "shape": case.shape, "tuned": tuned}


def report_compiled(destination: Path) -> None:
    from kernel_compile import ARCHITECTURES, compile_all

    rows = []
    print("| kernel | first shape | dtype | sm | block sizes | registers | stack | shared memory |")
    print("|---|---|---|---|---|---|---|---|")
    for architecture in ARCHITECTURES:
        for row in compile_all(cases(), [torch.bfloat16, torch.float32], architecture):
            rows.append(asdict(row))
            sizes = " ".join(
                f"{name}={value}" for name, value in row.constants.items() if name.isupper() or "num" in name
            )
            print(
                f"| {row.kernel} | {row.shape} | {row.dtype} | {row.architecture} | {sizes} | {row.registers}"
                f" | {row.stack} | {row.shared_memory} |"
            )
    destination.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-compile", action="store_true", help="compile for other GPUs, without one")
    parser.add_argument("--tune", action="store_true", help="also time other block sizes of attention")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    if options.check_compile:
        report_compiled(options.out or RESULTS / "kernels_compiled.json")
        return 0
    failure = triton_failure(0) if torch.cuda.is_available() else "no CUDA device"
    if failure is not None:
        print(f"error: the kernels cannot run here: {failure}", file=sys.stderr)
        return 1
    device, name = torch.device("cuda", 0), torch.cuda.get_device_name(0)
    checked = check(cases(), device)
    wrong = [row for row in checked if not row["right"]]
    record: dict[str, Any] = {"machine": describe(device), "checked": checked}
    if not wrong:
        peaks = measure_peaks(device, torch.bfloat16, small=False)
        record |= {"peaks": asdict(peaks), "timed": [measure(case, device, peaks) for case in cases()]}
        if options.tune:
            record["tuned"] = [tune_blocks(case, device) for case in cases() if case.kernel == "attention"]
    write_json(options.out or RESULTS / f"kernels_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json", record)
    for row in wrong:
        print(f"error: {row['kernel']}, {row['shape']}, {row['dtype']}: off by {row['error']:.1e}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

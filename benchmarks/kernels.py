"""The Triton kernels at every shape of the presets: on an NVIDIA GPU first right, then fast.

`python benchmarks/kernels.py` checks each against float64 (relative Frobenius error: bfloat16 and float16 1e-2, float32
1e-3), then times each beside its twin, or attention's other backends, and writes `results/kernels_<gpu>.json`: medians
and spread by CUDA events, TFLOP/s and GB/s, and the time beside its floor, which is the work at what an H200 was
measured to do (reference: 790 TFLOP/s in bfloat16, 4.3 TB/s). `--tune` also times other block sizes of attention.

`python benchmarks/kernels.py --check-compile` needs no GPU: it compiles all of them for sm_80, sm_89 and sm_90, prints
what they take as a table, and writes `results/kernels_compiled.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_cases import Case, cases, fits, relative_error, run_fused, run_twin

from duovsr.kernels.backends import usable, versions
from duovsr.kernels.dispatch import triton_failure

RESULTS = Path(__file__).parent / "results"
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-3}
FLOPS_PER_MS, BYTES_PER_MS = 790e9, 4.3e9
BLOCKS = [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3)]


def milliseconds(compute: Callable[[], object], repeat: int = 15) -> dict[str, float]:
    """Median and spread after a warm-up, which compiles."""
    for _ in range(3):
        compute()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
    for start, end in events:
        start.record()
        compute()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def check(all_cases: list[Case], device: torch.device) -> list[dict[str, Any]]:
    """The error of every fused kernel, and of its twin beside it."""
    rows = []
    for case in all_cases:
        for dtype, bound in BOUNDS.items():
            if fits(case, dtype):
                torch.manual_seed(0)
                arguments = case.make(device, dtype)
                error, twin = (relative_error(case, run(case, arguments), arguments) for run in (run_fused, run_twin))
                row = {"kernel": case.kernel, "shape": case.shape, "dtype": str(dtype), "error": error, "twin": twin}
                rows.append({**row, "right": error <= bound})
                print(f"{case.kernel:24} {case.shape:36} {dtype!s:15} {error:.1e} (twin {twin:.1e})", file=sys.stderr)
    return rows


def contenders(case: Case, arguments: tuple[Any, ...], device: torch.device) -> dict[str, Callable[[], object]]:
    if case.kernel != "attention":
        return {"fused": lambda: run_fused(case, arguments), "twin": lambda: run_twin(case, arguments)}
    names = usable(device, arguments[0].dtype, arguments[0].shape[-1])
    return {name: (lambda name=name: case.run(*arguments, backend=name)) for name in names}  # type: ignore[misc]


def measure(case: Case, device: torch.device, tune: bool) -> dict[str, Any]:
    """In bfloat16, as the presets run."""
    torch.manual_seed(0)
    arguments = case.make(device, torch.bfloat16)
    times: dict[str, Any] = {}
    with torch.inference_mode():
        for name, compute in contenders(case, arguments, device).items():
            try:
                times[name] = milliseconds(compute)
            except RuntimeError as error:  # a library without kernels for this GPU; ours were run by `check`
                times[name] = {"failed": str(error).splitlines()[0]}
        tuned = tune_blocks(case, arguments) if tune and case.kernel == "attention" else {}
    ours = times["triton" if case.kernel == "attention" else "fused"]["median"]
    floor = max(case.flops / FLOPS_PER_MS, 2 * case.numbers / BYTES_PER_MS)
    print(f"{case.kernel:24} {case.shape:36} {ours:8.3f} ms, floor {floor:.3f}", file=sys.stderr)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "milliseconds": times,
        "floor_milliseconds": floor,
        "times_floor": ours / floor,
        "tflop_per_second": case.flops / ours / 1e9,
        "gb_per_second": 2 * case.numbers / ours / 1e6,
        **({"blocks": tuned} if tuned else {}),
    }


def tune_blocks(case: Case, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Milliseconds of our attention by BLOCK_M, BLOCK_N, warps and stages: what `config` should hold."""
    from duovsr.kernels.fused import attention

    chosen, tuned = attention.config, dict[str, Any]()
    for m, n, warps, stages in BLOCKS:
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
        attention.config = lambda *_, blocks=blocks: blocks
        try:
            tuned[f"{m}x{n}, {warps} warps, {stages} stages"] = milliseconds(lambda: run_fused(case, arguments), 5)
        except triton.runtime.errors.OutOfResources as error:
            tuned[f"{m}x{n}, {warps} warps, {stages} stages"] = {"failed": str(error)}
    attention.config = chosen
    return tuned


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
    timed = [] if wrong else [measure(case, device, options.tune) for case in cases()]
    record = {"device": name, "versions": versions(), "checked": checked, "timed": timed}
    path = options.out or RESULTS / f"kernels_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    for row in wrong:
        print(f"error: {row['kernel']}, {row['shape']}, {row['dtype']}: off by {row['error']:.1e}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

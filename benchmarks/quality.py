"""Quality of the shipped model on held-out clips, through the command line with lossless output.

`python benchmarks/quality.py EVAL_FOLDER --niqe-parameters FILE` upscales EVAL_FOLDER/{real,bi} x4, measures the
results against EVAL_FOLDER/gt with `duovsr eval`, and writes `results/quality.json`. The clips are not ours to ship.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, describe, write_json


def duovsr(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "duovsr", *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 1):  # 1: done, but something was not kept
        raise SystemExit(done.returncode)
    return done.stdout


def measure(folder: Path, truth: Path, out: Path, niqe_parameters: Path, flags: list[str]) -> dict[str, Any]:
    """Upscale every clip of `folder` and measure the results against `truth`."""
    out.mkdir(parents=True, exist_ok=True)
    for clip in sorted(folder.iterdir()):
        duovsr("upscale", clip, out / f"{clip.stem}.mkv", "--codec", "ffv1", "--overwrite", *flags)
    report = json.loads(duovsr("eval", out, "--ref", truth, "--niqe-parameters", niqe_parameters, "--json"))
    return {
        "means": report["means"],
        "clips": {clip["name"]: clip["scores"] for clip in report["clips"]},
        "conventions": report["conventions"],
        "versions": report["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("eval_folder", type=Path)
    parser.add_argument("--niqe-parameters", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="where the upscaled clips go")
    parser.add_argument("--sets", default="real,bi")
    parser.add_argument("--result", type=Path, default=RESULTS / "quality.json")
    arguments, flags = parser.parse_known_args()
    rows = {
        name: measure(
            arguments.eval_folder / name,
            arguments.eval_folder / "gt",
            arguments.out / name,
            arguments.niqe_parameters,
            flags,
        )
        for name in arguments.sets.split(",")
    }
    models = json.loads(duovsr("doctor", "--json"))["models"]
    machine = describe(torch.device("cpu"))
    write_json(arguments.result, {"machine": machine, "flags": flags, "models": models, "sets": rows})
    for name, row in rows.items():
        print(name, " ".join(f"{metric}={value:.3f}" for metric, value in row["means"].items()))


if __name__ == "__main__":
    main()

"""Stage II's ablation (paper Table 4) and the other claims in small: on the toy of `tests/toy.py`, over five seeds.

    python -m benchmarks.toy     # from the repository root, about 15 minutes of one core; writes `results/toy.json`

Energy distance to the truth given the LQ (0: equal distributions) of the one-step student before stage II, after it
(joint), and after its parts: DMD alone, GAN alone, one after the other; all with the same number of student updates.
`long` starts from a student that was distilled four times as long. The toy has four modes for every LQ.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from duovsr.engine.bench import describe_machine
from tests import toy

RESULT = Path(__file__).parent / "results" / "toy.json"
SEEDS = range(5)
LONGER = 4


def measure(folder: Path, seed: int) -> dict[str, float]:
    """The claims' figures for one seed, flat: `energy/joint`, `off_mode/dmd` and so on."""
    began = time.process_time()
    runs = toy.run_chain(folder, seed)
    row = {"chain_cpu_seconds": time.process_time() - began}
    teacher, distilled = toy.load(runs["cfg"]), toy.load(runs["progressive"])
    row["undistilled_over_distilled_error"] = toy.one_step_error(teacher, teacher) / toy.one_step_error(
        distilled, teacher
    )
    row["preferred_after_dpo"] = toy.preference(toy.load(runs["dpo"]), toy.load(runs["dual"]))

    samples = {"teacher": toy.many_steps(teacher), "undistilled": toy.single_step(teacher)}
    students = {"progressive": runs["progressive"], "joint": runs["dual"], "dpo": runs["dpo"]}
    for streams in ("dmd", "gan", "sequential"):
        config = toy.configure("dual", seed, streams=streams)
        students[streams] = toy.run_stage(config, "dual", folder / streams, runs["progressive"])
    steps = LONGER * toy.SETTINGS["progressive"].steps
    config = toy.configure("progressive", seed, steps=steps)
    students["progressive_long"] = toy.run_stage(config, "progressive", folder / "long", runs["cfg"])
    config = toy.configure("dual", seed)
    students["joint_long"] = toy.run_stage(config, "dual", folder / "joint_long", students["progressive_long"])
    samples |= {name: toy.single_step(toy.load(run)) for name, run in students.items()}
    for name, sample in samples.items():
        for measure_name, value in asdict(toy.distance_to_truth(sample)).items():
            row[f"{measure_name}/{name}"] = value
    return row


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), seed))
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    summary = {
        name: {"mean": fmean(row[name] for row in rows), "sd": stdev(row[name] for row in rows)} for name in rows[0]
    }
    result: dict[str, Any] = {
        "machine": describe_machine(torch.device("cpu")),
        "settings": {stage: asdict(config) for stage, config in toy.SETTINGS.items()},
        "summary": summary,
        "seeds": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What `1.3b` is planned to take on cards of 24, 16, 12, 8 and 6 GB, at 720p and 1080p: from the planner alone, with
the weights counted on the meta device. Nothing of it has been measured on a GPU.

`python benchmarks/memory_plan.py` writes `results/memory_plan.json` and prints the table of the README.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from duovsr.engine.memory import spendable, weight_bytes
from duovsr.engine.plan import Plan, Precision, WeightBytes, plan_clip
from duovsr.model.one_step import new_autoencoder
from duovsr.model.quantise import bytes_held
from duovsr.model.transformer import Transformer
from duovsr.options import PRESETS, UpscaleOptions

RESULT = Path(__file__).parent / "results" / "memory_plan.json"
CARDS = (24, 16, 12, 8, 6)
TAKEN = 0.5  # GB of a card that the driver, a desktop and CUDA's own context hold
SIZES = {"720p": (320, 180), "1080p": (480, 270)}  # of the source, a quarter of the output


def plan_for(card: float, source: tuple[int, int], weights: dict[str, WeightBytes]) -> Plan:
    """With the first of `weights`, by precision, that fits."""
    free = int((card - TAKEN) * 1e9)
    precisions = [
        Precision(name, 2, each, spendable(free, each.transformer + each.vae)) for name, each in weights.items()
    ]
    return plan_clip(*source, UpscaleOptions(), PRESETS["1.3b"], device="cuda", precisions=precisions)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    preset = PRESETS["1.3b"]
    with torch.device("meta"):
        transformer, vae = Transformer(preset.transformer), new_autoencoder(preset.vae)
    in_vae = weight_bytes(vae.bfloat16())
    weights = {name: WeightBytes(bytes_held(transformer, name, 2), in_vae) for name in ("bfloat16", "int8")}
    rows = []
    print("| card | output | weights | new frames a call | tiles | autoencoder | planned peak |")
    print("|---|---|---|---|---|---|---|")
    for card in CARDS:
        for name, source in SIZES.items():
            plan = plan_for(card, source, weights)
            rows.append({"card_gb": card, "output": name, "pieces": plan.pieces, **plan.to_json()})
            tiles = "whole frames" if len(plan.tiles) == 1 else str(len(plan.tiles))
            peak = f"{plan.memory_bytes / 1e9:.1f} GB"
            print(f"| {card} GB | {name} | {plan.dtype} | {plan.chunk} | {tiles} | {plan.pieces} | {peak} |")
    RESULT.write_text(json.dumps({"measured": False, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How far weights of 8 bits are from those they stand for: single layers at the widths of `1.3b`, and its whole
transformer on few tokens. The weights are RANDOM (normal): what trained ones do has not been measured.

`python benchmarks/precision.py` writes `results/precision.json`: Frobenius norms of the errors, over those of what
float32 gives. It takes 12 GB of memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from duovsr.engine.bench import describe_machine, random_model
from duovsr.model.quantise import EIGHT_BITS, QuantisedLinear
from duovsr.options import PRESETS

RESULT = Path(__file__).parent / "results" / "precision.json"
CPU = torch.device("cpu")
LATENTS = (1, 16, 3, 16, 16)  # 3 latent frames, 192 tokens
WAYS = ("bfloat16", *EIGHT_BITS)  # what float32 is compared with; 8 bits are computed with in float32


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.float() - exact).norm() / exact.norm())


def layer_error(inputs: int, outputs: int, way: str) -> float:
    """Of a layer's output for normal inputs."""
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, outputs).requires_grad_(False), torch.randn(64, inputs)
    linear.weight.normal_(std=inputs**-0.5)
    exact = linear(x)
    if way in EIGHT_BITS:
        return error(QuantisedLinear(linear, EIGHT_BITS[way], torch.float32)(x), exact)
    return error(linear.bfloat16()(x.bfloat16()), exact)


@torch.inference_mode()
def velocity(way: str) -> Tensor:
    torch.manual_seed(0)
    model = random_model(PRESETS["1.3b"], CPU, torch.float32)
    noisy, lq, prompt = torch.randn(LATENTS), torch.randn(LATENTS), torch.randn(model.prompt.shape)
    if way in EIGHT_BITS:
        model = model.quantised(way, torch.float32)
    elif way == "bfloat16":
        model.transformer.bfloat16()
    return model.transformer(noisy, lq, torch.tensor([1000.0]), prompt)[0]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    widths = PRESETS["1.3b"].transformer
    shapes = [(widths.dim, widths.dim), (widths.dim, widths.ffn_dim), (widths.ffn_dim, widths.dim)]
    layers = {f"{i}x{o}": {way: layer_error(i, o, way) for way in WAYS} for i, o in shapes}
    exact = velocity("float32")
    whole = {way: error(velocity(way), exact) for way in WAYS}
    record = {
        "weights": "random, normal",
        "relative_error": {"layers": layers, "transformer": whole},
        "machine": describe_machine(CPU),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["relative_error"], indent=1))


if __name__ == "__main__":
    main()

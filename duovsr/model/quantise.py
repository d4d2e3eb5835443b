"""Weights of 8 bits for the transformer's blocks, which are nearly all of it: half of bfloat16's memory.

Only the weights: each layer's are turned back into the type that is computed with when they are multiplied. That saves
memory and no time, and its error is that of rounding the weights (`benchmarks/precision.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duovsr.kernels.int8 import Int8Linear
from duovsr.model.transformer import Transformer

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
INT8_LAYERS = "8-bit layers"  # see `duovsr.model.int8`
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class QuantisedLinear(nn.Module):
    """A linear layer whose weight is 8-bit values times a scale for each output channel."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, values: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        weight, most = linear.weight.float(), _LARGEST[values]
        scale = (weight.abs().amax(dim=1, keepdim=True) / most).to(dtype)  # rounded first, so that this is no error
        scale.masked_fill_(scale == 0, 1)
        ratio = (weight / scale.float()).clamp_(-most, most)
        self.register_buffer("weight", (ratio.round_() if values == torch.int8 else ratio).to(values))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(linear.bias.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(self.scale.dtype).mul_(self.scale), self.bias)


def quantise(transformer: Transformer, precision: str, dtype: torch.dtype) -> None:
    """Hold the linear layers of the blocks in 8 bits, and all else in the `dtype` that is computed with."""
    for module in list(transformer.blocks.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantisedLinear(child, EIGHT_BITS[precision], dtype))
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)


def precision_of(transformer: Transformer) -> str:
    """How the weights are held: int8, fp8, or the name of their dtype, beside which some layers compute in 8 bits."""
    dtype = _block_weights(transformer)[0].dtype
    held = {values: name for name, values in EIGHT_BITS.items()}.get(dtype, str(dtype).removeprefix("torch."))
    return f"{held} and {INT8_LAYERS}" if any(isinstance(m, Int8Linear) for m in transformer.modules()) else held


def bytes_held(transformer: Transformer, precision: str, value_bytes: int) -> int:
    """What the weights take, or would take, in `precision`, with the largest one of 8 bits while it is multiplied."""
    weights = _block_weights(transformer)
    in_blocks, theirs = sum(weight.numel() for weight in weights), set(map(id, weights))
    others = sum(parameter.numel() for parameter in transformer.parameters() if id(parameter) not in theirs)
    if precision not in EIGHT_BITS:
        return (in_blocks + others) * value_bytes
    scales, largest = sum(len(weight) for weight in weights), max(weight.numel() for weight in weights)
    return in_blocks + (others + scales + largest) * value_bytes


def _block_weights(transformer: Transformer) -> list[Tensor]:
    return [m.weight for m in transformer.blocks.modules() if isinstance(m, nn.Linear | QuantisedLinear)]

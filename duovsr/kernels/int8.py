"""Convolutions and linear layers in 8 bits: on CPUs with VNNI and no AMX they take half the time of bfloat16's.

oneDNN's, by the operators to which torch.compile lowers quantised models on x86. Weights have a scale for each output
channel; activations are unsigned on a grid that is fixed beforehand, so that a frame's result depends on no other's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


def is_int8_fast() -> bool:
    """Whether this CPU multiplies 8-bit integers at twice the rate of bfloat16, or of float32, and torch can ask it to.

    Private in torch, and the only questions that tell. With AMX bfloat16 is fast enough, and keeps its precision.
    """
    vnni = torch.cpu._is_vnni_supported() and not torch.cpu._is_amx_tile_supported()
    return vnni and hasattr(torch.ops.onednn, "qconv2d_pointwise")


@dataclass(frozen=True)
class Grid:
    """What the unsigned 8-bit integers stand for: (integer - zero) * step."""

    step: float
    zero: int

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """Between two values, low <= 0 <= high; what lies beyond them is clamped."""
        step = max(high - low, 1e-6) / 255
        return cls(step, round(-low / step))

    def quantise(self, x: Tensor) -> Tensor:
        # By way of signed integers: torch's conversion to unsigned ones is not vectorised.
        signed = torch.add(x.new_tensor(self.zero - 128), x, alpha=1 / self.step).round_().clamp_(-128, 127)
        return signed.to(torch.int8).view(torch.uint8).bitwise_xor_(128)


class Int8Convolution(nn.Module):
    """A convolution of stride 1 that keeps the size, of integers on the grid `before` or of floats put on it.

    With a grid `after`, a ReLU follows, and the results are integers on it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, before: Grid, after: Grid | None = None) -> None:
        super().__init__()
        padding = weight.shape[-1] // 2
        self.before, self.after, self.bias = before, after, None if bias is None else bias.float()
        values, self.steps = _quantised(weight)
        self.zeros = torch.zeros(len(weight), dtype=torch.long)
        self.shape = ([1, 1], [padding] * 2, [1, 1], 1)  # stride, padding, dilation, groups
        self.weight = torch.ops.onednn.qconv_prepack(values, self.steps, 1.0, before.zero, *self.shape)

    def forward(self, x: Tensor, *, relu: bool = False, onto: Tensor | None = None) -> Tensor:
        """Integers where there is a grid `after`; else `onto`, overwritten by its sum with the result; else as x."""
        values = x if x.dtype == torch.uint8 else self.before.quantise(x)
        packed = (values, self.before.step, self.before.zero, self.weight, self.steps, self.zeros)
        if onto is not None:
            added: tuple[object, ...] = (1.0, 0, onto.dtype, 1.0, 0, "sum", 1.0, "none", [], "")
            return torch.ops.onednn.qconv2d_pointwise.binary(*packed, onto, self.bias, *self.shape, *added)
        after = (1.0, 0, x.dtype) if self.after is None else (self.after.step, self.after.zero, torch.uint8)
        activation = "relu" if relu or self.after is not None else "none"
        return torch.ops.onednn.qconv2d_pointwise(*packed, self.bias, *self.shape, *after, activation, [], "")


class Int8Linear(nn.Module):
    """A linear layer of integers on the grid `before`, or of floats put on it.

    With a grid `after`, a GELU (by tanh) follows, and the results are integers on it; else they are of `dtype`.
    """

    def __init__(self, linear: nn.Linear, before: Grid, after: Grid | None = None) -> None:
        super().__init__()
        self.before, self.after, self.dtype = before, after, linear.weight.dtype
        values, self.steps = _quantised(linear.weight)
        self.zeros, self.bias = torch.zeros(len(values), dtype=torch.long), linear.bias.float()
        self.weight = torch.ops.onednn.qlinear_prepack(values, None)

    def forward(self, x: Tensor) -> Tensor:
        values = x if x.dtype == torch.uint8 else self.before.quantise(x)
        packed = (values, self.before.step, self.before.zero, self.weight, self.steps, self.zeros, self.bias)
        if self.after is None:
            return torch.ops.onednn.qlinear_pointwise(*packed, 1.0, 0, self.dtype, "none", [], "")
        after = (self.after.step, self.after.zero, torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(*packed, *after, "gelu", [], "tanh")


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers, and the step of each output channel."""
    weight = weight.float()
    steps = weight.abs().flatten(1).amax(1).clamp_min(1e-12) / 127
    return (weight / steps.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8), steps

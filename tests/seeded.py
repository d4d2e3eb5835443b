"""Weights and inputs that are functions of integers alone: equal on every machine and with every version of torch."""

from __future__ import annotations

import math

from torch import Tensor, nn

from duovsr.model import flow


def normal(seed: int, *shape: int) -> Tensor:
    return flow.noise(seed, (1, 1, 1, math.prod(shape))).view(shape)


def fill(module: nn.Module) -> None:
    """Every parameter random, in the order of names; signals keep their size. Frozen, in evaluation mode."""
    for seed, (name, parameter) in enumerate(sorted(module.named_parameters())):
        values = normal(seed, *parameter.shape)
        if "norm" in name or name.endswith("gamma"):
            values = values * 0.1 + (0 if name.endswith("bias") else 1)
        elif "scale_" in name:  # of large inputs
            values *= 0.01
        elif name.endswith("weight"):
            values /= math.sqrt(parameter[0].numel())
        else:
            values *= 0.1
        parameter.data.copy_(values)
    module.requires_grad_(False).eval()

"""The transformer's residual stream (Wan2.1): x + gate branch, and LayerNorm with a scale and a shift.

x and branch are (B, ..., D); gate, scale and shift have a row for each of the batch, (B, 1, ..., D).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.kernels.dispatch import fused


@fused()
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters (torch accumulates it in float32), then x (1 + scale) + shift."""
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=eps), 1 + scale)


@fused()
def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate branch."""
    return torch.addcmul(x, gate, branch)


@fused()
def gated_residual_norm(
    x: Tensor, gate: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + gate branch, and its LayerNorm with parameters (D,)."""
    x = torch.addcmul(x, gate, branch)
    return x, F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@fused()
def residual_modulated_norm(
    x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + branch, and its `modulated_norm`."""
    x = x + branch
    return x, modulated_norm(x, shift, scale, eps)

"""Queries and keys on their way from the projections to attention (Wan2.1): normed over all channels, then rotated."""

from __future__ import annotations

import torch
from torch import Tensor

from duovsr.kernels.dispatch import fused


@fused()
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x (..., D) over all channels."""
    # The norm accumulates in float32 without a float32 copy of x, which costs five times as much on a CPU.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    return x * (scale * weight).to(x.dtype)


@fused()
def rotated_norms(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotations: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """q and k (B, T, H, W, D), normed and rotated by `rope_table`'s angles -> (B, T, H, W, heads, head_dim)."""
    return _rotated_norm(q, q_weight, rotations, eps), _rotated_norm(k, k_weight, rotations, eps)


def _rotated_norm(x: Tensor, weight: Tensor, rotations: Tensor, eps: float) -> Tensor:
    """Pairs of channels (2i, 2i + 1) of a head are complex numbers."""
    heads = rms_norm(x, weight, eps).unflatten(-1, (-1, 2 * rotations.shape[-1]))
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)

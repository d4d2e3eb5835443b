"""Between two convolutions of the Wan2.1 VAE: RMS norm and SiLU, with the frames before in front."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.kernels.dispatch import fused


def channel_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """Each position's channels divided by their root mean square, times gamma. x (N, C, ...), gamma (C, 1, ...)."""
    return x * _scale(x) * gamma


@fused()
def norm_silu_after(x: Tensor, gamma: Tensor, before: Tensor | None, zeros: int) -> Tensor:
    """SiLU of `channel_norm` of x (B, C, T, H, W), channels last, after the frames `before` or after so many zeros."""
    B, C, T, H, W = x.shape
    earlier = zeros if before is None else before.shape[2]
    out = torch.empty(B, earlier + T, H, W, C, dtype=x.dtype, device=x.device).permute(0, 4, 1, 2, 3)
    if before is None:
        out[:, :, :earlier].zero_()
    else:
        out[:, :, :earlier].copy_(before)
    new = out[:, :, earlier:]  # computed where the next convolution reads it, with no other copy of x in memory
    F.silu(new.copy_(x).mul_(_scale(x)).mul_(gamma), inplace=True)
    return out


def after(x: Tensor, before: Tensor | None, zeros: int) -> Tensor:
    """x (B, C, T, H, W), channels last, after the frames `before` or after so many zeros."""
    return F.pad(x, (0, 0, 0, 0, zeros, 0)) if before is None else torch.cat([before, x], dim=2)


def _scale(x: Tensor) -> Tensor:
    """What makes the root mean square of each position's channels 1, (N, 1, ...)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    scale = x.shape[1] ** 0.5 / norm.clamp_min(1e-12)
    return scale.clamp_max(torch.finfo(x.dtype).max).to(x.dtype)  # float16: a zero position would be 0 * inf

"""Between two convolutions of the Wan2.1 VAE: RMS norm and SiLU, with the frames before in front."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.kernels.dispatch import fused


def channel_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """Each position's channels divided by their root mean square, times gamma. x (N, C, ...), gamma (C, 1, ...)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    scale = x.shape[1] ** 0.5 / norm.clamp_min(1e-12)
    scale = scale.clamp_max(torch.finfo(x.dtype).max)  # float16: a zero position would be 0 * inf
    return x * scale.to(x.dtype) * gamma


@fused()
def norm_silu_after(x: Tensor, gamma: Tensor, before: Tensor | None, zeros: int) -> Tensor:
    """SiLU of `channel_norm` of x (B, C, T, H, W), channels last, after the frames `before` or after so many zeros."""
    return after(F.silu(channel_norm(x, gamma), inplace=True), before, zeros)


def after(x: Tensor, before: Tensor | None, zeros: int) -> Tensor:
    """x (B, C, T, H, W), channels last, after the frames `before` or after so many zeros."""
    if before is not None:
        return torch.cat([before, x], dim=2)
    # The layout is named because a pad of no frames (the first up-sampling of a lone frame) would lose it.
    return F.pad(x, (0, 0, 0, 0, zeros, 0)).contiguous(memory_format=torch.channels_last_3d) if zeros else x

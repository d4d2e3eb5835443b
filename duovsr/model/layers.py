"""Layers of the DiT, as Wan2.1's `model.py` defines them: q/k norm, rotary positions, timestep embedding."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from duovsr.kernels.prologue import rms_norm

ROPE_THETA = 10000.0


Module = TypeVar("Module", bound=nn.Module)


def channels_last(module: Module) -> Module:
    """Weights of convolutions, of images or of video, in the layout that their kernels read."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
    return module


class RMSNorm(nn.Module):
    """Root-mean-square norm over all channels, before the split into heads (Wan2.1's q/k norm)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A few numbers of the host on `device`. On CUDA the host goes on at once: from pageable memory it would wait for
    all that was launched before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoid of `timestep` (B,) in 0..1000 -> (B, dim) float32, ordered [cos | sin]; float64 inside as in Wan2.1.

    MPS has no float64: there the angles are float32.
    """
    dtype = torch.float32 if timestep.device.type == "mps" else torch.float64
    half = dim // 2
    frequencies = ROPE_THETA ** (-torch.arange(half, dtype=dtype, device=timestep.device) / half)
    angles = timestep.to(dtype)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def rope_table(T: int, H: int, W: int, head_dim: int, start: int, device: torch.device) -> Tensor:
    """Rotations e^(i angle) of latent frames start .. start + T: complex64 (T, H, W, 1, head_dim / 2).

    Each axis has its own frequency ladder; of the head_dim / 2 pairs, t gets what h and w (a third each) leave
    (22/21/21 for head_dim 128). Computed on the CPU in float64, so that every device rotates by the same angles.
    """
    pairs = head_dim // 2
    split = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    positions = [torch.arange(start, start + T), torch.arange(H), torch.arange(W)]
    axes = []
    for axis, (n, position) in enumerate(zip(split, positions, strict=True)):
        ladder = ROPE_THETA ** (-torch.arange(n, dtype=torch.float64) / n)
        angles = position.double()[:, None] * ladder
        shape = [1, 1, 1, n]
        shape[axis] = -1
        rotations = to_device(torch.polar(torch.ones_like(angles), angles).to(torch.complex64), device)
        axes.append(rotations.view(shape).expand(T, H, W, n))  # there, as a clip's table is megabytes
    return torch.cat(axes, dim=-1)[:, :, :, None]

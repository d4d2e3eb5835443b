"""The one resize of duovsr: bicubic with antialiasing, as torch computes it (DESIGN section 2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize_frames(frames: Tensor, height: int, width: int) -> Tensor:
    """(B, 3, T, H, W) of any float dtype -> (B, 3, T, height, width). Overshoot is kept, not clamped."""
    B, C, T = frames.shape[:3]
    if frames.shape[3:] == (height, width):
        return frames
    flat = frames.transpose(1, 2).flatten(0, 1)
    flat = F.interpolate(flat, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return flat.unflatten(0, (B, T)).transpose(1, 2)

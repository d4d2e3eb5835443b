"""The one resize of duovsr: bicubic with antialiasing, as torch computes it (DESIGN section 2)."""

from __future__ import annotations

import numpy as np
import torch
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


def resize_plane(plane: np.ndarray, width: int, height: int) -> np.ndarray:
    """(H, W) uint8 or uint16, such as transparency -> (height, width) of the same type."""
    values = torch.from_numpy(plane.astype(np.float32))[None, None, None]
    resized = resize_frames(values, height, width)[0, 0, 0].round_().clamp_(0, np.iinfo(plane.dtype).max)
    return resized.numpy().astype(plane.dtype)

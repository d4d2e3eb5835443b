"""Frames as people hand them over, and as the model gets them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from duovsr.errors import InputError

_FRAME_DTYPES = (np.uint8, np.uint16, np.float32)
_FRAME_HINT = "frames are (H, W, 3) arrays or tensors of uint8, uint16 or float32"


def to_floats(pixels: Tensor) -> Tensor:
    """(T, H, W, 3) uint8, float32 in [0, 1], or int16 with the bits of uint16 -> (1, 3, T, H, W) float32 in [-1, 1]."""
    top = {torch.uint8: 255, torch.int16: 65535, torch.float32: 1}[pixels.dtype]
    values = pixels.int().bitwise_and_(0xFFFF) if pixels.dtype == torch.int16 else pixels
    return values.permute(3, 0, 1, 2)[None].float() * (2 / top) - 1


def to_pixels(frames: Tensor, dtype: np.dtype) -> Tensor:
    """(1, 3, T, H, W) float32 in [-1, 1] -> (T, H, W, 3) of `dtype`; for uint16, int16 with its bits."""
    pixels = frames[0].permute(1, 2, 3, 0).add(1).clamp_(0, 2)
    if not np.issubdtype(dtype, np.integer):
        return pixels.mul_(0.5).contiguous()
    scaled = pixels.mul_(np.iinfo(dtype).max / 2).round_()
    # By way of signed integers: on CPUs torch's conversion to unsigned ones is not vectorised, and to uint16 it is not
    # there on every device.
    if dtype == np.uint8:
        return scaled.sub_(128).to(torch.int8).view(torch.uint8).bitwise_xor_(128).contiguous()
    return scaled.sub_(32768).to(torch.int16).bitwise_xor_(-32768).contiguous()


def to_numpy(frame: np.ndarray | Tensor) -> np.ndarray:
    """A copy: frames wait for their chunk, and many readers fill one buffer again and again."""
    if isinstance(frame, Tensor):
        if frame.dtype not in (torch.uint8, torch.uint16, torch.float32):
            raise InputError(f"frames of {frame.dtype}", hint=_FRAME_HINT)
        return frame.detach().cpu().numpy().copy()
    if not isinstance(frame, np.ndarray):
        raise InputError(f"a frame is a {type(frame).__name__}", hint=_FRAME_HINT)
    return frame.copy()


def checked(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Raises InputError at the first that is no frame, or not like the others."""
    expected: tuple[tuple[int, ...], np.dtype] | None = None
    for n, frame in enumerate(frames):
        if frame.ndim != 3 or frame.shape[2] != 3 or not frame.size or frame.dtype not in _FRAME_DTYPES:
            raise InputError(f"frame {n} is {frame.dtype} of shape {frame.shape}", hint=_FRAME_HINT)
        expected = expected or (frame.shape, frame.dtype)
        if (frame.shape, frame.dtype) != expected:
            raise InputError(f"frame {n} is {frame.dtype} {frame.shape}, the first was {expected[1]} {expected[0]}")
        yield frame

"""Merging tiles, and chunks that start anew: a linear cross-fade over what they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duovsr.engine.plan import Tile


@dataclass(frozen=True)
class Tail:
    """Results (T, H, W, 3) at the end of a chunk that the next one starts with, too."""

    frames: Tensor


def cross_fade(tail: Tail, frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """From the tail to frames (H, W, 3) of the same times and type, in equal steps: a difference of the two that would
    be one jump is spread over a step more than there are frames."""
    faded = []
    for i, (before, after) in enumerate(zip(tail.frames.cpu().numpy(), frames, strict=True)):
        share = np.float32((i + 1) / (len(frames) + 1))
        mixed = before + share * (after.astype(np.float32) - before)
        faded.append((np.rint(mixed) if np.issubdtype(after.dtype, np.integer) else mixed).astype(after.dtype))
    return faded


def blend_tiles(parts: Iterable[Tensor], tiles: tuple[Tile, ...], width: int, height: int, overlap: int) -> Tensor:
    """Parts (1, C, T, h, w), float32, of a picture of `width` x `height` -> (1, C, T, height, width).

    Neighbours have `overlap` columns or rows in common. Parts are taken one at a time: no two need be in memory.
    """
    merged: Tensor | None = None
    total = torch.zeros(())
    parts = iter(parts)
    for tile in tiles:  # without `zip`, which would hold a part while the next one is made
        part = next(parts)
        if len(tiles) == 1:
            return part
        if merged is None:
            merged = part.new_zeros(*part.shape[:3], height, width)
            total = part.new_zeros(height, width)
        rows, columns = (
            _ramp(tile.y, tile.height, height, overlap, part),
            _ramp(tile.x, tile.width, width, overlap, part),
        )
        weight = rows[:, None] * columns
        region = (..., slice(tile.y, tile.y + tile.height), slice(tile.x, tile.x + tile.width))
        merged[region] += part * weight
        total[region] += weight
        del part
    assert merged is not None
    return merged.div_(total)


def _ramp(start: int, length: int, full: int, overlap: int, like: Tensor) -> Tensor:
    """Weights of one tile along an axis: 1, falling towards a neighbour over the overlap, never 0."""
    position = torch.arange(length, dtype=like.dtype, device=like.device) + 0.5
    weight = torch.ones_like(position)
    if start > 0:
        weight = torch.minimum(weight, position / overlap)
    if start + length < full:
        weight = torch.minimum(weight, (length - position) / overlap)
    return weight

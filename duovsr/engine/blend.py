"""Merging tiles: a linear cross-fade over their overlap."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from duovsr.engine.plan import Tile


def blend_tiles(parts: Iterable[Tensor], tiles: tuple[Tile, ...], width: int, height: int, overlap: int) -> Tensor:
    """Parts (1, C, T, h, w), float32, of a picture of `width` x `height` -> (1, C, T, height, width).

    Neighbours have `overlap` columns or rows in common. Parts are taken one at a time: no two need be in memory.
    """
    merged: Tensor | None = None
    total = torch.zeros(())
    for part, tile in zip(parts, tiles, strict=True):
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
        del part  # not while the next one is made
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

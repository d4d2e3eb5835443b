"""Merging tiles: a linear cross-fade over their overlap."""

from __future__ import annotations

import torch
from torch import Tensor

from duovsr.engine.plan import TILE_OVERLAP, Tile


def blend_tiles(parts: list[Tensor], tiles: tuple[Tile, ...], width: int, height: int) -> Tensor:
    """Parts (1, 3, T, h, w) of a frame of `width` x `height` pixels -> (1, 3, T, height, width)."""
    if len(tiles) == 1:
        return parts[0]
    first = parts[0]
    merged = first.new_zeros(*first.shape[:3], height, width)
    total = first.new_zeros(height, width)
    for part, tile in zip(parts, tiles, strict=True):
        weight = _ramp(tile.y, tile.height, height, first)[:, None] * _ramp(tile.x, tile.width, width, first)
        region = (..., slice(tile.y, tile.y + tile.height), slice(tile.x, tile.x + tile.width))
        merged[region] += part * weight
        total[region] += weight
    return merged / total


def _ramp(start: int, length: int, full: int, like: Tensor) -> Tensor:
    """Weights of one tile along an axis: 1, falling towards a neighbour over TILE_OVERLAP pixels, never 0."""
    position = torch.arange(length, dtype=like.dtype, device=like.device) + 0.5
    weight = torch.ones_like(position)
    if start > 0:
        weight = torch.minimum(weight, position / TILE_OVERLAP)
    if start + length < full:
        weight = torch.minimum(weight, (length - position) / TILE_OVERLAP)
    return weight

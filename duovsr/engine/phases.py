"""Doing a clip at once by a model without state, phase by phase and in the plan's pieces (`1.3b`).

Encoding, transformer and decoding follow each other, so that each has the device's memory nearly to itself. The
autoencoder goes tile by tile and within a tile along the time, where it needs one tile's state: TinyVAE in calls of a
few latents, Wan2.1's by itself within one call. The transformer then sees the latents of the whole frame.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from duovsr.engine.blend import blend_tiles
from duovsr.engine.memory import lent, place, to_host
from duovsr.engine.plan import TEMPORAL_FACTOR, VAE_TILE_OVERLAP, Plan, Tile, plan_tiles
from duovsr.model.one_step import OneStepModel
from duovsr.model.tiny_vae import SPATIAL_FACTOR
from duovsr.model.wan_vae import ALL_FRAMES, WanVAE


@torch.inference_mode()
def restore_clip(
    model: OneStepModel, lq: Tensor, plan: Plan, *, seed: int, strength: float, origin: tuple[int, int, int]
) -> Tensor:
    """Restore LQ frames (1, 3, 4k + 1, H, W) in [-1, 1], resized to the target; H and W multiples of 16.

    `origin`: see `OneStepModel.restore`. Returns frames like `lq`, not clamped.
    """
    for part in (model.transformer, model.vae):
        if plan.offload:
            to_host(part)
        else:
            place(part, model.device)
    if isinstance(model.vae, WanVAE):
        model.vae.frames_at_once = plan.vae_frames or ALL_FRAMES
    height, width = lq.shape[3:]
    tiles = plan_tiles(width, height, plan.vae_tile, VAE_TILE_OVERLAP)
    if strength == 0:
        with lent(model.vae, model.device):
            return _decode(model, None, lq, tiles, plan)
    with lent(model.vae, model.device):
        z_lq = _encode(model, lq, tiles, plan.vae_latents)
    with lent(model.transformer, model.device):
        z_0, _ = model.generate(z_lq, seed, (origin[0], origin[1] // SPATIAL_FACTOR, origin[2] // SPATIAL_FACTOR))
    with lent(model.vae, model.device):
        frames = _decode(model, z_0, lq, tiles, plan)
        if strength < 1:
            frames = torch.lerp(_decode(model, None, lq, tiles, plan), frames, strength)
    return frames


def _encode(model: OneStepModel, lq: Tensor, tiles: tuple[Tile, ...], latents: int) -> Tensor:
    small = tuple(tile.reduced(SPATIAL_FACTOR) for tile in tiles)
    height, width = (side // SPATIAL_FACTOR for side in lq.shape[3:])
    parts = (_encode_tile(model, _region(lq, tile), latents) for tile in tiles)
    return blend_tiles(parts, small, width, height, VAE_TILE_OVERLAP // SPATIAL_FACTOR)


def _encode_tile(model: OneStepModel, lq: Tensor, latents: int) -> Tensor:
    state, parts = None, []
    for _, frames in _calls(lq.shape[2], latents):
        part, state = model.encode(lq[:, :, frames], state)
        parts.append(part)
    return torch.cat(parts, dim=2)


def _decode(model: OneStepModel, z: Tensor | None, lq: Tensor, tiles: tuple[Tile, ...], plan: Plan) -> Tensor:
    """`z` None: the faithful frames."""
    parts = (
        _decode_tile(model, None if z is None else _region(z, tile.reduced(SPATIAL_FACTOR)), _region(lq, tile), plan)
        for tile in tiles
    )
    return blend_tiles(parts, tiles, lq.shape[4], lq.shape[3], VAE_TILE_OVERLAP)


def _decode_tile(model: OneStepModel, z: Tensor | None, lq: Tensor, plan: Plan) -> Tensor:
    calls = _calls(lq.shape[2], plan.vae_latents)
    if len(calls) == 1:
        return model.decode(z, lq, scale=plan.scale)[0]
    state, result = None, torch.empty_like(lq)
    for steps, frames in calls:
        part, state = model.decode(None if z is None else z[:, :, steps], lq[:, :, frames], state, scale=plan.scale)
        result[:, :, frames] = part
    return result


def _calls(frames: int, latents: int) -> list[tuple[slice, slice]]:
    """Calls of so many latents, 0: all, on a clip of 4k + 1 frames, as (latents, frames): latent 0 has one frame."""
    total = (frames - 1) // TEMPORAL_FACTOR + 1
    edges = [*range(0, total, latents or total), total]
    return [(slice(a, b), slice(max(0, TEMPORAL_FACTOR * a - 3), TEMPORAL_FACTOR * b - 3)) for a, b in pairwise(edges)]


def _region(x: Tensor, tile: Tile) -> Tensor:
    return x[..., tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]

"""Flow matching as the paper writes it (section 3.1): z_t = (1 - t) z_0 + t eps, v = eps - z_0; and the noise.

Shared by inference and training, so that both mean the same by sigma, velocity and noise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

TIMESTEP_SCALE = 1000.0  # the transformer's timestep is 1000 sigma


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """z_t of eq. 1 for latents (B, C, T, H, W) and sigma (B,) in [0, 1]."""
    sigma = sigma.view(-1, 1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * eps


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """v of eq. 2."""
    return eps - x0


def x0_from_velocity(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """z_0 = z_t - t v."""
    return noisy - sigma.view(-1, 1, 1, 1, 1) * velocity


def euler_step(noisy: Tensor, velocity: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    """z_s = z_t - (t - s) v, from sigma (B,) to `following` (B,)."""
    return noisy - (sigma - following).view(-1, 1, 1, 1, 1) * velocity


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move the schedule towards noise: sigma' = s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise(
    seed: int,
    shape: tuple[int, int, int, int],
    *,
    origin: tuple[int, int, int] = (0, 0, 0),
    shared: float = 0.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal latents (1, C, T, H, W) float32 that depend on (seed, channel, t, y, x) alone (DESIGN 1.6).

    `shape` is (C, T, H, W); `origin` is the place of its first element: latent index since the scene's start, y, x.
    `shared` is the part of the variance that is one field for all t: without it, a one-step model draws new detail
    for every latent frame, which is seen as flicker.
    """
    C, T, H, W = shape
    t0, y0, x0 = origin
    axes = [
        torch.arange(C, device=device).view(-1, 1, 1, 1),
        torch.arange(y0, y0 + H, device=device).view(1, 1, -1, 1),
        torch.arange(x0, x0 + W, device=device).view(1, 1, 1, -1),
    ]
    frames = torch.arange(t0, t0 + T, device=device).view(1, -1, 1, 1)
    own = _normal(_hash(seed, *axes, frames + 1))
    if shared == 0.0:
        return own[None]
    common = _common(seed, (C, H, W), (y0, x0), torch.device(device))
    return (shared**0.5 * common + (1 - shared) ** 0.5 * own)[None]


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # the cache outlives the mode
def _common(seed: int, shape: tuple[int, int, int], origin: tuple[int, int], device: torch.device) -> Tensor:
    """The field (C, 1, H, W) of all t: the same for every call on a tile."""
    (C, H, W), (y0, x0) = shape, origin
    channels = torch.arange(C, device=device).view(-1, 1, 1, 1)
    rows = torch.arange(y0, y0 + H, device=device).view(1, 1, -1, 1)
    columns = torch.arange(x0, x0 + W, device=device).view(1, 1, 1, -1)
    return _normal(_hash(seed, channels, rows, columns, torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)))


_Integers = TypeVar("_Integers", int, Tensor)

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0x7FEB352D, 0x31848BAB)  # from C. Wellons' public-domain search for well-mixing 32-bit finalisers


def _mix(x: _Integers) -> _Integers:
    """A bijection of 32-bit integers held in int64. Both multipliers are below 2^31, so that no
    product passes 2^63: exact on every device."""
    x = (x ^ (x >> 16)) * _MULTIPLIERS[0] & _MASK
    x = (x ^ (x >> 15)) * _MULTIPLIERS[1] & _MASK
    return x ^ (x >> 16)


def _hash(seed: int, first: Tensor, *others: Tensor) -> Tensor:
    """32-bit hash of the seed and of broadcastable int64 counters."""
    key = _mix(_mix(seed & _MASK) ^ (seed >> 32 & _MASK))  # of the host's: a GPU would have to wait for numbers
    value = first & _MASK ^ key
    for counter in others:
        value = (_mix(value) + 0x9E3779B9 & _MASK) ^ (counter & _MASK)
    value = _mix(value) + 0x9E3779B9 & _MASK
    return _mix(value)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # the cache outlives the mode
def _quantiles(device: torch.device) -> Tensor:
    """Standard normal quantiles at the 65,536 midpoints: a table, because log and cos differ between devices."""
    midpoints = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    table = torch.special.ndtri(midpoints)
    return (table / table.std(correction=0)).float().to(device)


def _normal(bits: Tensor) -> Tensor:
    return _quantiles(bits.device)[bits >> 16]

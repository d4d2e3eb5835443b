"""The degradation for many clips at once, on any device: the same recipes, the same operators.

Clips of a batch go through their recipes side by side; those that meet at the same operator with the same size are
computed together. JPEG is computed (DCT and libjpeg's tables) instead of encoded. Video codecs cannot run on a GPU:
without `codec_surrogate` their passes are left out, and clips with real ones come from a pool that `degrade` made.
"""

from __future__ import annotations

import math
from collections import deque
from typing import cast

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from duovsr.train.degradation import DegradationConfig, draw_recipe
from duovsr.train.degradation_ops import (
    LUMA,
    Blur,
    Codec,
    Jpeg,
    Noise,
    Operator,
    Quantise,
    Resize,
    Unsharp,
    add_noise,
    blur,
    kernel_weights,
    quantise,
    resize,
    unsharp,
)

# JPEG, annex K, tables K.1 and K.2.
_LUMA_TABLE = """
    16 11 10 16 24 40 51 61   12 12 14 19 26 58 60 55   14 13 16 24 40 57 69 56   14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77   24 35 55 64 81 104 113 92   49 64 78 87 103 121 120 101   72 92 95 98 112 100 103 99
"""
_CHROMA_TABLE = """
    17 18 24 47 99 99 99 99   18 21 26 66 99 99 99 99   24 26 56 99 99 99 99 99   47 66 99 99 99 99 99 99
    99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99   99 99 99 99 99 99 99 99
"""


def degrade_batch(
    frames: Tensor, height: int, width: int, config: DegradationConfig, generators: list[Generator]
) -> Tensor:
    """HQ (B, T, 3, H, W) in [0, 1] on any device -> LQ (B, T, 3, height, width), quantised to 8 bits.

    `generators`: one a clip, on the CPU; clip i gets the recipe that `degrade` would draw from generator i.
    """
    B, T, C, H, W = frames.shape
    assert len(generators) == B
    clips = list(frames)
    recipes = [draw_recipe(config, T, H, W, height, width, generator) for generator in generators]
    left_out = () if config.codec_surrogate else (Codec,)
    waiting = [deque(operator for operator in recipe if not isinstance(operator, left_out)) for recipe in recipes]
    while any(waiting):
        # The clip with most to do leads, so that the others wait for company at the operators they share.
        leader = max(range(B), key=lambda i: len(waiting[i]))
        wanted = _meeting(waiting[leader][0], clips[leader])
        group = [i for i in range(B) if waiting[i] and _meeting(waiting[i][0], clips[i]) == wanted]
        results = apply_batched([waiting[i].popleft() for i in group], torch.stack([clips[i] for i in group]))
        for i, result in zip(group, results, strict=True):
            clips[i] = result
    return torch.stack(clips)


def _meeting(operator: Operator, clip: Tensor) -> tuple[object, ...]:
    """Equal for operators on clips that can be computed together."""
    return type(operator), clip.shape, operator if isinstance(operator, Resize) else None


def apply_batched(operators: list[Operator], frames: Tensor) -> Tensor:
    """Operators of one type, one a clip, on (B, T, 3, H, W); resizes must be equal."""
    B, T = frames.shape[:2]
    flat = frames.flatten(0, 1)
    match operators[0]:
        case Unsharp():
            flat = unsharp(flat)
        case Blur():
            flat = blur(flat, _kernels(cast(list[Blur], operators)).to(flat))
        case Resize(height, width, mode, antialias):
            flat = resize(flat, height, width, mode, antialias)
        case Noise():
            noises = cast(list[Noise], operators)
            flat = torch.cat([add_noise(clip, noise) for clip, noise in zip(frames, noises, strict=True)])
        case Jpeg():
            qualities = [quality for jpeg in cast(list[Jpeg], operators) for quality in jpeg.qualities]
            flat = jpeg_by_dct(flat, torch.tensor(qualities, device=flat.device))
        case Codec():
            steps = [_quantiser_step(codec) for codec in cast(list[Codec], operators)]
            flat = codec_surrogate(frames, torch.tensor(steps).to(frames)).flatten(0, 1)
        case Quantise():
            flat = quantise(flat)
    return flat.unflatten(0, (B, T))


def _kernels(blurs: list[Blur]) -> Tensor:
    """(N, k, k), one a frame, padded with zeros to the largest."""
    kernels = [kernel for each in blurs for kernel in each.kernels]
    largest = max(kernel.size for kernel in kernels)
    pads = [(largest - kernel.size) // 2 for kernel in kernels]
    return torch.stack([F.pad(kernel_weights(kernel), (pad,) * 4) for kernel, pad in zip(kernels, pads, strict=True)])


def jpeg_by_dct(frames: Tensor, qualities: Tensor) -> Tensor:
    """What libjpeg does to frames (N, 3, H, W) at their qualities (N,): 4:2:0, 8-bit at every step of its own."""
    luma, chroma = _to_420(frames)
    luma = 128 + _requantise(luma - 128, _scaled_table(_LUMA_TABLE, qualities))
    chroma = 128 + _requantise(chroma - 128, _scaled_table(_CHROMA_TABLE, qualities))
    return _from_420(_to_8_bit(luma), _to_8_bit(chroma))


def codec_surrogate(frames: Tensor, steps: Tensor) -> Tensor:
    """Not a codec: a stand-in for a video codec's pass over clips (B, T, 3, H, W), with quantiser steps (B,) of 255.

    Every frame is coded as its difference from the decoded frame before, without motion, by 8x8 DCT and one quantiser
    for all coefficients; no deblocking, no rate control.
    """
    table = steps[:, None, None, None, None, None]
    luma = chroma = torch.tensor(128.0).to(frames)
    decoded = []
    for frame in frames.unbind(1):
        new_luma, new_chroma = _to_420(frame)
        luma = _to_8_bit(luma + _requantise(new_luma - luma, table))
        chroma = _to_8_bit(chroma + _requantise(new_chroma - chroma, table))
        decoded.append(_from_420(luma, chroma))
    return torch.stack(decoded, dim=1)


def _quantiser_step(codec: Codec) -> float:
    """Of an orthonormal transform of 0..255: H.264 has 0.625 at QP 0 and doubles every 6, MPEG-4 has 2 a unit."""
    return 2.0 * codec.value if codec.control == "qscale" else 0.625 * 2 ** (codec.value / 6)


def _to_8_bit(values: Tensor) -> Tensor:
    return values.clamp(0, 255).round()


def _to_420(frames: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) in [0, 1] -> Y (N, 1, H, W) and Cb, Cr (N, 2, H / 2, w), 0..255 in whole numbers.

    H / 2 is rounded up; w is up to whole blocks, because libjpeg repeats the last column before it halves, not after.
    """
    pixels = quantise(frames) * 255
    red, green, blue = pixels.split(1, dim=1)
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    cb = (blue - luma) / (2 * (1 - LUMA[2])) + 128
    cr = (red - luma) / (2 * (1 - LUMA[0])) + 128
    chroma = _padded(_to_8_bit(torch.cat([cb, cr], dim=1)), 2, 16)
    bias = 1 + torch.arange(chroma.shape[3] // 2, device=chroma.device) % 2  # libjpeg's rounding of quarters
    return _to_8_bit(luma), F.avg_pool2d(chroma, 2).add(bias / 4).floor()


def _from_420(luma: Tensor, chroma: Tensor) -> Tensor:
    """The inverse of `_to_420`, with libjpeg's triangle filter for the chroma."""
    H, W = luma.shape[2:]
    chroma = F.interpolate(chroma[..., : (W + 1) // 2], scale_factor=2, mode="bilinear", align_corners=False)
    cb, cr = (chroma.round() - 128)[..., :H, :W].split(1, dim=1)
    red = luma + 2 * (1 - LUMA[0]) * cr
    blue = luma + 2 * (1 - LUMA[2]) * cb
    green = (luma - LUMA[0] * red - LUMA[2] * blue) / LUMA[1]
    return _to_8_bit(torch.cat([red, green, blue], dim=1)) / 255


def _padded(planes: Tensor, rows: int, columns: int) -> Tensor:
    """The last row and column repeated up to multiples."""
    H, W = planes.shape[2:]
    return F.pad(planes, (0, -W % columns, 0, -H % rows), mode="replicate")


def _requantise(planes: Tensor, table: Tensor) -> Tensor:
    """Round the 8x8 DCT of planes (N, C, H, W) to multiples of the table, broadcast to (N, C, rows, columns, 8, 8)."""
    H, W = planes.shape[2:]
    padded = _padded(planes, 8, 8)
    N, C, height, width = padded.shape
    blocks = padded.view(N, C, height // 8, 8, width // 8, 8).transpose(3, 4)  # (N, C, rows, columns, 8, 8)
    dct = _dct_matrix().to(planes)
    levels = (dct @ blocks @ dct.T / table).round()
    blocks = dct.T @ (levels * table) @ dct
    return blocks.transpose(3, 4).reshape(N, C, height, width)[..., :H, :W]


def _dct_matrix() -> Tensor:
    """The orthonormal DCT-II of 8 points, (8, 8): row k holds frequency k."""
    k, x = torch.arange(8.0)[:, None], torch.arange(8.0)
    rows = torch.cos(math.pi * k * (2 * x + 1) / 16) / 2
    rows[0] /= math.sqrt(2)
    return rows


def _scaled_table(table: str, qualities: Tensor) -> Tensor:
    """libjpeg's table at each quality (N,), 1 to 100: (N, 1, 1, 1, 8, 8)."""
    base = torch.tensor([int(entry) for entry in table.split()], device=qualities.device).view(8, 8)
    percent = torch.where(qualities < 50, 5000 // qualities, 200 - 2 * qualities)[:, None, None]
    return ((base * percent + 50) // 100).clamp(1, 255).float()[:, None, None, None]

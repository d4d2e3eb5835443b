"""Colour transfer from the LQ frames: the result keeps their low band (wavelet) or their statistics (AdaIN).

Works on whole frames after tiles are merged. Frames are (1, 3, T, H, W) in [-1, 1]; `lq` has the size of `hq`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.options import ColorTransfer

_REDUCTION = 8


def transfer_color(hq: Tensor, lq: Tensor, method: ColorTransfer) -> Tensor:
    if method == "wavelet":
        # The low band of wavelet colour fixes: five dilated binomial filters (1, 2, 1) / 4 with steps 1 to 16. Its
        # content lies far below 1/8 of the sampling rate: an 8 x 8 mean replaces the levels with steps below 8, and the
        # other two run on the reduced picture. It is linear: what the two pictures differ by is filtered once.
        return hq + _enlarged(_smooth(_reduced(lq) - _reduced(hq)), hq)
    if method == "adain":
        hq_mean, hq_std = hq.mean((3, 4), keepdim=True), hq.std((3, 4), keepdim=True)
        lq_mean, lq_std = lq.mean((3, 4), keepdim=True), lq.std((3, 4), keepdim=True)
        return (hq - hq_mean) / hq_std.clamp_min(1e-4) * lq_std + lq_mean
    return hq


def _reduced(frames: Tensor) -> Tensor:
    """Means of 8 x 8 pixels, (T, 3, H / 8, W / 8), where they reach over the border of its last pixels."""
    H, W = frames.shape[3:]
    if H % _REDUCTION or W % _REDUCTION:
        frames = F.pad(frames, (0, -W % _REDUCTION, 0, -H % _REDUCTION, 0, 0), mode="replicate")
    rows = frames[0].permute(1, 2, 3, 0).unflatten(1, (-1, _REDUCTION)).mean(2)  # whole rows of memory at once
    return rows.unflatten(2, (-1, _REDUCTION)).mean(3).permute(0, 3, 1, 2)


def _smooth(small: Tensor) -> Tensor:
    # (1, 2, 1) / 4, made on the device: a copy would be waited for.
    kernel = (2 - torch.arange(-1, 2, dtype=small.dtype, device=small.device).abs()) / 4
    for step in (1, 2):
        small = _binomial(small, kernel, step)
    return small


def _enlarged(small: Tensor, like: Tensor) -> Tensor:
    """Linear interpolation of what `_reduced` gave, to the size and the shape of `like`."""
    pixels = _interpolated(_interpolated(small.permute(0, 2, 3, 1).contiguous(), 2), 1)
    return pixels.permute(3, 0, 1, 2)[None, :, :, : like.shape[3], : like.shape[4]]


def _interpolated(x: Tensor, dim: int) -> Tensor:
    n = x.shape[dim]
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, n - 1, 1)
    before, after = torch.cat([first, x], dim).unsqueeze(dim + 1), torch.cat([x, last], dim).unsqueeze(dim + 1)
    share = (torch.arange(_REDUCTION, dtype=x.dtype, device=x.device) + 0.5) / _REDUCTION
    between = torch.lerp(before, after, share.view(-1, *[1] * (x.dim() - 1 - dim)))
    return between.flatten(dim, dim + 1).narrow(dim, _REDUCTION // 2, _REDUCTION * n)


def _binomial(x: Tensor, kernel: Tensor, step: int) -> Tensor:
    rows, columns = kernel.view(1, 1, 3, 1).expand(3, 1, 3, 1), kernel.view(1, 1, 1, 3).expand(3, 1, 1, 3)
    x = F.conv2d(F.pad(x, (0, 0, step, step), mode="replicate"), rows, dilation=(step, 1), groups=3)
    return F.conv2d(F.pad(x, (step, step, 0, 0), mode="replicate"), columns, dilation=(1, step), groups=3)

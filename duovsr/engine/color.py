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
        return hq + low_band(lq - hq)
    if method == "adain":
        hq_mean, hq_std = hq.mean((3, 4), keepdim=True), hq.std((3, 4), keepdim=True)
        lq_mean, lq_std = lq.mean((3, 4), keepdim=True), lq.std((3, 4), keepdim=True)
        return (hq - hq_mean) / hq_std.clamp_min(1e-4) * lq_std + lq_mean
    return hq


def low_band(frames: Tensor) -> Tensor:
    """The low band of five dilated binomial filters (1, 2, 1) / 4 with steps 1 to 16, as wavelet colour fixes use it.

    The band is linear, so the difference of two pictures is filtered once instead of each of them. Its content lies
    far below 1/8 of the sampling rate: the levels with steps below 8 are replaced by an 8 x 8 mean, and the remaining
    two run on the reduced picture.
    """
    H, W = frames.shape[3:]
    flat = frames.transpose(1, 2).flatten(0, 1)
    small = F.interpolate(flat, (max(1, round(H / _REDUCTION)), max(1, round(W / _REDUCTION))), mode="area")
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=flat.dtype, device=flat.device)
    for step in (1, 2):
        small = _binomial(small, kernel, step)
    wide = F.interpolate(small, (H, W), mode="bilinear", align_corners=False)
    return wide.unflatten(0, (frames.shape[0], -1)).transpose(1, 2)


def _binomial(x: Tensor, kernel: Tensor, step: int) -> Tensor:
    rows, columns = kernel.view(1, 1, 3, 1).expand(3, 1, 3, 1), kernel.view(1, 1, 1, 3).expand(3, 1, 1, 3)
    x = F.conv2d(F.pad(x, (0, 0, step, step), mode="replicate"), rows, dilation=(step, 1), groups=3)
    return F.conv2d(F.pad(x, (step, step, 0, 0), mode="replicate"), columns, dilation=(1, step), groups=3)

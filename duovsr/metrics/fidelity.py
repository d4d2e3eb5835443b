"""PSNR and SSIM of 8-bit RGB frames against the truth.

Luma is BT.601 in 16..235, unrounded. SSIM is Wang et al. (IEEE TIP 13(4), 2004): an 11x11 Gaussian window with sigma
1.5, K = (0.01, 0.03), wherever the window fits wholly inside the frame. No border is cropped otherwise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from duovsr.metrics.meter import Pixels, Unmeasurable

PEAK = 255.0
PSNR_CAP = 100.0  # equal frames would be infinite: one would hide all others in a mean, and JSON has no infinity

_BT601 = (65.481 / 255, 128.553 / 255, 24.966 / 255)
_SSIM_SIDE = 11
_SSIM_SIGMA = 1.5
_SSIM_C1 = (0.01 * PEAK) ** 2
_SSIM_C2 = (0.03 * PEAK) ** 2


def luma(pixels: Pixels) -> Tensor:
    """BT.601 luma of `pixels` (H, W, 3), RGB 0..255, as float64 (H, W) in 16..235, unrounded."""
    return torch.from_numpy(pixels).double() @ torch.tensor(_BT601, dtype=torch.float64) + 16


def psnr(output: Tensor, truth: Tensor) -> float:
    """PSNR in dB of two equally shaped tensors in 0..255, at most `PSNR_CAP`."""
    error = (output.double() - truth.double()).square().mean().item()
    return PSNR_CAP if error == 0 else min(PSNR_CAP, 10 * math.log10(PEAK**2 / error))


def psnr_y(output: Pixels, truth: Pixels) -> float:
    """PSNR in dB of the luma of two frames (H, W, 3), RGB 0..255."""
    return psnr(luma(output), luma(truth))


def psnr_rgb(output: Pixels, truth: Pixels) -> float:
    """PSNR in dB over all three channels of two frames (H, W, 3), RGB 0..255."""
    return psnr(torch.from_numpy(output), torch.from_numpy(truth))


def ssim_y(output: Pixels, truth: Pixels) -> float:
    """SSIM, at most 1, of the luma of two frames (H, W, 3), RGB 0..255. Raises `Unmeasurable` below 11x11."""
    if min(output.shape[:2]) < _SSIM_SIDE:
        raise Unmeasurable(f"SSIM needs at least {_SSIM_SIDE}x{_SSIM_SIDE} pixels")
    x, y = luma(output), luma(truth)
    offsets = torch.arange(_SSIM_SIDE, dtype=torch.float64) - _SSIM_SIDE // 2
    taps = torch.exp(-offsets.square() / (2 * _SSIM_SIGMA**2))
    taps = taps / taps.sum()
    # float64: the variances are small differences of large squares
    moments = torch.stack((x, y, x * x, y * y, x * y)).unsqueeze(1)  # (5, 1, H, W)
    moments = F.conv2d(F.conv2d(moments, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    mean_x, mean_y, square_x, square_y, product = moments.squeeze(1)
    variances = square_x - mean_x.square() + square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    structure = (2 * covariance + _SSIM_C2) / (variances + _SSIM_C2)
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x.square() + mean_y.square() + _SSIM_C1)
    return (luminance * structure).mean().item()

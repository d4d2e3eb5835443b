"""Pixel losses and the patch discriminator. Frames are (B, 3, T, H, W) in [-1, 1]."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from duovsr.metrics.warping import warp
from duovsr.train.motion import Motion

_LUMA = (0.299, 0.587, 0.114)  # BT.601


def luma_and_color(frames: Tensor) -> Tensor:
    """RGB frames (B, 3, T, H, W) as luma and two colour differences (BT.601), times 3: means of absolute errors then
    are the sums of the three.

    Where a pixel's luma is off by more than its colour, all of its RGB errors have one sign, and an L1 of RGB has no
    gradient that would change the colour.
    """
    weights = frames.new_tensor([_LUMA, [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])
    return torch.einsum("ij,bjthw->bithw", 3 * weights, frames)


def charbonnier(output: Tensor, target: Tensor) -> Tensor:
    """A smooth L1: it does not blur as a squared error does, and its gradient does not jump at zero."""
    return torch.sqrt((output - target).square() + 1e-6).mean()


def psnr_loss(output: Tensor, target: Tensor) -> Tensor:
    """Minus the PSNR of the luma in dB, the mean over frames; beyond 50 dB little is left to gain.

    A decibel counts as much in a clean clip as in a damaged one, and an error that is everywhere and small, to which
    SSIM is blind and an L1 nearly so, counts as its square: where those and `detail_loss` were all, coarse contrast
    came out stronger than the truth's.
    """
    errors = (_luma(output) - _luma(target)).square().mean((1, 2)) / 4
    return 10 * torch.log10(errors + 1e-5).mean()


def gradient_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 between the spatial differences at full and half resolution: edges count beyond their area."""
    loss = output.new_zeros(())
    error = (output - target).transpose(1, 2).flatten(0, 1)  # differences are linear: take them of the error
    for _ in range(2):
        loss = loss + (error[..., 1:] - error[..., :-1]).abs().mean()
        loss = loss + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        error = F.avg_pool2d(error, 2)
    return loss / 2


def temporal_loss(output: Tensor, target: Tensor, motion: Motion) -> Tensor:
    """Flicker that the truth does not have: the root mean square, over each sample, of the change of the error from
    frame to frame along the truth's motion, where the next frame still shows the same. Of one frame 0.

    Along the motion, since an error that moves with its object is no flicker: at a fixed place it counts whenever
    something passes, and all that helps there is blur. Squares, since what is seen to flicker is few strong edges.
    """
    error = (output - target).transpose(1, 2)
    B, T = error.shape[:2]
    if T == 1:
        return error.new_zeros(())
    following = warp(error[:, 1:].flatten(0, 1), motion.flow.flatten(0, 1)).unflatten(0, (B, T - 1))
    change = (error[:, :-1] - following) * motion.visible
    return (change.square().mean((1, 2, 3, 4)) + 1e-12).sqrt().mean()


def ssim_loss(output: Tensor, target: Tensor, scales: int = 1) -> Tensor:
    """1 - SSIM of the luma (Wang et al., IEEE TIP 13(4), 2004: Gaussian window 11x11, sigma 1.5, no border), the mean
    over the frames at full size, half, and so on.

    What a pixel loss calls equal, a softer texture and a sharper one of the wrong place, it tells apart: mixed with
    L1 it restores better by either measure (Zhao et al., "Loss functions for image restoration", 2017). Smaller scales
    ask for the contrast of coarser texture, which the window at full size hardly sees.
    """
    x, y = _luma(output) + 1, _luma(target) + 1  # black is 0
    loss = 1 - _mean_ssim(x, y)
    for _ in range(scales - 1):
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        loss = loss + 1 - _mean_ssim(x, y)
    return loss / scales


def _mean_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Of images (N, H, W) in [0, 2]."""
    moments = torch.cat([x, y, x * x, y * y, x * y])
    over_rows, over_columns = (_gaussian_window(moments, axis) for axis in (-2, -1))
    mean_x, mean_y, square_x, square_y, product = (over_rows @ moments @ over_columns.T).chunk(5)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of a range of 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    spread = square_x - mean_x.square() + square_y - mean_y.square()
    structure = (2 * (product - mean_x * mean_y) + c2) / (spread + c2)
    return (luminance * structure).mean()


def _gaussian_window(images: Tensor, axis: int) -> Tensor:
    """The window's average along an axis of n pixels as a matrix (n - 10, n): CPUs have no fast convolution of one
    channel, least of all backwards, and crops are small."""
    offsets = torch.arange(-5, 6, device=images.device, dtype=images.dtype)
    taps = torch.softmax(-offsets.square() / (2 * 1.5**2), 0)
    places = torch.eye(images.shape[axis], device=images.device, dtype=images.dtype)
    return taps @ places.unfold(0, len(taps), 1).transpose(1, 2)


def detail_loss(output: Tensor, target: Tensor) -> Tensor:
    """The part of the truth's detail that is missing: 1 - the size of those Haar coefficients of the luma that have the
    truth's sign, cut where they exceed it, over the size of the truth's; the mean over frames, and three directions at
    four scales. Size is the cube root of the mean cube: edges before texture. H, W: multiples of 16.

    What is uncertain comes out of a pixel loss too weak, since a wrong sign costs as much as a right one earns. Here
    it costs nothing. (After Li et al., "Image quality assessment by separately evaluating detail losses and additive
    impairments", IEEE Trans. Multimedia 13(5), 2011. VMAF has it too: it says less of what was trained with this.)
    """
    x, y = _luma(output), _luma(target)
    parts = []
    for _ in range(4):
        x, *details = _haar(x)
        y, *true_details = _haar(y)
        for detail, truth in zip(details, true_details, strict=True):
            kept = torch.minimum(detail * truth.sign(), truth.abs()).clamp_min(0)
            parts.append(1 - _size(kept) / _size(truth.abs()))
    return torch.stack(parts).mean()


def _size(details: Tensor) -> Tensor:
    """Of details (N, H, W), none below zero: (N,), at least a level at which the eye hardly sees them."""
    return (details.pow(3).mean((1, 2)) + 0.05**3).pow(1 / 3)


def _haar(x: Tensor) -> tuple[Tensor, ...]:
    """Images (N, H, W) -> means and vertical, horizontal and diagonal differences (N, H / 2, W / 2), all times 2."""
    a, b, c, d = x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]
    return tuple(total / 2 for total in (a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d))


def _luma(frames: Tensor) -> Tensor:
    """Frames (B, 3, T, H, W) -> (B T, H, W)."""
    weights = frames.new_tensor(_LUMA).view(3, 1, 1, 1)
    return (frames * weights).sum(1).flatten(0, 1)


class PatchDiscriminator(nn.Module):
    """Convolutional critic of frames beside their upsampled LQ and the change since the frame before, which tells
    flicker from motion; spectral norm keeps it from running away."""

    def __init__(self) -> None:
        super().__init__()
        widths = [9 * 4, 48, 96, 192]
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        for i, (before, after) in enumerate(pairwise(widths)):
            stride = 1 if i == 0 else 2
            layers += [spectral_norm(nn.Conv2d(before, after, 3, stride, 1)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(nn.Conv2d(widths[-1], widths[-1], 3, 1, 1)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(nn.Conv2d(widths[-1], 1, 3, 1, 1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, frames: Tensor, lq: Tensor) -> Tensor:
        """Frames and LQ (B, 3, T, H, W) -> logits (B T, 1, H / 8, W / 8)."""
        change = torch.diff(frames, dim=2, prepend=frames[:, :, :1])
        seen = torch.cat([frames, lq, change], dim=1).transpose(1, 2).flatten(0, 1)
        logits: Tensor = self.layers(seen.contiguous(memory_format=torch.channels_last))
        return logits.float()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """L_D of eq. 8."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """L_G of eq. 8."""
    return -fake.mean()


@torch.no_grad()
def psnr(output: Tensor, target: Tensor) -> Tensor:
    """dB, of frames in [-1, 1] clamped to their range: the mean over samples, which does not depend on how a batch is
    divided. A sample has 100 at the most, for one without an error would drown the others."""
    errors = (output.clamp(-1, 1) - target).square().mean((1, 2, 3, 4)) / 4
    return -10 * torch.log10(errors.clamp_min(1e-10)).mean()

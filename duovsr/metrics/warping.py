"""Warping error: how much a clip changes from frame to frame beyond its motion (after Lai et al., ECCV 2018).

The flow is that of a reference, never of the judged clip, whose blur or freezing it would reward. Lower is steadier,
but below the truth's own value it is blur.
"""

from __future__ import annotations

from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from duovsr.metrics.meter import Pixels, Unmeasurable, resized

E_WARP_SCALE = 1e3
MIN_SIDE = 16  # OpenCV refuses frames that its coarsest patches do not fit in


class DisFlow:
    """OpenCV's Dense Inverse Search (Kroeger et al., ECCV 2016), preset medium, on grey levels.

    Raises `Unmeasurable` without OpenCV, and for frames below 16x16.
    """

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as error:
            raise Unmeasurable("OpenCV is not installed", hint="pip install 'duovsr[eval]'") from error
        self._grey = lambda pixels: cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def __call__(self, this: Pixels, following: Pixels) -> Tensor:
        """Flow in pixels, float32 (2, H, W), x first: what is at p in `this` is at p + flow(p) in `following`."""
        if min(this.shape[:2]) < MIN_SIDE:
            raise Unmeasurable(f"DIS optical flow needs at least {MIN_SIDE}x{MIN_SIDE} pixels")
        start: NDArray[np.float32] = np.zeros((*this.shape[:2], 2), np.float32)
        flow = self._dis.calc(self._grey(this), self._grey(following), start)
        return torch.from_numpy(flow).permute(2, 0, 1)


class WarpingMeter:
    """E_warp x 1000 of a clip: mean over its pairs of neighbouring frames, the flow taken from the reference.

    A reference of another size (the LQ clip) is first resized to the output's.
    """

    def __init__(self, flow: DisFlow) -> None:
        self._flow = flow
        self._previous: tuple[Pixels, Pixels] | None = None
        self._errors: list[float] = []

    def update(self, output: Pixels, reference: Pixels) -> None:
        reference = resized(reference, output.shape[:2])
        if self._previous is not None:
            before, reference_before = self._previous
            forward = self._flow(reference_before, reference)
            backward = self._flow(reference, reference_before)
            error = warping_error(before, output, forward, backward)
            if error is not None:
                self._errors.append(error)
        self._previous = output, reference

    def mean(self) -> float:
        if not self._errors:
            raise Unmeasurable("E_warp needs two neighbouring frames that show the same things")
        return E_WARP_SCALE * fmean(self._errors)


def warping_error(this: Pixels, following: Pixels, forward: Tensor, backward: Tensor) -> float | None:
    """Mean squared RGB difference, RGB in [0, 1], of `this` to `following` warped to it, where both show the same.

    `this`, `following`: (H, W, 3), 0..255; `forward`, `backward`: flow between them, (2, H, W). None if nothing is
    visible in both.
    """
    mask = visible_in_both(forward, backward)
    if not mask.any():
        return None
    a, b = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 for pixels in (this, following))
    return (a - warp(b[None], forward[None])[0]).square()[:, mask].double().mean().item()


def visible_in_both(forward: Tensor, backward: Tensor) -> Tensor:
    """Mask (H, W) of the pixels whose match lies inside the next frame and whose flow there leads back.

    Occluded is |f + b|^2 > 0.01 (|f|^2 + |b|^2) + 0.5, b the backward flow at the match (Sundaram et al., ECCV 2010).
    """
    _, height, width = forward.shape
    x, y = _matches(forward)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    back = warp(backward[None], forward[None])[0]
    mismatch = (forward + back).square().sum(0)
    return inside & (mismatch <= 0.01 * (forward.square().sum(0) + back.square().sum(0)) + 0.5)


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """`images` (N, C, H, W) sampled bilinearly at p + flow(p), flow (N, 2, H, W); float32, borders replicated."""
    height, width = images.shape[2:]
    x, y = _matches(flow)
    # grid_sample wants pixel centres at (2 i + 1) / n - 1
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _matches(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next frame has what is at each pixel: x and y, each (..., H, W) of flow (..., 2, H, W)."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device)
    y = torch.arange(height, device=flow.device).unsqueeze(1)
    return flow[..., 0, :, :] + x, flow[..., 1, :, :] + y

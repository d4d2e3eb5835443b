"""How the truth moves, along which flicker is told from motion (`losses.temporal_loss`)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from duovsr.errors import UsageError
from duovsr.metrics.meter import Pixels, Unmeasurable
from duovsr.metrics.warping import DisFlow, visible_in_both


class Motion(NamedTuple):
    """From each frame to the next."""

    flow: Tensor  # (B, T - 1, 2, H, W), pixels
    visible: Tensor  # (B, T - 1, 1, H, W), bool: where both show the same


class MotionEstimator:
    """Dense optical flow of training windows on the CPU, the one that E_warp is measured with.

    Raises UsageError without OpenCV.
    """

    def __init__(self) -> None:
        try:
            DisFlow()
        except Unmeasurable as error:
            hint = "pip install 'duovsr[train]', or leave the loss out with `--set temporal_weight=0`"
            raise UsageError(f"the temporal loss needs optical flow: {error}", hint=hint) from error
        import cv2

        cv2.setNumThreads(1)  # pairs of frames run side by side instead
        self._threads = ThreadPoolExecutor(torch.get_num_threads())

    @classmethod
    def maybe(cls, weight: float) -> MotionEstimator | None:
        """For a temporal loss of this weight."""
        return cls() if weight > 0 else None

    def __call__(self, frames: Tensor) -> Motion:
        """Of frames (B, 3, T, H, W) in [-1, 1], of at least 16x16 pixels."""
        B, _, T, H, W = frames.shape
        if T == 1:
            return Motion(frames.new_zeros(B, 0, 2, H, W), frames.new_zeros(B, 0, 1, H, W).bool())
        pixels = ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
        these, following = (part.reshape(-1, H, W, 3) for part in (pixels[:, :-1], pixels[:, 1:]))
        found = self._threads.map(_between, these, following)
        flow, visible = (torch.stack(parts).unflatten(0, (B, T - 1)) for parts in zip(*found, strict=True))
        return Motion(flow.to(frames.device), visible.unsqueeze(2).to(frames.device))


def _between(this: Pixels, following: Pixels) -> tuple[Tensor, Tensor]:
    flow = DisFlow()  # one for each call: it keeps buffers
    forward, backward = flow(this, following), flow(following, this)
    return forward, visible_in_both(forward, backward)

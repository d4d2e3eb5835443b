"""What a metric is to `evaluate`: something fed frame by frame that has a mean at the end."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from duovsr.errors import InputError

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB 0..255


class Unmeasurable(InputError):
    """A metric has no value here: a package or parameter file is missing, or the clip is too small or too short."""


class Meter(Protocol):
    """One metric over one clip. Holds what it needs of the past frames, never the clip."""

    def update(self, output: Pixels, reference: Pixels) -> None:
        """Take the next frame of both clips. Raises `Unmeasurable`."""

    def mean(self) -> float:
        """The mean over the frames measured so far. Raises `Unmeasurable` where there are none."""


class FrameMeter:
    """Mean of a per-frame `score(output, reference)` over every `every`-th frame, the first included.

    A score of None leaves the frame out.
    """

    def __init__(self, score: Callable[[Pixels, Pixels], float | None], every: int = 1) -> None:
        self._score = score
        self._every = every
        self._seen = 0
        self._scores: list[float] = []

    def update(self, output: Pixels, reference: Pixels) -> None:
        if self._seen % self._every == 0:
            score = self._score(output, reference)
            if score is not None:
                self._scores.append(score)
        self._seen += 1

    def mean(self) -> float:
        if not self._scores:
            raise Unmeasurable("no frame could be measured")
        return fmean(self._scores)


def resized(pixels: Pixels, size: tuple[int, ...]) -> Pixels:
    """`pixels` (H, W, 3) at `size` (height, width) by antialiased bicubic (a = -0.5), rounded; itself where it fits."""
    if pixels.shape[:2] == size:
        return pixels
    planes = torch.from_numpy(pixels).permute(2, 0, 1).float()
    planes = F.interpolate(planes[None], size=list(size), mode="bicubic", antialias=True)[0]
    return planes.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()

"""VMAF v0.6.1 (Netflix) through the package `vmaf-torch`, scores clipped to 0..100. Higher is better."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duovsr.metrics.fidelity import luma
from duovsr.metrics.meter import Pixels, Unmeasurable

EVERY = 6  # a frame of 960x540 takes about a second on two CPU cores
MIN_SIDE = 32  # the package pads its coarsest scales by reflection, which a smaller frame cannot give


def load_model() -> Any:
    """The package's model, which one process may share between clips. Raises `Unmeasurable` without the package."""
    try:
        from vmaf_torch import VMAF
    except ImportError as error:  # also for psutil, which it needs and does not declare
        raise Unmeasurable(f"vmaf-torch cannot be used: {error}", hint="pip install 'duovsr[eval]'") from error
    return VMAF(clip_score=True).eval()


class VmafMeter:
    """VMAF of every `every`-th frame, its motion feature between those frames, as if they were the clip.

    The package takes a whole clip at once; this keeps six numbers for each past frame, and one luma plane.
    """

    def __init__(self, model: Any, every: int = EVERY) -> None:
        self._model = model
        self._every = every
        self._seen = 0
        self._truth_before: Tensor | None = None
        self._adm: list[Tensor] = []
        self._vif: list[Tensor] = []
        self._motion: list[Tensor] = []

    def update(self, output: Pixels, reference: Pixels) -> None:
        """As `Meter.update`. Raises `Unmeasurable` for frames below 32x32."""
        if self._seen % self._every == 0:
            self._measure(output, reference)
        self._seen += 1

    @torch.no_grad()
    def _measure(self, output: Pixels, reference: Pixels) -> None:
        if min(output.shape[:2]) < MIN_SIDE:
            raise Unmeasurable(f"VMAF needs at least {MIN_SIDE}x{MIN_SIDE} pixels")
        judged, truth = (luma(pixels).float()[None, None] for pixels in (output, reference))
        self._adm.append(self._model.compute_adm_score(truth, judged))
        self._vif.append(self._model.compute_vif_features(truth, judged))
        pair = torch.cat((truth if self._truth_before is None else self._truth_before, truth))
        self._motion.append(self._model.compute_motion(pair)[1:])
        self._truth_before = truth

    @torch.no_grad()
    def mean(self) -> float:
        motion = torch.cat(self._motion)
        # VMAF's motion2: the lesser of the motion before a frame and after it
        following = torch.cat((motion[1:], motion[-1:]))
        scores = self._model.predict(torch.cat(self._adm), torch.minimum(motion, following), torch.cat(self._vif))
        return scores.double().mean().item()

"""VMAF: that our streaming feeds the package what it expects, and that its scores order as they must."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from duovsr.metrics.fidelity import luma
from duovsr.metrics.meter import Unmeasurable
from duovsr.metrics.vmaf import VmafMeter, load_model

FRAMES = 4


def clip() -> list[np.ndarray]:
    """A textured pattern that moves a little."""
    y, x = np.mgrid[:72, :96]
    waves = [127 + 60 * np.sin((x + 2 * t) / 4) + 60 * np.sin((y - t) * x / 300) for t in range(FRAMES)]
    return [np.repeat(np.rint(wave)[..., None], 3, axis=2).astype(np.uint8) for wave in waves]


def noisy(frames: list[np.ndarray], sigma: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.rint(f + rng.normal(0, sigma, f.shape)).clip(0, 255).astype(np.uint8) for f in frames]


def vmaf(output: list[np.ndarray], truth: list[np.ndarray], every: int = 1) -> float:
    pytest.importorskip("vmaf_torch", reason="VMAF needs the extra [eval]")
    meter = VmafMeter(load_model(), every)
    for judged, expected in zip(output, truth, strict=True):
        meter.update(judged, expected)
    return meter.mean()


def test_equal_clips_score_97_and_noise_less() -> None:
    truth = clip()[:2]
    assert 100 >= vmaf(truth, truth) >= 97 > vmaf(noisy(truth, 32), truth)


@pytest.mark.slow
def test_more_noise_scores_less() -> None:
    truth = clip()
    scores = [vmaf(noisy(truth, sigma), truth) for sigma in (2, 4, 8, 16, 32)]
    assert all(more > less for more, less in pairwise(scores))


def test_streamed_is_the_package_on_the_whole_clip() -> None:
    truth = clip()
    output = noisy(truth, 16)
    streamed = vmaf(output, truth)
    truths, outputs = (torch.stack([luma(f).float() for f in frames]).unsqueeze(1) for frames in (truth, output))
    with torch.no_grad():
        assert streamed == pytest.approx(load_model()(truths, outputs).mean().item(), abs=1e-3)


def test_only_every_nth_frame_counts() -> None:
    truth = clip()
    output = noisy(truth, 16)
    assert vmaf(output, truth, every=2) == pytest.approx(vmaf(output[::2], truth[::2]))


def test_too_small_frames_are_named() -> None:
    small = [frame[:31, :40] for frame in clip()]
    with pytest.raises(Unmeasurable, match="at least 32x32"):
        vmaf(small, small)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vmaf_torch", None)
    with pytest.raises(Unmeasurable, match="vmaf-torch cannot be used") as caught:
        load_model()
    assert "duovsr[eval]" in (caught.value.hint or "")

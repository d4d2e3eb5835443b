"""Flicker of training windows along the truth's motion."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.errors import UsageError
from duovsr.train.losses import temporal_loss
from duovsr.train.motion import Motion, MotionEstimator

T, SIDE = 5, 64


def passing(speed: int, *, seed: int, coarse: int) -> Tensor:
    """(1, 3, T, SIDE, SIDE) in [-1, 1]: smooth noise of `coarse` pixels that goes left by `speed` pixels a frame."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.rand(1, 3, SIDE // coarse, (SIDE + T * speed) // coarse + 1, generator=generator) * 2 - 1
    scene = F.interpolate(scene, scale_factor=coarse, mode="bicubic").clamp(-1, 1)
    return torch.stack([scene[..., t * speed : t * speed + SIDE] for t in range(T)], dim=2)


def moves_by(x: float) -> Motion:
    flow = torch.zeros(1, T - 1, 2, SIDE, SIDE)
    flow[:, :, 0] = x
    visible = torch.ones(1, T - 1, 1, SIDE, SIDE, dtype=torch.bool)
    visible[..., : max(0, round(-x))] = False  # what leaves on the left
    return Motion(flow, visible)


@pytest.fixture
def estimate() -> Callable[[Tensor], Motion]:
    pytest.importorskip("cv2", reason="optical flow needs the extra [train]")
    return MotionEstimator()


def test_an_error_that_moves_with_its_object_is_no_flicker() -> None:
    truth, error = passing(3, seed=0, coarse=8), 0.1 * passing(3, seed=1, coarse=2)
    assert temporal_loss(truth + error, truth, moves_by(-3)) < 1e-5
    assert temporal_loss(truth + error, truth, moves_by(0)) > 0.03
    stuck = error[:, :, :1].expand_as(error)
    assert temporal_loss(truth + stuck, truth, moves_by(-3)) > 0.03
    assert temporal_loss(truth + stuck, truth, moves_by(0)) < 1e-5


def test_what_is_hidden_in_the_next_frame_does_not_count() -> None:
    truth = torch.zeros(1, 3, T, SIDE, SIDE)
    output = truth.clone()
    output[:, :, ::2, :, :10] = 0.5
    still = moves_by(0)
    still.visible[..., :10] = False
    assert temporal_loss(output, truth, moves_by(0)) > 0.1
    assert temporal_loss(output, truth, still) < 1e-5


def test_flicker_has_a_gradient_that_ends_it() -> None:
    truth = passing(2, seed=2, coarse=8)
    flickering = (truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(3))).requires_grad_()
    before = temporal_loss(flickering, truth, moves_by(-2))
    (gradient,) = torch.autograd.grad(before, flickering)
    after = temporal_loss(flickering - 0.1 * gradient / gradient.abs().max(), truth, moves_by(-2))
    assert after < 0.9 * before


def test_the_motion_of_each_window_is_found(estimate: Callable[[Tensor], Motion]) -> None:
    windows = torch.cat([passing(speed, seed=4, coarse=8) for speed in (0, 2, 4)])
    motion = estimate(windows)
    assert motion.flow.shape == (3, T - 1, 2, SIDE, SIDE)
    assert motion.visible.shape == (3, T - 1, 1, SIDE, SIDE)
    inner = motion.flow[..., 12:-12, 12:-12].median(-1)[0].median(-1)[0]  # (3, T - 1, 2)
    expected = torch.tensor([[0.0, 0], [-2, 0], [-4, 0]])[:, None].expand_as(inner)
    torch.testing.assert_close(inner, expected, atol=0.2, rtol=0)
    assert motion.visible[0].all()
    assert not motion.visible[2, :, :, :, 0].any()


def test_one_frame_has_no_flicker(estimate: Callable[[Tensor], Motion]) -> None:
    one, other = torch.rand(2, 2, 3, 1, 16, 16)
    assert temporal_loss(one, other, estimate(other)) == 0


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert MotionEstimator.maybe(0) is None
    with pytest.raises(UsageError, match="OpenCV is not installed") as caught:
        MotionEstimator.maybe(1)
    assert "duovsr[train]" in (caught.value.hint or "")

"""E_warp on clips whose motion is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from duovsr.metrics.meter import Unmeasurable
from duovsr.metrics.warping import DisFlow, WarpingMeter, visible_in_both, warp, warping_error

H, W = 61, 83


def smooth_noise(height: int, width: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).random((height, width, 3))
    for axis in (0, 1):
        noise = sum(np.roll(noise, shift, axis) for shift in range(5)) / 5
    return np.rint(255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)


def constant_flow(x: float, y: float) -> Tensor:
    return torch.tensor([x, y], dtype=torch.float32).view(2, 1, 1).expand(2, H, W)


def test_a_known_integer_shift_has_no_error() -> None:
    """The window moves 3 right and 2 up over a wide picture: what is at (y, x) comes to (y + 2, x - 3)."""
    scene = smooth_noise(H + 10, W + 10, 0)
    this, following = scene[5 : 5 + H, 5 : 5 + W], scene[3 : 3 + H, 8 : 8 + W]
    assert warping_error(this, following, constant_flow(-3, 2), constant_flow(3, -2)) == pytest.approx(0, abs=1e-9)
    assert warping_error(this, following, constant_flow(0, 0), constant_flow(0, 0)) > 1e-3


def test_flicker_costs_twice_its_variance() -> None:
    sigma, rng, size = 10, np.random.default_rng(1), (H, W, 3)
    this, following = (np.rint(128 + rng.normal(0, sigma, size)).astype(np.uint8) for _ in range(2))
    still = constant_flow(0, 0)
    assert warping_error(this, following, still, still) == pytest.approx(2 * (sigma / 255) ** 2, rel=0.05)


def test_warp_is_bilinear() -> None:
    ramp = torch.arange(W, dtype=torch.float32).expand(1, H, W)
    warped = warp(ramp[None], constant_flow(0.25, 0.5)[None])[0]
    torch.testing.assert_close(warped[..., :-1], ramp[..., :-1] + 0.25)


def test_pixels_that_leave_or_are_covered_do_not_count() -> None:
    mask = visible_in_both(constant_flow(-3, 2), constant_flow(3, -2))
    expected = torch.zeros(H, W, dtype=torch.bool)
    expected[: H - 2, 3:] = True
    assert torch.equal(mask, expected)

    backward = constant_flow(3, -2).clone()
    backward[:, 20:30, 40:50] = 0  # these pixels of the next frame come from elsewhere
    expected[18:28, 43:53] = False
    assert torch.equal(visible_in_both(constant_flow(-3, 2), backward), expected)


def test_nothing_visible_is_no_error() -> None:
    frame = smooth_noise(H, W, 2)
    assert warping_error(frame, frame, constant_flow(W, 0), constant_flow(-W, 0)) is None


def test_a_static_clip_has_no_error() -> None:
    pytest.importorskip("cv2", reason="DIS flow needs the extra [eval]")
    frame, meter = smooth_noise(H, W, 3), WarpingMeter(DisFlow())
    for _ in range(3):
        meter.update(frame, frame)
    assert meter.mean() == pytest.approx(0, abs=1e-9)


def test_flow_is_taken_from_the_reference_at_the_output_size() -> None:
    """A still output over a moving LQ clip is what own flow would reward; the reference's flow finds it out."""
    pytest.importorskip("cv2", reason="DIS flow needs the extra [eval]")
    scene = smooth_noise(128, 160, 4)
    moving, frozen = WarpingMeter(DisFlow()), WarpingMeter(DisFlow())
    for step in range(3):
        following = np.ascontiguousarray(scene[:, 4 * step : 4 * step + 128])
        lq = np.ascontiguousarray(following[::2, ::2])
        moving.update(following, lq)
        frozen.update(np.ascontiguousarray(scene[:, :128]), lq)
    assert moving.mean() < 0.2 * frozen.mean()


def test_dis_finds_a_shift() -> None:
    pytest.importorskip("cv2", reason="DIS flow needs the extra [eval]")
    scene = smooth_noise(128, 160, 5)
    this, following = (np.ascontiguousarray(scene[:, start : start + 128]) for start in (10, 14))
    flow = DisFlow()(this, following)
    assert flow.shape == (2, 128, 128)
    assert flow[0].median().item() == pytest.approx(-4, abs=0.2)
    assert flow[1].median().item() == pytest.approx(0, abs=0.2)


def test_one_frame_has_no_neighbour() -> None:
    pytest.importorskip("cv2", reason="DIS flow needs the extra [eval]")
    meter = WarpingMeter(DisFlow())
    meter.update(smooth_noise(H, W, 6), smooth_noise(H, W, 6))
    with pytest.raises(Unmeasurable, match="two neighbouring frames"):
        meter.mean()


def test_frames_too_small_for_dis_are_named() -> None:
    pytest.importorskip("cv2", reason="DIS flow needs the extra [eval]")
    with pytest.raises(Unmeasurable, match="at least 16x16"):
        DisFlow()(smooth_noise(8, 40, 7), smooth_noise(8, 40, 8))


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(Unmeasurable, match="OpenCV is not installed") as caught:
        DisFlow()
    assert "duovsr[eval]" in (caught.value.hint or "")

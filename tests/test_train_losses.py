"""The losses in pixels: what each sees, and what it is blind to."""

from __future__ import annotations

from math import log10

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from duovsr.metrics.fidelity import psnr_y, ssim_y
from duovsr.train.losses import detail_loss, gradient_loss, luma_and_color, psnr_loss, ssim_loss


def test_difference_losses_see_only_differences() -> None:
    target = torch.rand(1, 3, 4, 16, 16)
    assert gradient_loss(target + 0.1, target) < 1e-6
    assert gradient_loss(target.flip(3), target) > 0.1


def test_an_error_of_colour_shows_beside_a_larger_one_of_luma() -> None:
    truth = torch.zeros(1, 3, 1, 1, 1)
    output = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1, 1).requires_grad_()
    luma_and_color(output - truth).abs().mean().backward()
    assert output.grad is not None
    color = output.grad.flatten() - output.grad.mean()
    assert (color * torch.tensor([1.0, 0.0, -1.0])).sum() > 0.1, "red goes down faster than blue"


def test_grey_errors_weigh_as_much_as_in_rgb() -> None:
    frames = torch.rand(1, 1, 2, 8, 8).expand(1, 3, 2, 8, 8)
    torch.testing.assert_close(luma_and_color(frames).abs().mean(), frames.mean(), rtol=1e-3, atol=0)


def test_the_ssim_and_the_psnr_loss_are_those_of_the_metrics() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 256, (24, 31, 3), dtype=np.uint8)
    output = np.clip(truth + rng.integers(-30, 31, truth.shape), 0, 255).astype(np.uint8)
    frames = [torch.from_numpy(pixels).permute(2, 0, 1)[None, :, None] / 127.5 - 1 for pixels in (output, truth)]
    # the metrics' luma has studio range: the constants of SSIM weigh slightly more, errors are smaller
    assert 1 - ssim_loss(*frames).item() == pytest.approx(ssim_y(output, truth), abs=2e-3)
    assert ssim_loss(frames[1], frames[1]) < 1e-6
    assert -psnr_loss(*frames).item() + 20 * log10(255 / 219) == pytest.approx(psnr_y(output, truth), abs=0.05)


def test_the_ssim_loss_at_smaller_scales_is_that_of_smaller_frames() -> None:
    output, truth = torch.rand(2, 1, 3, 2, 48, 64).mul(2).sub(1)
    halves = [F.avg_pool2d(frames.transpose(1, 2).flatten(0, 1), 2).unsqueeze(2) for frames in (output, truth)]
    expected = (ssim_loss(output, truth) + ssim_loss(*halves)) / 2
    torch.testing.assert_close(ssim_loss(output, truth, scales=2), expected)


def test_the_detail_loss_is_what_is_missing() -> None:
    truth = 100 * torch.randn(1, 3, 2, 32, 48)  # much more than the eye's threshold
    assert detail_loss(truth, truth) < 1e-5
    assert detail_loss(0.7 * truth, truth).item() == pytest.approx(0.3, abs=1e-4)
    assert detail_loss(1.5 * truth, truth) < 1e-5, "more than the truth has is left to the other losses"
    assert detail_loss(-truth, truth).item() == pytest.approx(1, abs=1e-2), "the wrong detail is none, and no worse"
    assert detail_loss(torch.zeros_like(truth), truth / 1e5) < 1e-5, "what nobody sees is not missing"


def test_the_psnr_loss_counts_every_frame_alike_and_ends_where_nobody_sees() -> None:
    truth = torch.rand(1, 3, 2, 16, 16) - 0.5
    error = torch.tensor([0.02, 0.2]).view(1, 1, 2, 1, 1)  # 40 and 20 dB
    assert psnr_loss(truth + error, truth).item() == pytest.approx(-30, abs=0.3)
    assert psnr_loss(truth, truth).item() == pytest.approx(-50, abs=1e-3)

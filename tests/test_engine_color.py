"""Colour transfer from the source, and what else becomes of frames around the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from duovsr import UpscaleOptions, Upscaler
from duovsr.engine import color
from duovsr.model.one_step import OneStepModel
from duovsr.options import PRESETS, ColorTransfer


def test_colors_follow_the_source_as_asked_and_else_as_the_preset_says(small_model: OneStepModel) -> None:
    clip = list(np.random.default_rng(0).random((5, 48, 64, 3), np.float32))

    def restored(default: ColorTransfer, asked: ColorTransfer | None) -> np.ndarray:
        preset = replace(small_model.preset, default_color=default)
        upscaler = Upscaler(replace(small_model, preset=preset))
        return np.stack(list(upscaler.stream(clip, UpscaleOptions(scale=2, color=asked))))

    assert np.array_equal(restored("none", None), restored("wavelet", "none"))
    assert np.array_equal(restored("wavelet", None), restored("none", "wavelet"))
    assert not np.array_equal(restored("wavelet", None), restored("none", None))
    assert PRESETS["tiny"].default_color == "none" and PRESETS["1.3b"].default_color == "wavelet"


def test_wavelet_transfer_takes_the_low_band_and_keeps_the_detail() -> None:
    torch.manual_seed(0)
    detail = torch.randn(1, 3, 2, 128, 160) * 0.1
    lq = torch.linspace(-0.5, 0.5, 160).expand(1, 3, 2, 128, 160)
    tinted = lq + detail + torch.tensor([0.2, -0.1, 0.05]).view(1, 3, 1, 1, 1)
    result = color.transfer_color(tinted, lq, "wavelet")
    assert abs((result - lq).mean((0, 2, 3, 4))).max() < 1e-3
    assert abs((result - lq - detail).std() / detail.std()) < 0.05


def dilated_low_band(x: torch.Tensor) -> torch.Tensor:
    """The definition: five 3x3 binomial filters with steps 1, 2, 4, 8, 16."""
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    x = x[0].transpose(0, 1)
    for step in (1, 2, 4, 8, 16):
        padded = torch.nn.functional.pad(x, (step,) * 4, mode="replicate")
        x = torch.nn.functional.conv2d(padded, kernel.expand(3, 1, 3, 3), dilation=step, groups=3)
    return x.transpose(0, 1)[None]


@pytest.mark.parametrize(("height", "width"), [(192, 256), (187, 250)])
def test_reduced_low_band_is_close_to_its_definition(height: int, width: int) -> None:
    smooth = torch.nn.functional.interpolate(torch.randn(1, 3, 1, 6, 8), (1, height, width), mode="trilinear")
    band = color.transfer_color(torch.zeros_like(smooth), smooth, "wavelet")
    assert (band - dilated_low_band(smooth)).abs().mean() < 0.05 * smooth.abs().mean()


def test_the_low_band_of_a_slope_is_the_slope() -> None:
    """Not moved by half a pixel: exact where no filter reaches over the border."""
    slope = torch.linspace(-1, 1, 256)[:, None] + torch.linspace(-0.5, 0.5, 320)
    slope = slope.expand(1, 3, 2, 256, 320)
    band = color.transfer_color(torch.zeros_like(slope), slope, "wavelet")
    assert_close(band[..., 32:-32, 32:-32], slope[..., 32:-32, 32:-32], rtol=0, atol=1e-5)


def test_a_tint_is_removed_up_to_the_border() -> None:
    lq = torch.rand(1, 3, 2, 61, 83)  # no multiples of the reduction
    assert_close(color.transfer_color(lq + 0.25, lq, "wavelet"), lq, rtol=0, atol=1e-5)


def test_adain_matches_mean_and_deviation() -> None:
    hq, lq = torch.randn(1, 3, 2, 20, 30) * 2 + 1, torch.randn(1, 3, 2, 20, 30)
    result = color.transfer_color(hq, lq, "adain")
    assert_close(result.mean((3, 4)), lq.mean((3, 4)), rtol=0, atol=1e-5)
    assert_close(result.std((3, 4)), lq.std((3, 4)), rtol=1e-4, atol=1e-4)


def test_strength_is_as_asked_and_else_as_the_preset_says(small_model: OneStepModel) -> None:
    clip = list(np.random.default_rng(0).random((5, 48, 64, 3), np.float32))

    def restored(default: float, asked: float | None) -> np.ndarray:
        upscaler = Upscaler(replace(small_model, preset=replace(small_model.preset, default_strength=default)))
        return np.stack(list(upscaler.stream(clip, UpscaleOptions(scale=2, strength=asked))))

    assert np.array_equal(restored(0.25, None), restored(1.0, 0.25))
    assert not np.array_equal(restored(0.25, None), restored(1.0, None))


def test_frames_are_padded_by_their_own_edges(small_upscaler: Upscaler) -> None:
    """Black beyond the edge would bleed into the picture."""
    clip = np.random.default_rng(0).random((5, 41, 50, 3), np.float32)
    wide = np.pad(clip, ((0, 0), (0, 7), (0, 14), (0, 0)), mode="edge")
    options = UpscaleOptions(scale=1, color="none")
    narrow, whole = (np.stack(list(small_upscaler.stream(list(frames), options))) for frames in (clip, wide))
    assert np.array_equal(narrow, whole[:, :41, :50])

"""The degradation's operators against independent computations, and their batched forms against the ones for a clip."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from duovsr.errors import TrainError
from duovsr.train import degradation_ops as ops
from duovsr.train.degradation import FAMILIES
from duovsr.train.degradation_batched import apply_batched, codec_surrogate, jpeg_by_dct
from duovsr.train.degradation_ops import Blur, Codec, Jpeg, Kernel, Noise, Operator, Quantise, Resize, Unsharp

TILTED = Kernel("aniso", 21, 1.0, 2.5, 0.4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def textured(T: int, H: int, W: int, seed: int = 0) -> Tensor:
    """Frames (T, 3, H, W) in [0, 1] with edges, gradients and grain, that move to the left."""
    coarse = torch.rand(1, 3, 4, 5, generator=seeded(seed))
    scene = F.interpolate(coarse, (H, W + T), mode="nearest") * 0.5
    scene += F.interpolate(coarse, (H, W + T), mode="bicubic") * 0.4
    scene += 0.05 * torch.randn(scene.shape, generator=seeded(seed + 1))
    return ops.quantise(torch.cat([scene[..., t : t + W] for t in range(T)]))


def correlated(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Brute force over the taps of a kernel (k, k) on an image (H, W), border as OpenCV's reflect-101."""
    pad = len(kernel) // 2
    padded = np.pad(image.astype(np.float64), pad, mode="reflect")
    H, W = image.shape
    taps = [(y, x) for y in range(len(kernel)) for x in range(len(kernel))]
    return sum(kernel[y, x] * padded[y : y + H, x : x + W] for y, x in taps)


def test_kernels_sum_to_one_and_are_symmetric() -> None:
    for family in FAMILIES:
        round_one = family == "sinc" or not family.endswith("aniso")
        shape = (1.5, 1.5, 0.0) if round_one else (0.8, 2.0, 0.7)
        weights = ops.kernel_weights(Kernel(family, 13, *shape, beta=1.6, omega=2.0))
        assert weights.shape == (13, 13)
        assert abs(weights.sum() - 1) < 1e-6
        assert_close(weights, weights.flip(0, 1))
        assert torch.allclose(weights, weights.T) == round_one
        assert weights.argmax() == 6 * 13 + 6


def test_gaussian_kernels_have_their_deviations_and_angle() -> None:
    weights = ops.kernel_weights(TILTED).double()
    axis = torch.arange(21.0) - 10
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    covariance = torch.stack([(weights * a * b).sum() for a, b in ((x, x), (x, y), (y, y))])
    cos, sin = math.cos(0.4), math.sin(0.4)
    expected = [cos**2 + 2.5**2 * sin**2, (1 - 2.5**2) * cos * sin, sin**2 + 2.5**2 * cos**2]
    assert_close(covariance, torch.tensor(expected).double(), rtol=0, atol=0.03)
    assert_close(ops.kernel_weights(Kernel("generalised_aniso", 21, 1.0, 2.5, 0.4)), weights.float())


def test_generalised_and_plateau_kernels_follow_their_formulas() -> None:
    for family, formula in (
        ("generalised_iso", lambda d: np.exp(-0.5 * d**1.7)),
        ("plateau_iso", lambda d: 1 / (d**1.7 + 1)),
    ):
        weights = ops.kernel_weights(Kernel(family, 9, 1.3, 1.3, beta=1.7)).numpy()
        for y, x in ((4, 4), (4, 7), (0, 1)):
            distance = ((y - 4) ** 2 + (x - 4) ** 2) / 1.3**2
            assert abs(weights[y, x] / weights[4, 4] - formula(distance)) < 1e-5


def test_sinc_kernels_pass_low_and_stop_high_frequencies() -> None:
    weights = ops.kernel_weights(Kernel("sinc", 21, omega=math.pi / 3))[None]
    x = torch.arange(64.0)
    low, high = (torch.cos(omega * x).expand(1, 3, 64, 64) for omega in (0.2, 2.5))
    inner = (..., slice(16, 48), slice(16, 48))
    assert ops.blur(low, weights)[inner].std() / low[inner].std() > 0.9
    assert ops.blur(high, weights)[inner].std() / high[inner].std() < 0.1


@pytest.mark.parametrize(("H", "W", "k"), [(9, 14, 7), (4, 3, 21)])
def test_blur_correlates_every_frame_with_its_kernel(H: int, W: int, k: int) -> None:
    frames = torch.rand(2, 3, H, W, generator=seeded())
    weights = torch.rand(2, k, k, generator=seeded(1)) / k**2
    result = ops.blur(frames, weights).numpy()
    for t in range(2):
        for c in range(3):
            np.testing.assert_allclose(result[t, c], correlated(frames[t, c].numpy(), weights[t].numpy()), atol=1e-5)
    assert_close(ops.blur(frames[:, :, :1, :1], torch.full((2, 3, 3), 1 / 9)), frames[:, :, :1, :1])


def test_unsharp_sharpens_what_stands_out() -> None:
    frames = textured(2, 30, 37)
    axis = np.arange(51) - 25
    line = np.exp(-0.5 * (axis / 8.0) ** 2)  # OpenCV: sigma 0 means 0.3 ((51 - 1) / 2 - 1) + 0.8
    kernel = np.outer(line, line) / line.sum() ** 2
    image = frames[1, 2].numpy().astype(np.float64)
    residue = image - correlated(image, kernel)
    mask = correlated((np.abs(residue) > 10 / 255).astype(np.float64), kernel)
    expected = mask * np.clip(image + 0.5 * residue, 0, 1) + (1 - mask) * image
    np.testing.assert_allclose(ops.unsharp(frames)[1, 2], expected, atol=1e-5)
    faint = 0.5 + (frames - 0.5) * 0.03  # below the threshold
    assert_close(ops.unsharp(faint), faint)


@pytest.mark.parametrize(("height", "width"), [(8, 7), (20, 33), (5, 21)])
def test_area_resize_is_the_mean_over_each_pixels_extent(height: int, width: int) -> None:
    frames = torch.rand(1, 3, 10, 21, generator=seeded())
    fine = frames.repeat_interleave(height, 2).repeat_interleave(width, 3)
    expected = fine.unflatten(2, (height, 10)).unflatten(4, (width, 21)).mean((3, 5))
    assert_close(ops.resize(frames, height, width, "area", False), expected)


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(14, 20), (90, 66)])
def test_resizes_are_opencvs(mode: str, height: int, width: int) -> None:
    cv2 = pytest.importorskip("cv2", reason="RealBasicVSR resizes with OpenCV; it needs the extra [eval]")
    flag = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}[mode]
    frames = textured(1, 60, 48)
    expected = cv2.resize(frames[0].permute(1, 2, 0).numpy(), (width, height), interpolation=flag)
    result = ops.resize(frames, height, width, mode, False)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(result, expected, atol=2e-4)


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_deviation_in_every_frame(gray: bool) -> None:
    frames = torch.full((2, 3, 128, 128), 0.5)
    noise = (ops.add_noise(frames, Noise("gaussian", (5.0, 20.0), gray, seed=1)) - frames) * 255
    for t, sigma in enumerate((5.0, 20.0)):
        assert abs(noise[t].mean()) < 0.04 * sigma
        assert abs(noise[t].std() / sigma - 1) < 0.03
    channels = torch.corrcoef(noise[1].flatten(1))
    assert_close(channels, torch.ones(3, 3) if gray else torch.eye(3), rtol=0, atol=0.04)
    assert abs(torch.corrcoef(noise[:, 0].flatten(1))[0, 1]) < 0.04


@pytest.mark.parametrize("gray", [False, True])
def test_poisson_noise_has_the_variance_of_counts(gray: bool) -> None:
    """x / v of variance, with v the levels in the frame, raised to a power of 2."""
    stripes = torch.tensor([51.0, 102, 204]).repeat_interleave(64) / 255
    frames = stripes.expand(2, 3, 96, 192).clone()
    frames[1, :, 0, :8] = torch.arange(8.0) / 255  # frame 1: 11 levels -> 16, frame 0: 3 -> 4
    noise = ops.add_noise(frames, Noise("poisson", (0.5, 2.0), gray, seed=2)) - frames
    for t, (scale, levels) in enumerate(((0.5, 4), (2.0, 16))):
        for i, value in enumerate((51, 102, 204)):
            part = noise[t, :, 1:, 64 * i : 64 * (i + 1)]
            deviation = scale * math.sqrt(value / 255 / levels)
            assert abs(part.mean()) < 0.06 * deviation
            assert abs(part.std() / deviation - 1) < 0.06
    channels = torch.corrcoef(noise[1].flatten(1))
    assert_close(channels, torch.ones(3, 3) if gray else torch.eye(3), rtol=0, atol=0.04)


def test_quantise_clamps_and_rounds() -> None:
    values = torch.tensor([-0.3, 0.0, 100.4 / 255, 100.6 / 255, 1.7]).view(1, 1, 1, 5)
    assert_close(ops.quantise(values).flatten() * 255, torch.tensor([0.0, 0, 100, 101, 255]))


def test_jpeg_loses_more_at_lower_quality_frame_by_frame() -> None:
    frames = textured(1, 35, 50).expand(3, -1, -1, -1)
    errors = (ops.jpeg(frames, (95, 60, 30)) - frames).abs().mean((1, 2, 3))
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(("H", "W"), [(48, 64), (33, 46)])
def test_jpeg_by_dct_is_close_to_libjpeg(H: int, W: int) -> None:
    frames = torch.cat([textured(1, H, W, seed) for seed in range(10)])
    for quality in (10, 30, 49, 50, 75, 90, 100):
        difference = jpeg_by_dct(frames, torch.full((10,), quality)) - ops.jpeg(frames, (quality,) * 10)
        assert difference.abs().mean() * 255 < 0.8  # roundings that flip; a wrong table or phase leaves several levels
        assert difference.mean().abs() * 255 < 0.06


@pytest.mark.parametrize(("H", "W"), [(48, 64), (27, 33)])
@pytest.mark.parametrize(
    ("name", "control", "fine", "coarse"),
    [
        ("libx264", "crf", 18, 40),
        ("libx264", "bitrate", 100_000, 1_000),
        ("h264", "crf", 18, 40),
        ("mpeg4", "qscale", 2, 16),
        ("mpeg4", "bitrate", 100_000, 1_000),
    ],
)
def test_codecs_lose_detail_and_keep_the_frames(
    name: str, control: str, fine: int, coarse: int, H: int, W: int
) -> None:
    frames = textured(5, H, W)
    good, bad, again = (ops.codec(frames, Codec(name, control, value)) for value in (fine, coarse, coarse))
    assert good.shape == frames.shape
    assert torch.equal(bad, again)
    errors = [(result - frames).abs().mean() for result in (good, bad)]
    assert errors[0] > 0.001
    assert (good - frames).mean().abs() < 0.001, "no darker, no brighter: a model would learn to undo it"
    # Rate control hardly acts within five frames: see DegradationConfig.codec_control.
    assert errors[1] >= errors[0] if control == "bitrate" else errors[1] > 1.3 * errors[0]
    # Every decoded frame is nearest to its own source: none is lost, none out of place.
    assert torch.cdist(good.flatten(1), frames.flatten(1)).argmin(1).tolist() == [0, 1, 2, 3, 4]


def test_a_missing_codec_is_named() -> None:
    with pytest.raises(TrainError, match="no encoder `no-such-codec`"):
        ops.codec(textured(1, 16, 16), Codec("no-such-codec", "crf", 20))


def test_the_surrogate_predicts_from_the_decoded_frame_before() -> None:
    still = textured(1, 24, 34).expand(3, -1, -1, -1)
    clips = torch.stack([still, still, textured(3, 24, 34)])
    fine, coarse, moving = codec_surrogate(clips, torch.tensor([4.0, 60.0, 60.0]))
    assert (fine - still).abs().mean() < (coarse - still).abs().mean()
    assert (moving[2] - moving[1]).abs().mean() > 0.01
    # Left to refine is what the quantiser rounds away: a still picture stays as it is.
    assert (coarse[2] - coarse[1]).abs().mean() < 1 / 255


@pytest.mark.parametrize(
    "operators",
    [
        [Unsharp()] * 3,
        [Blur((TILTED,) * 2), Blur((Kernel("sinc", 7), Kernel("iso", 7))), Blur((Kernel("iso", 13, 2, 2),) * 2)],
        [Resize(22, 31, "area", False)] * 3,
        [Resize(50, 20, "bicubic", True)] * 3,
        [
            Noise("gaussian", (3.0, 9.0), True, 1),
            Noise("poisson", (0.1, 2.0), False, 2),
            Noise("poisson", (1, 1), True, 3),
        ],
        [Quantise()] * 3,
    ],
    ids=lambda operators: type(operators[0]).__name__,
)
def test_batched_operators_equal_those_of_a_clip(operators: list[Operator]) -> None:
    clips = torch.stack([textured(2, 33, 46, seed) * 1.2 - 0.1 for seed in range(3)])
    expected = [ops.apply(operator, clip) for operator, clip in zip(operators, clips, strict=True)]
    assert_close(apply_batched(operators, clips), torch.stack(expected), rtol=0, atol=1e-6)


def test_batched_jpegs_have_the_quality_of_their_frame() -> None:
    clips = torch.stack([textured(2, 33, 46, seed) for seed in range(2)])
    jpegs: list[Operator] = [Jpeg((90, 30)), Jpeg((40, 95))]
    expected = torch.stack([ops.apply(jpeg, clip) for jpeg, clip in zip(jpegs, clips, strict=True)])
    assert (apply_batched(jpegs, clips) - expected).abs().mean((2, 3, 4)).max() < 1.5 / 255

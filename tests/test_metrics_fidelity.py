"""PSNR and SSIM against hand cases, FFmpeg's psnr filter and SSIM written out window by window."""

from __future__ import annotations

import av
import numpy as np
import pytest

from duovsr.metrics.fidelity import PSNR_CAP, luma, psnr, psnr_rgb, psnr_y, ssim_y
from duovsr.metrics.meter import Unmeasurable


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """A frame with structure, and a noisy copy; odd sides."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:47, :63]
    truth = np.stack((4 * x, 5 * y, 127 + 100 * np.sin(x * y / 40)), axis=-1).clip(0, 255)
    output = (truth + rng.normal(0, 8, truth.shape)).round().clip(0, 255)
    return output.astype(np.uint8), truth.astype(np.uint8)


def test_a_constant_offset_of_one_level_is_48_13_db() -> None:
    truth = np.full((16, 16, 3), 100, np.uint8)
    assert psnr_rgb(truth + 1, truth) == pytest.approx(48.1308, abs=1e-4)
    # one RGB level is 219 / 255 of a luma level
    assert psnr_y(truth + 1, truth) == pytest.approx(48.1308 + 20 * np.log10(255 / 219), abs=1e-4)
    assert psnr(luma(truth) + 1, luma(truth)) == pytest.approx(48.1308, abs=1e-4)


def test_luma_spans_16_to_235() -> None:
    extremes = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], np.uint8)
    assert luma(extremes).numpy() == pytest.approx(np.array([[16, 235, 81.481]]))


def test_equal_frames_are_capped(pair: tuple[np.ndarray, np.ndarray]) -> None:
    _, truth = pair
    assert psnr_y(truth, truth) == psnr_rgb(truth, truth) == PSNR_CAP
    assert ssim_y(truth, truth) == pytest.approx(1)


def test_psnr_agrees_with_ffmpeg(pair: tuple[np.ndarray, np.ndarray]) -> None:
    output, truth = pair
    assert psnr_rgb(output, truth) == pytest.approx(_ffmpeg_psnr(output, truth), abs=0.01)
    output_luma, truth_luma = (luma(pixels).round() for pixels in pair)
    expected = _ffmpeg_psnr(output_luma.byte().numpy(), truth_luma.byte().numpy())
    assert psnr(output_luma, truth_luma) == pytest.approx(expected, abs=0.01)


def test_ssim_agrees_with_its_formula_window_by_window(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert ssim_y(*pair) == pytest.approx(_plain_ssim(*pair), abs=1e-6)
    assert 0.2 < ssim_y(*pair) < 0.95


def test_ssim_names_its_minimum_size() -> None:
    with pytest.raises(Unmeasurable, match="at least 11x11"):
        ssim_y(np.zeros((10, 40, 3), np.uint8), np.zeros((10, 40, 3), np.uint8))


def _ffmpeg_psnr(output: np.ndarray, truth: np.ndarray) -> float:
    graph = av.filter.Graph()
    height, width = truth.shape[:2]
    source, planes = ("rgb24", "gbrp") if truth.ndim == 3 else ("gray", "gray")
    inputs = [graph.add_buffer(width=width, height=height, format=planes, time_base=av.time_base) for _ in range(2)]
    compare, sink = graph.add("psnr"), graph.add("buffersink")
    for index, node in enumerate(inputs):
        node.link_to(compare, 0, index)
    compare.link_to(sink)
    graph.configure()
    for node, pixels in zip(inputs, (output, truth), strict=True):
        frame = av.VideoFrame.from_ndarray(pixels, format=source).reformat(format=planes)
        frame.pts = 0
        node.push(frame)
        node.push(None)
    return float(sink.pull().metadata["lavfi.psnr.psnr_avg"])


def _plain_ssim(output: np.ndarray, truth: np.ndarray) -> float:
    weights = np.array([0.299 * 219 / 255, 0.587 * 219 / 255, 0.114 * 219 / 255])
    x, y = (np.lib.stride_tricks.sliding_window_view(pixels @ weights + 16, (11, 11)) for pixels in (output, truth))
    distance = np.hypot(*np.mgrid[-5:6, -5:6])
    window = np.exp(-(distance**2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        return np.einsum("ijkl,kl->ij", values, window)

    mean_x, mean_y = mean(x), mean(y)
    centred_x, centred_y = x - mean_x[..., None, None], y - mean_y[..., None, None]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * mean(centred_x * centred_y) + c2)
    return float((similarity / ((mean_x**2 + mean_y**2 + c1) * (mean(centred_x**2) + mean(centred_y**2) + c2))).mean())

"""NIQE, the no-reference "natural image quality evaluator" (Mittal, Soundararajan, Bovik: IEEE SPL 20(3), 2013).

Lower is more natural. Equation numbers are the paper's. Blocks of 96 pixels and luma rounded to whole levels are as in
the authors' release; half size is the mean of 2x2 pixels, as in BasicSR's first port. The release halves by antialiased
bicubic, which scores sharp frames about 0.4 lower and blurred ones the same: compare one implementation's scores.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from duovsr.errors import InputError
from duovsr.metrics.fidelity import luma
from duovsr.metrics.meter import Pixels, Unmeasurable

HUB_REPO = "chaofengc/IQA-PyTorch-Weights"
HUB_FILE = "niqe_modelparameters.mat"

EVERY = 4  # frames between two measured ones: neighbours score alike

_BLOCK = 96
_FEATURES = 36  # 18 at full size, 18 at half size
_WINDOW_SIDE = 7


@dataclass(frozen=True)
class NiqeParameters:
    """The pristine model: `mean` (36,), `covariance` (36, 36), smoothing `window` (7, 7); `sha256` of their file."""

    mean: Tensor
    covariance: Tensor
    window: Tensor
    sha256: str


def load_parameters(path: Path | None = None) -> NiqeParameters:
    """Read the published parameters from `path` (.npz or .mat), or else from the Hugging Face hub or its local cache.

    Raises `InputError` for a path that is no parameter file, `Unmeasurable` where the hub's file cannot be had.
    """
    source = _from_hub() if path is None else path
    try:
        data = source.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read NIQE parameters: `{source}`: {error.strerror}") from error
    try:
        arrays = _read_mat(data) if source.suffix == ".mat" else _read_npz(data)
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"not a NIQE parameter file: `{source}`",
            hint="use the published `niqe_pris_params.npz` or `niqe_modelparameters.mat`",
        ) from error
    mean, covariance, window = (torch.from_numpy(array).double() for array in arrays)
    if mean.numel() != _FEATURES or covariance.shape != (_FEATURES, _FEATURES) or window.dim() != 2:
        raise InputError(f"not a NIQE parameter file: `{source}`: wrong shapes")
    return NiqeParameters(mean.flatten(), covariance, window, hashlib.sha256(data).hexdigest())


def niqe(pixels: Pixels, parameters: NiqeParameters) -> float | None:
    """NIQE of one frame (H, W, 3), RGB 0..255; 0 is best, natural photos lie near 3.

    None for a frame with fewer than two blocks that are not flat (a fade from black). Raises `Unmeasurable` for a frame
    with fewer than two 96x96 blocks.
    """
    height, width = pixels.shape[:2]
    rows, columns = height // _BLOCK, width // _BLOCK
    if rows * columns < 2:
        raise Unmeasurable(
            f"NIQE needs at least two {_BLOCK}x{_BLOCK} blocks ({2 * _BLOCK}x{_BLOCK} pixels), not {width}x{height}"
        )
    image = luma(pixels[: rows * _BLOCK, : columns * _BLOCK]).round()
    full = _block_features(_normalised(image, parameters.window), _BLOCK)
    half_size = F.avg_pool2d(image[None, None], 2)[0, 0]
    half = _block_features(_normalised(half_size, parameters.window), _BLOCK // 2)
    features = torch.cat((full, half), dim=1)  # (blocks, 36)

    complete = features[features.isfinite().all(dim=1)]  # a flat block has no distribution to fit
    if len(complete) < 2:
        return None
    covariance = (parameters.covariance + torch.cov(complete.T)) / 2
    distance = parameters.mean - features.nanmean(dim=0)
    return (distance @ torch.linalg.pinv(covariance) @ distance).sqrt().item()  # eq. 10


def _normalised(image: Tensor, window: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised luma (eq. 1) of `image` (H, W), borders replicated."""
    margin = window.shape[0] // 2
    planes = F.pad(torch.stack((image, image.square())).unsqueeze(1), (margin,) * 4, mode="replicate")
    mean, square = F.conv2d(planes, window[None, None]).squeeze(1)
    return (image - mean) / ((square - mean.square()).abs().sqrt() + 1)


def _block_features(image: Tensor, side: int) -> Tensor:
    """The 18 features of each `side` x `side` block of the normalised `image`: (blocks, 18), NaN where undefined."""
    height, width = image.shape
    blocks = image.view(height // side, side, width // side, side).transpose(1, 2).reshape(-1, side, side)
    shape, left, right = _fit_asymmetric(blocks)
    features = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):  # products of neighbours in four directions
        shape, left, right = _fit_asymmetric(blocks * blocks.roll(shift, dims=(1, 2)))
        mean = (right - left) * (torch.lgamma(2 / shape) - torch.lgamma(1 / shape)).exp()  # eq. 8
        features += [shape, mean, left, right]
    return torch.stack(features, dim=1)


def _fit_asymmetric(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moment-matched asymmetric generalised Gaussian (eq. 7) of each block: shape, left and right scale, (blocks,)."""
    values = blocks.flatten(1)
    squares = values.square()
    left_std = (squares * (values < 0)).sum(1).div((values < 0).sum(1)).sqrt()
    right_std = (squares * (values > 0)).sum(1).div((values > 0).sum(1)).sqrt()
    skew = left_std / right_std
    ratio = values.abs().mean(1).square() / squares.mean(1)
    ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1).square()
    shapes, ratios = _shape_table()
    shape = shapes[(ratios - ratio.unsqueeze(1)).abs().argmin(dim=1)]
    scale = ((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2).exp()
    return shape, left_std * scale, right_std * scale


@cache
def _shape_table() -> tuple[Tensor, Tensor]:
    """Shapes 0.2 .. 10 in steps of 0.001 and the moment ratio of each."""
    shapes = torch.arange(200, 10001, dtype=torch.float64) / 1000
    return shapes, (2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)).exp()


def _from_hub() -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    network_error: Any = HfHubHTTPError.__bases__[0]  # the HTTP client's, which is another with each major version
    try:  # a cached copy needs no network
        return Path(hf_hub_download(HUB_REPO, HUB_FILE, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        get_hf_file_metadata(hf_hub_url(HUB_REPO, HUB_FILE))  # once; the download asks for half a minute
        return Path(hf_hub_download(HUB_REPO, HUB_FILE))
    except (OSError, network_error) as error:
        raise Unmeasurable(
            f"NIQE parameters cannot be downloaded: `{HUB_REPO}/{HUB_FILE}`",
            hint="give `--niqe-parameters` a local copy: `niqe_pris_params.npz` or `niqe_modelparameters.mat`",
        ) from error


def _read_npz(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return arrays["mu_pris_param"], arrays["cov_pris_param"], arrays["gaussian_window"]


def _read_mat(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise Unmeasurable("NIQE parameters in a .mat file need scipy", hint="pip install 'duovsr[eval]'") from error
    arrays = loadmat(io.BytesIO(data))
    offsets = np.arange(_WINDOW_SIDE) - _WINDOW_SIDE // 2
    taps = np.exp(-(offsets**2) / (2 * (_WINDOW_SIDE / 6) ** 2))  # the file leaves the window out
    window = np.outer(taps, taps)
    return arrays["mu_prisparam"], arrays["cov_prisparam"], window / window.sum()

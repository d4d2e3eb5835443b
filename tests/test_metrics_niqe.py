"""NIQE against figures of an independent implementation, and the reading of its parameters."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from duovsr.errors import InputError
from duovsr.metrics.meter import Unmeasurable
from duovsr.metrics.niqe import NiqeParameters, load_parameters, niqe


def gaussian_window() -> np.ndarray:
    taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    return np.outer(taps, taps) / np.outer(taps, taps).sum()


MEAN, COVARIANCE = np.linspace(0, 1, 36)[None], np.eye(36)
MADE_UP = NiqeParameters(
    torch.from_numpy(MEAN[0]), torch.from_numpy(COVARIANCE), torch.from_numpy(gaussian_window()), sha256=""
)


def texture(height: int, width: int, blur: int, seed: int) -> np.ndarray:
    """Noise, box-blurred by 2 `blur` + 1 pixels and stretched to 0..255."""
    noise = np.random.default_rng(seed).random((height + 2 * blur, width + 2 * blur, 3))
    shifts = range(-blur, blur + 1)
    total = sum(np.roll(noise, (dy, dx), (0, 1)) for dy in shifts for dx in shifts)
    total = total[blur : blur + height, blur : blur + width]
    return np.rint(255 * (total - total.min()) / (total.max() - total.min())).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((192, 288, 0, 1), 9.447650421523518),
        ((250, 310, 1, 2), 6.561959742667283),
        ((300, 200, 3, 3), 6.195255201319307),
    ],
)
def test_agrees_with_basicsr(image: tuple[int, int, int, int], expected: float) -> None:
    """Figures: BasicSR's `niqe` (commit 0b50532, numpy, scipy, OpenCV) run on these images with these parameters."""
    assert niqe(texture(*image), MADE_UP) == pytest.approx(expected, abs=1e-6)


def test_is_deterministic() -> None:
    image = texture(200, 200, 1, 4)
    assert niqe(image, MADE_UP) == niqe(image.copy(), MADE_UP)


def test_names_its_minimum_size() -> None:
    with pytest.raises(Unmeasurable, match=r"two 96x96 blocks .* not 191x191"):
        niqe(texture(191, 191, 0, 5), MADE_UP)


def test_flat_frames_have_no_score_and_flat_blocks_do_not_count() -> None:
    black = np.zeros((192, 288, 3), np.uint8)
    assert niqe(black, MADE_UP) is None
    black[:, :200] = texture(192, 200, 1, 6)
    assert niqe(black, MADE_UP) is not None


def test_reads_npz_and_mat_alike(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io", reason="the .mat form of the parameters needs scipy")
    npz, mat = tmp_path / "parameters.npz", tmp_path / "parameters.mat"
    np.savez(npz, mu_pris_param=MEAN, cov_pris_param=COVARIANCE, gaussian_window=gaussian_window())
    scipy_io.savemat(mat, {"mu_prisparam": MEAN, "cov_prisparam": COVARIANCE})
    first, second = load_parameters(npz), load_parameters(mat)
    for name in ("mean", "covariance", "window"):
        torch.testing.assert_close(getattr(first, name), getattr(MADE_UP, name))
        torch.testing.assert_close(getattr(second, name), getattr(MADE_UP, name))
    assert len(first.sha256) == 64
    assert first.sha256 != second.sha256


@pytest.mark.parametrize("name", ["text.npz", "text.mat", "keys.npz", "keys.mat", "shapes.npz"])
def test_rejects_other_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("not parameters, but text that is longer than the header of either format" * 4)
    elif name == "keys.mat":
        pytest.importorskip("scipy.io").savemat(path, {"mu": MEAN})
    elif name == "keys.npz":
        np.savez(path, mu=MEAN)
    else:
        np.savez(path, mu_pris_param=MEAN[:, 1:], cov_pris_param=COVARIANCE, gaussian_window=gaussian_window())
    with pytest.raises(InputError, match=f"not a NIQE parameter file: `.*{name}`"):
        load_parameters(path)


def test_a_missing_path_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read NIQE parameters: `.*absent.npz`: No such file"):
        load_parameters(tmp_path / "absent.npz")


def test_the_hub_is_asked_after_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "niqe_modelparameters.mat"
    pytest.importorskip("scipy.io").savemat(path, {"mu_prisparam": MEAN, "cov_prisparam": COVARIANCE})
    asked = []

    def download(repo: str, file: str, local_files_only: bool = False) -> str:
        asked.append((repo, file, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    torch.testing.assert_close(load_parameters().mean, MADE_UP.mean)
    source = ("chaofengc/IQA-PyTorch-Weights", "niqe_modelparameters.mat")
    assert asked == [(*source, True), (*source, False)]


def test_without_a_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, file: str, local_files_only: bool = False) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: download(url, ""))
    with pytest.raises(Unmeasurable, match="cannot be downloaded") as caught:
        load_parameters()
    assert "local copy" in (caught.value.hint or "")

"""Model files: whole or not at all; and what the shipped model does."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from duovsr import UpscaleOptions, Upscaler
from duovsr.errors import InputError, UsageError
from duovsr.video.reader import VideoReader
from duovsr.weights import check_files, load_model, save_model, sha256_of, weights_folder

SAMPLE = Path(__file__).parents[1] / "benchmarks" / "sample.mp4"
CPU = torch.device("cpu")


@pytest.fixture
def copied_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(weights_folder(), tmp_path / "weights")
    monkeypatch.setattr("duovsr.weights.weights_folder", lambda: tmp_path / "weights")
    return tmp_path / "weights"


def remake_manifest(folder: Path) -> None:
    files = {path.name: sha256_of(path) for path in (folder / "tiny").glob("*.safetensors")}
    (folder / "manifest.json").write_text(json.dumps({"tiny": files}))


def test_the_shipped_files_are_within_their_limits() -> None:
    files = list(weights_folder().rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    assert all(status.verified for status in check_files("tiny"))


def test_an_altered_file_is_refused(copied_weights: Path) -> None:
    path = copied_weights / "tiny" / "transformer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"does not match its sha256: .*transformer\.safetensors"):
        load_model("tiny", CPU, torch.float32)


def test_a_missing_file_is_refused(copied_weights: Path) -> None:
    (copied_weights / "tiny" / "vae.safetensors").unlink()
    with pytest.raises(InputError, match=r"is missing: .*vae\.safetensors"):
        load_model("tiny", CPU, torch.float32)


def test_an_exported_model_is_used_by_its_folder(copied_weights: Path) -> None:
    assert load_model(str(copied_weights / "tiny"), CPU, torch.float32).preset.name == "tiny"
    (copied_weights / "tiny" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="damaged model description"):
        load_model(str(copied_weights / "tiny"), CPU, torch.float32)
    with pytest.raises(UsageError, match="unknown model: `elsewhere`"):
        load_model("elsewhere", CPU, torch.float32)


def test_a_missing_or_foreign_tensor_is_refused(copied_weights: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copied_weights / "tiny" / "vae.safetensors"
    state = load_file(path)
    for change in ({"surplus": torch.zeros(1)}, {"latent_mean": None}):
        changed = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        save_file(changed, path)
        remake_manifest(copied_weights)
        with pytest.raises(InputError, match="not weights of this model"):
            load_model("tiny", CPU, torch.float32)


def test_an_unshipped_preset_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no weights for model `1\.3b`"):
        load_model("1.3b", CPU, torch.float32)


def test_saved_models_are_noted_in_the_manifest(tmp_path: Path) -> None:
    save_model(tmp_path, "one", "tiny", {"vae.safetensors": {"w": torch.ones(3)}})
    save_model(tmp_path, "two", "tiny", {"vae.safetensors": {"w": torch.zeros(3)}})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["one"]["vae.safetensors"] == sha256_of(tmp_path / "one" / "vae.safetensors")
    assert set(manifest) == {"one", "two"}


@pytest.fixture(scope="module")
def shipped() -> Upscaler:
    return Upscaler.from_preset("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def sample_frames() -> list[np.ndarray]:
    with VideoReader(SAMPLE) as reader:
        return [frame.pixels for frame in islice(iter(reader), 9)]


def upscaled(upscaler: Upscaler, frames: list[np.ndarray], options: UpscaleOptions) -> np.ndarray:
    floats = [frame.astype(np.float32) / 255 for frame in frames]
    return np.stack(list(upscaler.stream(floats, options)))


def high_band(frames: np.ndarray) -> np.ndarray:
    """What a 3x3 mean of (T, H, W, 3) leaves."""
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return (x - torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)).numpy()


def test_the_shipped_model_uses_its_noise(shipped: Upscaler, sample_frames: list[np.ndarray]) -> None:
    crop = [frame[40:130, 60:180] for frame in sample_frames[:5]]
    first, second = (high_band(upscaled(shipped, crop, UpscaleOptions(seed=seed))) for seed in (0, 1))
    assert np.abs(first - second).mean() > 0.02 * np.abs(first).mean()


def test_the_shipped_model_streams_as_it_runs_whole(shipped: Upscaler, sample_frames: list[np.ndarray]) -> None:
    crop = [frame[40:101, 60:151] for frame in sample_frames]
    whole = upscaled(shipped, crop, UpscaleOptions(scale=2, chunk=16))
    streamed = upscaled(shipped, crop, UpscaleOptions(scale=2, chunk=4))
    assert np.abs(whole - streamed).max() <= 1e-4


def test_tiles_of_the_shipped_model_show_no_seams(shipped: Upscaler, sample_frames: list[np.ndarray]) -> None:
    """Across the ends of the tiles' cross-fades, neighbouring pixels differ as much as they do without tiles."""
    frames = sample_frames[:1]
    whole, tiled = (upscaled(shipped, frames, UpscaleOptions(tile=tile)) for tile in (0, 512))
    assert 0 < np.abs(whole - tiled).mean() < 2e-3
    for axis, borders in ((1, (256, 512)), (2, (256, 512, 768, 1024))):
        other = (0, 3 - axis, 3)
        ratio = np.abs(np.diff(tiled, axis=axis)).mean(other) / np.abs(np.diff(whole, axis=axis)).mean(other)
        assert max(ratio[border - 1] for border in borders) <= 1.1


def test_bfloat16_stays_close_to_float32(shipped: Upscaler, sample_frames: list[np.ndarray]) -> None:
    crop = [frame[40:104, 60:156] for frame in sample_frames[:5]]
    half = Upscaler.from_preset("tiny", device="cpu", dtype="bfloat16")
    difference = upscaled(half, crop, UpscaleOptions()) - upscaled(shipped, crop, UpscaleOptions())
    assert np.sqrt(np.square(difference).mean()) < 2 / 255

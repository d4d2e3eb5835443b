"""Model files: whole or not at all; and what the shipped model does."""

from __future__ import annotations

import errno
import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from duovsr import UpscaleOptions, Upscaler
from duovsr.errors import InputError, UsageError
from duovsr.hub import export_repository, find_model
from duovsr.repository import CONFIG, FILES, MANIFEST, Model, describe, shipped_models, weights_folder, write_manifest
from duovsr.video.reader import VideoReader
from duovsr.weights import load_model, save_model

SAMPLE = Path(__file__).parents[1] / "benchmarks" / "sample.mp4"
CPU = torch.device("cpu")


@pytest.fixture
def copied_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(weights_folder(), tmp_path / "weights")
    monkeypatch.setattr("duovsr.repository.weights_folder", lambda: tmp_path / "weights")
    return tmp_path / "weights"


def remake_manifest(folder: Path) -> None:
    write_manifest(folder / MANIFEST, {name: folder / name for name in (CONFIG, *FILES)})


def test_the_shipped_files_are_within_their_limits() -> None:
    files = list(weights_folder().rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    (tiny,) = shipped_models()
    assert tiny.preset.name == tiny.name == "tiny"
    assert {status.path.name for status in tiny.check() if status.verified} == {CONFIG, *FILES}


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


def test_a_file_that_may_not_be_read_is_named(copied_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:  # as the system does, but root may read all
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("duovsr.repository.sha256_of", refuse)
    with pytest.raises(InputError, match=r"cannot read model file: `.*config\.json`: Permission denied"):
        load_model("tiny", CPU, torch.float32)


def test_an_exported_model_is_used_by_its_folder(copied_weights: Path) -> None:
    assert load_model(str(copied_weights / "tiny"), CPU, torch.float32).preset.name == "tiny"
    (copied_weights / "tiny" / MANIFEST).unlink()
    with pytest.raises(InputError, match="no model manifest") as caught:
        load_model(str(copied_weights / "tiny"), CPU, torch.float32)
    assert "duovsr train export" in str(caught.value.hint)
    with pytest.raises(UsageError, match="unknown model: `elsewhere`"):
        load_model("elsewhere", CPU, torch.float32)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "damaged model description"),
        ("[]", "damaged model description"),
        ('{"model_type": "t5"}', "not a model of duovsr"),
        ('{"library": "duovsr", "format": 2, "preset": "tiny"}', "made with a later duovsr"),
        ('{"library": "duovsr", "format": 1, "preset": "huge"}', "made with a later duovsr.*`huge`"),
        ('{"library": "duovsr", "format": 1, "preset": ["tiny"]}', "damaged model description"),
    ],
)
def test_a_description_of_something_else_is_refused(copied_weights: Path, config: str, words: str) -> None:
    (copied_weights / "tiny" / CONFIG).write_text(config)
    with pytest.raises(InputError, match=r"does not match its sha256: .*config\.json"):
        load_model("tiny", CPU, torch.float32)
    remake_manifest(copied_weights / "tiny")
    with pytest.raises(InputError, match=words):
        load_model("tiny", CPU, torch.float32)
    with pytest.raises(InputError, match=words):
        export_repository(find_model("tiny"), copied_weights / "out")
    assert not (copied_weights / "out").exists()


@pytest.mark.parametrize("exported", [False, True])
def test_a_model_that_ignores_the_lq_is_refused(copied_weights: Path, tmp_path: Path, exported: bool) -> None:
    """A text-to-video checkpoint as it is published, and one that was widened and exported without training."""
    folder = copied_weights / "tiny" if exported else tmp_path / "wan"
    state = load_file(copied_weights / "tiny" / FILES[0])
    if exported:
        state["patch_embedding.weight"][:, 16:] = 0
        save_file(state, folder / FILES[0])
        remake_manifest(folder)
    else:
        folder.mkdir()
        state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :16].contiguous()
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        (folder / CONFIG).write_text('{"_class_name": "WanModel"}')
    with pytest.raises(UsageError, match="ignores the video to upscale") as caught:
        load_model(str(folder), CPU, torch.float32)
    assert f"duovsr train recipe paper --init {folder} --data" in str(caught.value.hint)


def test_a_missing_or_foreign_tensor_is_refused(copied_weights: Path) -> None:
    path = copied_weights / "tiny" / "vae.safetensors"
    state = load_file(path)
    for change in ({"surplus": torch.zeros(1)}, {"latent_mean": None}):
        changed = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        save_file(changed, path)
        remake_manifest(copied_weights / "tiny")
        with pytest.raises(InputError, match="not weights of this model"):
            load_model("tiny", CPU, torch.float32)


def test_an_unshipped_preset_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no weights for model `1\.3b`"):
        load_model("1.3b", CPU, torch.float32)


def test_a_saved_model_replaces_another_whole_or_not_at_all(tmp_path: Path) -> None:
    def save(value: float) -> None:
        save_model(tmp_path, "tiny", {file: {"w": torch.full((3,), value)} for file in FILES})

    save(0.5)
    model = Model("mine", tmp_path, "again")
    model.require_verified()
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest[FILES[0]]["size"] == (tmp_path / FILES[0]).stat().st_size
    assert (tmp_path / CONFIG).read_text() == describe("tiny")
    with pytest.raises(AttributeError):
        save_model(tmp_path, "tiny", {FILES[0]: {"w": torch.ones(3)}, FILES[1]: {"w": None}})  # type: ignore[dict-item]
    model.require_verified()
    save(0.25)
    model.require_verified()
    assert json.loads((tmp_path / MANIFEST).read_text()) != manifest
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, CONFIG, *FILES}


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

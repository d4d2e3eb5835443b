"""Small random models that the tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from duovsr.engine.upscaler import Upscaler
from duovsr.model.layers import channels_last
from duovsr.model.one_step import OneStepModel
from duovsr.model.prompt import Prompt
from duovsr.model.tiny_vae import TinyVAE
from duovsr.model.transformer import Transformer
from duovsr.options import PRESETS, Preset, TinyVAEConfig, TransformerConfig, WindowConfig
from duovsr.train.stages import Job, resolve, run_job

SMALL = Preset(
    name="small",
    transformer=TransformerConfig(
        dim=32,
        ffn_dim=64,
        heads=2,
        layers=2,
        freq_dim=32,
        text_dim=16,
        text_length=4,
        window=WindowConfig(4, 4, past=1),
    ),
    vae=TinyVAEConfig(encoder_width=16, width_8=24, width_4=16, latent_blocks=1, blocks_8=2, blocks_4=1),
    shared_noise=0.5,
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    # Small tensors: two threads would spend their time waiting for each other.
    torch.set_num_threads(1)


def write_pool(folder: Path, samples: int = 8, frames: int = 9, side: int = 72, *, live: bool = False) -> Path:
    """A finished training pool of moving random textures, x2 and x4."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    canvas = torch.rand(samples, 3, side // 4 + 6, side // 4 + 6, generator=generator)
    canvas = torch.nn.functional.interpolate(canvas, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    hq = torch.stack([canvas[:, :, t : t + side, 2 * t : 2 * t + side] for t in range(frames)], dim=1)
    lq = torch.zeros(samples, frames, 3, side * 2 // 3, side * 2 // 3)
    scales = np.where(np.arange(samples) % 2 == 0, 4.0, 2.0).astype(np.float32)
    for row, scale in enumerate(scales):
        small = round(side / float(scale))
        lq[row, :, :, :small, :small] = torch.nn.functional.interpolate(hq[row], (small, small), mode="area")
    names = ("hq.npy",) if live else ("hq.npy", "lq.npy")
    for name, array in zip(names, (hq, lq), strict=False):
        np.save(folder / name, (array * 255).round().byte().movedim(2, -1).numpy())
    np.save(folder / "scale.npy", scales)
    return folder


@pytest.fixture(scope="session")
def training_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("data") / "pool")


def random_model() -> OneStepModel:
    """A random model whose output depends on everything: what is zero at first is filled."""
    torch.manual_seed(0)
    assert SMALL.vae is not None
    transformer, vae, prompt = Transformer(SMALL.transformer), TinyVAE(SMALL.vae), Prompt(SMALL.transformer)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.1)
    for told in (vae.decoder.scale_8, vae.decoder.scale_4):
        torch.nn.init.normal_(told.weight, std=0.01)
    for module in (transformer, vae, prompt):
        module.requires_grad_(False).eval()
    return OneStepModel(SMALL, transformer, channels_last(vae), prompt.positive[None], digest="random")


def run_stage(stage: str, out: Path, *settings: str, **job: Any) -> Path:
    """`duovsr train` for a single step. Returns `out`."""
    short = ("batch=2", "crop=32", "steps=1", "warmup=1", "dtype=float32", "device=cpu")
    described = Job(stage, out, **job)
    run_job(described, resolve(described, [*short, *settings]))
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """SMALL under the name of `tiny`."""
    monkeypatch.setitem(PRESETS, "tiny", SMALL)


@pytest.fixture(scope="session")
def base(training_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage `base` on `small_preset`."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL)
        run_stage("vae", folder / "vae", data=(training_pool,))
        return run_stage("base", folder / "base", data=(training_pool,), init=folder / "vae")


@pytest.fixture(scope="session")
def small_model() -> OneStepModel:
    return random_model()


@pytest.fixture(scope="session")
def small_upscaler(small_model: OneStepModel) -> Upscaler:
    return Upscaler(small_model)

"""The paper's system at reduced width: a three-layer preset shaped as `1.3b`, its random weights, and clips for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import seeded
import torch
from torch import Tensor

from duovsr.engine.upscaler import Upscaler
from duovsr.model.prompt import Prompt
from duovsr.model.resize import resize_frames
from duovsr.model.tiny_vae import TinyVAE
from duovsr.model.transformer import Transformer
from duovsr.model.wan_vae import WanVAE
from duovsr.options import PRESETS, Preset, TinyVAEConfig, TransformerConfig, UpscaleOptions, WanVAEConfig
from duovsr.repository import FILES, TINY_VAE
from duovsr.weights import save_model

LIGHT = TinyVAEConfig(encoder_width=16, width_8=24, width_4=16, latent_blocks=1, blocks_8=2, blocks_4=1)
VAE = WanVAEConfig(dim=4)
WAN = Preset(
    name="wan",
    transformer=TransformerConfig(dim=48, ffn_dim=64, heads=2, layers=3, text_dim=16, text_length=8),
    vae=VAE,
    tiny_vae=LIGHT,
    learned_prompt=False,
)
PLAIN = UpscaleOptions(scale=2, color="none")


@contextmanager
def saved(path: Path, *, light: bool = False) -> Iterator[Path]:
    """A model folder of random weights, as long as the preset is known; `light`: with a TinyVAE in it."""
    transformer, vae, prompt, small = Transformer(WAN.transformer), WanVAE(VAE), Prompt(WAN.transformer), TinyVAE(LIGHT)
    for module in (transformer, vae, small):
        seeded.fill(module)
    prompt.positive.data, prompt.null.data = seeded.normal(7, 2, 8, 16)
    parts = {name: module.state_dict() for name, module in zip(FILES, (transformer, vae, prompt), strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, WAN.name, WAN)
        save_model(path, WAN.name, {**parts, TINY_VAE: small.state_dict()} if light else parts)
        yield path


def moving(count: int, width: int = 32, height: int = 24) -> list[np.ndarray]:
    """Smooth texture that drifts by a pixel a frame, float32 in [0, 1]."""
    canvas = torch.rand(1, 3, height // 4 + 3, (width + count) // 4 + 3, generator=torch.Generator().manual_seed(0))
    canvas = torch.nn.functional.interpolate(canvas, scale_factor=4, mode="bilinear")[0].permute(1, 2, 0)
    return [np.ascontiguousarray(canvas[:height, i : i + width].numpy()) for i in range(count)]


def lq_frames(frames: list[np.ndarray]) -> Tensor:
    """As the model gets them, at twice the size."""
    x = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None] * 2 - 1
    return resize_frames(x, 2 * x.shape[3], 2 * x.shape[4])


def as_pixels(frames: Tensor) -> np.ndarray:
    return (frames[0].permute(1, 2, 3, 0).clamp(-1, 1) * 0.5 + 0.5).numpy()


def upscaled(upscaler: Upscaler, frames: list[np.ndarray], options: UpscaleOptions = PLAIN) -> np.ndarray:
    return np.stack(list(upscaler.stream(frames, options)))

"""Small random models that the tests share."""

from __future__ import annotations

import pytest
import torch

from duovsr.engine.upscaler import Upscaler
from duovsr.model.layers import channels_last
from duovsr.model.one_step import OneStepModel
from duovsr.model.prompt import Prompt
from duovsr.model.tiny_vae import TinyVAE
from duovsr.model.transformer import Transformer
from duovsr.options import Preset, TinyVAEConfig, TransformerConfig, WindowConfig

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


@pytest.fixture(scope="session")
def small_model() -> OneStepModel:
    """A random model whose output depends on everything: its zero-initialised head is filled."""
    torch.manual_seed(0)
    assert SMALL.vae is not None
    transformer, vae, prompt = Transformer(SMALL.transformer), TinyVAE(SMALL.vae), Prompt(SMALL.transformer)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.1)
    for module in (transformer, vae, prompt):
        module.requires_grad_(False).eval()
    return OneStepModel(SMALL, transformer, channels_last(vae), prompt.positive[None])


@pytest.fixture(scope="session")
def small_upscaler(small_model: OneStepModel) -> Upscaler:
    return Upscaler(small_model)

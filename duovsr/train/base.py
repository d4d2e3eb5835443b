"""The base model: LQ-conditioned flow matching in a frozen autoencoder's latents (paper section 3.1, eq. 1-2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from duovsr.model import flow
from duovsr.model.layers import channels_last
from duovsr.model.prompt import Prompt
from duovsr.model.tiny_vae import TinyVAE
from duovsr.model.transformer import Transformer
from duovsr.options import PRESETS, Preset
from duovsr.train.data import Pool
from duovsr.train.loop import LoopConfig, optimizer_step, run_loop
from duovsr.train.runs import load_weights


@dataclass(frozen=True)
class BaseTrainConfig:
    loop: LoopConfig = LoopConfig(steps=3000)
    learning_rate: float = 5e-4
    batch: int = 8
    crop: int = 192
    frames: int = 9
    shift: float = 2.0  # ours: the one-step student is only called at sigma 1
    prompt_dropout: float = 0.1


def load_vae(preset: Preset, folder: Path) -> TinyVAE:
    """A finished run's autoencoder, frozen."""
    assert preset.vae is not None
    vae = channels_last(TinyVAE(preset.vae))
    vae.load_state_dict(load_weights(folder, "vae"), strict=True)
    return vae.requires_grad_(False)


def shared_noise(latents: Tensor, shared: float) -> Tensor:
    """Training's draw of the noise that `flow.noise` makes at inference: `shared` of its variance is one field for
    all latent frames. latents: (B, C, T, H, W)."""
    common = torch.randn_like(latents[:, :, :1])
    return shared**0.5 * common + (1 - shared) ** 0.5 * torch.randn_like(latents)


def encode_pair(vae: TinyVAE, hq: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of HQ and LQ frames, float32, without gradient."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents, _ = vae.encode(torch.cat([hq, lq]))
    hq_latents, lq_latents = latents.float().chunk(2)
    return hq_latents, lq_latents


class PromptedTransformer(nn.Module):
    """A transformer and its condition tokens: what the stages train, copy and freeze as one."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.transformer = Transformer(preset.transformer)
        self.prompt = Prompt(preset.transformer)

    def forward(self, noisy: Tensor, lq: Tensor, sigma: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Velocity at sigma (B,) in [0, 1]."""
        tokens = self.prompt.tokens(noisy.shape[0], dropped)
        with torch.autocast("cpu", torch.bfloat16):
            velocity, _ = self.transformer(noisy, lq, flow.TIMESTEP_SCALE * sigma, tokens)
        return velocity


def train_base(pools: list[Path], init: Path, out: Path, config: BaseTrainConfig) -> None:
    """Train the preset's transformer from scratch on the autoencoder of run `init`; leaves `vae` and `model`."""
    preset = PRESETS["tiny"]
    torch.manual_seed(config.loop.seed)
    vae = load_vae(preset, init)
    base = PromptedTransformer(preset)
    optimizer = torch.optim.AdamW(base.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    pool = Pool(pools, config.loop.seed)

    def step(n: int) -> dict[str, Tensor]:
        hq, lq = pool.batch(n, config.batch, config.crop, config.frames)
        z0, z_lq = encode_pair(vae, hq, lq)
        eps = shared_noise(z0, preset.shared_noise)
        sigma = flow.shift_sigma(torch.rand(config.batch), config.shift)
        dropped = torch.rand(config.batch) < config.prompt_dropout
        velocity = base(flow.add_noise(z0, eps, sigma), z_lq, sigma, dropped)
        loss = (velocity - flow.velocity_target(z0, eps)).square().mean()  # eq. 2
        norm = optimizer_step(loss, optimizer, config.loop.clip)
        return {"loss": loss.detach(), "lq_error": (z0 - z_lq).square().mean(), "grad_norm": norm}

    modules, optimizers = {"model": base}, {"model": optimizer}
    run_loop(out, config.loop, modules, optimizers, step, config, ema_of=("model",), carried={"vae": vae})

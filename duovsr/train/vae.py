"""TinyVAE training: reconstruct HQ from its own latent and the degraded LQ (DESIGN section 2).

The hazards are a decoder that ignores the latent and a latent too fine for a small transformer to hit. So noise is
added to the latent while the decoder learns, and a part of every batch is decoded without a latent: that second path
is `--strength 0`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from duovsr.model.layers import channels_last
from duovsr.model.tiny_vae import TinyVAE
from duovsr.options import PRESETS
from duovsr.train.data import Pool
from duovsr.train.loop import LoopConfig, optimizer_step, run_loop
from duovsr.train.losses import charbonnier, gradient_loss, temporal_loss
from duovsr.train.runs import load_weights


@dataclass(frozen=True)
class VAETrainConfig:
    loop: LoopConfig = LoopConfig(steps=6000)
    learning_rate: float = 1e-3
    batch: int = 8
    crop: int = 96
    frames: int = 5
    latent_free: int = 2  # samples of the batch decoded without a latent
    latent_noise: float = 0.5  # largest standard deviation of the noise on the unit-variance latent
    gradient_weight: float = 0.5
    temporal_weight: float = 0.3
    statistics_momentum: float = 0.01


def reconstruction_loss(output: Tensor, target: Tensor, config: VAETrainConfig) -> Tensor:
    output = output.float()
    return (
        charbonnier(output, target)
        + config.gradient_weight * gradient_loss(output, target)
        + config.temporal_weight * temporal_loss(output, target)
    )


@torch.no_grad()
def update_statistics(vae: TinyVAE, latents: Tensor, momentum: float) -> None:
    """Move the normalisation of the latents towards what this batch shows (`latents` are normalised by the old one)."""
    raw = latents.float() * vae.latent_std.view(1, -1, 1, 1, 1) + vae.latent_mean.view(1, -1, 1, 1, 1)
    vae.latent_mean.lerp_(raw.mean((0, 2, 3, 4)), momentum)
    vae.latent_std.lerp_(raw.std((0, 2, 3, 4)).clamp_min(1e-3), momentum)


def train_vae(pools: list[Path], init: Path | None, out: Path, config: VAETrainConfig) -> None:
    """Train the preset's TinyVAE, from scratch or on from run `init`; `out/final.pt` holds `vae`."""
    preset = PRESETS["tiny"]
    assert preset.vae is not None
    torch.manual_seed(config.loop.seed)
    vae = channels_last(TinyVAE(preset.vae))
    if init is not None:
        vae.load_state_dict(load_weights(init, "vae"), strict=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    pool = Pool(pools, config.loop.seed)

    def step(n: int) -> dict[str, Tensor]:
        hq, lq = pool.batch(n, config.batch, config.crop, config.frames)
        with torch.autocast("cpu", torch.bfloat16):
            latents, _ = vae.encode(hq)
            sigma = config.latent_noise * torch.rand(config.batch, 1, 1, 1, 1)
            noisy = latents + sigma * torch.randn_like(latents)
            k = config.latent_free
            output, _ = vae.decode(noisy[k:], lq[k:])
            faithful, _ = vae.decode(None, lq[:k])
        loss_latent = reconstruction_loss(output, hq[k:], config)
        loss_free = reconstruction_loss(faithful, hq[:k], config)
        norm = optimizer_step(loss_latent + 0.3 * loss_free, optimizer, config.loop.clip)
        update_statistics(vae, latents.detach(), max(config.statistics_momentum, 1 / (n + 1)))
        with torch.no_grad():
            psnr = -10 * torch.log10((output.float().clamp(-1, 1) - hq[k:]).square().mean() / 4)
            psnr_free = -10 * torch.log10((faithful.float().clamp(-1, 1) - hq[:k]).square().mean() / 4)
            psnr_lq = -10 * torch.log10((lq.clamp(-1, 1) - hq).square().mean() / 4)
        return {
            "loss": loss_latent.detach(),
            "loss_free": loss_free.detach(),
            "psnr": psnr,
            "psnr_free": psnr_free,
            "psnr_lq": psnr_lq,
            "grad_norm": norm,
        }

    run_loop(out, config.loop, {"vae": vae}, {"vae": optimizer}, step, config, ema_of=("vae",))

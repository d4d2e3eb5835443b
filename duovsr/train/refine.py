"""Joint refinement of student and decoder in pixels (ours, not the paper's).

The decoder learns to restore from the student's latents instead of true ones, with a small adversarial loss; the
distilled student stays as an anchor, so that the noise keeps its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from duovsr.model import flow
from duovsr.model.layers import channels_last
from duovsr.options import PRESETS
from duovsr.train.base import PromptedTransformer, load_vae, shared_noise
from duovsr.train.data import Pool
from duovsr.train.loop import LoopConfig, optimizer_step, run_loop
from duovsr.train.losses import (
    PatchDiscriminator,
    charbonnier,
    gradient_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    temporal_loss,
)
from duovsr.train.runs import load_weights


@dataclass(frozen=True)
class RefineTrainConfig:
    loop: LoopConfig = LoopConfig(steps=2400)
    learning_rate: float = 5e-4
    discriminator_rate: float = 2e-4
    batch: int = 3
    crop: int = 128
    frames: int = 5
    gradient_weight: float = 0.5
    temporal_weight: float = 0.3
    adversarial_weight: float = 0.02
    adversarial_start: int = 1200  # step; pixels first: they are cheaper by a third, and settle the decoder
    discriminator_lead: int = 200  # steps that the discriminator learns alone before
    anchor_weight: float = 0.05
    faithful_weight: float = 0.3
    faithful_every: int = 4  # steps; the latent-free decode needs little and costs a fifth of a step


def train_refine(pools: list[Path], init: Path, out: Path, config: RefineTrainConfig) -> None:
    """Refine the one-step student and the decoder of run `init`; leaves `vae` and `model`."""
    preset = PRESETS["tiny"]
    torch.manual_seed(config.loop.seed)
    vae = load_vae(preset, init)
    vae.decoder.requires_grad_(True)
    anchor, student = PromptedTransformer(preset), PromptedTransformer(preset)
    for model in (anchor, student):
        model.load_state_dict(load_weights(init, "model"), strict=True)
    anchor.requires_grad_(False)
    discriminator = channels_last(PatchDiscriminator())
    trained = [*vae.decoder.parameters(), *student.parameters()]
    generator_optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    discriminator_optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=config.discriminator_rate, betas=(0.5, 0.99), weight_decay=0.0, fused=True
    )
    pool = Pool(pools, config.loop.seed)
    sigma = torch.ones(config.batch)

    def discriminator_step(hq: Tensor, lq: Tensor, output: Tensor) -> dict[str, Tensor]:
        discriminator.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            real, fake = discriminator(hq, lq), discriminator(output, lq)
        loss = hinge_discriminator_loss(real, fake)
        optimizer_step(loss, discriminator_optimizer, config.loop.clip)
        discriminator.requires_grad_(False)
        return {"discriminator": loss.detach(), "real": real.detach().mean(), "fake": fake.detach().mean()}

    def step(n: int) -> dict[str, Tensor]:
        hq, lq = pool.batch(n, config.batch, config.crop, config.frames)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z_lq, _ = vae.encode(lq)
            z_lq = z_lq.float()
        eps = shared_noise(z_lq, preset.shared_noise)
        x0 = flow.x0_from_velocity(eps, student(eps, z_lq, sigma), sigma)
        with torch.no_grad():
            x0_anchor = flow.x0_from_velocity(eps, anchor(eps, z_lq, sigma), sigma)
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = vae.decode(x0, lq)
        output = output.float()
        pixel = charbonnier(output, hq)
        loss = pixel + config.gradient_weight * gradient_loss(output, hq)
        loss = loss + config.temporal_weight * temporal_loss(output, hq)
        loss = loss + config.anchor_weight * (x0 - x0_anchor).square().mean()
        if n % config.faithful_every == 0:
            with torch.autocast("cpu", torch.bfloat16):
                faithful, _ = vae.decode(None, lq)
            loss = loss + config.faithful_weight * charbonnier(faithful.float(), hq)

        losses = {}
        if n >= config.adversarial_start - config.discriminator_lead:
            losses = discriminator_step(hq, lq, output.detach())
        if n >= config.adversarial_start:
            with torch.autocast("cpu", torch.bfloat16):
                adversarial = hinge_generator_loss(discriminator(output, lq))
            loss = loss + config.adversarial_weight * adversarial
            losses["adversarial"] = adversarial.detach()
        norm = optimizer_step(loss, generator_optimizer, config.loop.clip)
        with torch.no_grad():
            psnr = -10 * torch.log10((output.clamp(-1, 1) - hq).square().mean() / 4)
            psnr_lq = -10 * torch.log10((lq.clamp(-1, 1) - hq).square().mean() / 4)
        return {
            "pixel": pixel.detach(),
            "psnr_gain": psnr - psnr_lq,
            "anchor": (x0 - x0_anchor).square().mean().detach(),
            "grad_norm": norm,
            **losses,
        }

    modules = {"model": student, "vae": vae, "discriminator": discriminator}
    optimizers = {"generator": generator_optimizer, "discriminator": discriminator_optimizer}
    run_loop(out, config.loop, modules, optimizers, step, config, ema_of=("model", "vae"))

"""Joint refinement of student and decoder in pixels (ours, not the paper's).

The decoder learns to restore from the student's latents instead of true ones, and the student what the decoder can
use, with a small adversarial loss. Losses in pixels would teach the student to ignore its noise, so what a change of
noise does is held to what it did in the distilled student; what the LQ tells is free.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duovsr.model.layers import channels_last
from duovsr.model.tiny_vae import TinyVAE
from duovsr.train.distributed import place
from duovsr.train.draws import Draws
from duovsr.train.loop import Metrics, Run, Trained, run_loop
from duovsr.train.losses import (
    PatchDiscriminator,
    charbonnier,
    detail_loss,
    gradient_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    luma_and_color,
    psnr,
    psnr_loss,
    ssim_loss,
    temporal_loss,
)
from duovsr.train.motion import MotionEstimator
from duovsr.train.options import RefineConfig
from duovsr.train.recycle import recycle
from duovsr.train.roles import Inputs, diffusion_model, encode, ode_restore, one_step
from duovsr.train.validation import Validation

_LOOKED_AT = 24  # windows, to find what is dormant


class Refinement:
    def __init__(self, run: Run, config: RefineConfig, inputs: Inputs) -> None:
        self.run, self.config, self.preset, self.pool = run, config, inputs.preset, inputs.frames(config)
        torch.manual_seed(config.seed)
        vae = inputs.autoencoder(run)
        assert isinstance(vae, TinyVAE)  # `stages.resolve` refuses other presets
        self.vae = vae
        self.motion = MotionEstimator.maybe(config.temporal_weight)
        self._recycle()
        self.vae.decoder.requires_grad_(True)
        model = inputs.weights("model")
        self.anchor = place(diffusion_model(self.preset, model, run, trained=False), run.world)
        self.student = place(diffusion_model(self.preset, model, run, trained=True), run.world)
        place(self.vae, run.world)
        self.discriminator = place(channels_last(PatchDiscriminator()), run.world).eval()
        trained = [*self.vae.decoder.parameters(), *self.student.parameters()]
        self.optimizer = torch.optim.AdamW(
            trained, config.learning_rate, (config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), config.discriminator_rate, (0.5, 0.99), weight_decay=0.0, fused=True
        )

    def _recycle(self) -> None:
        """Put dormant features of the decoder back to use, the same on all ranks."""
        config = self.config
        if config.recycle > 0:
            draws = Draws.of(range(_LOOKED_AT), seed=config.seed, step=0, part=2, device=self.run.device)
            frames = self.pool.frames(draws, config.crop, config.frames)
            recycle(self.vae, frames.lq, frames.scale, config.recycle, torch.Generator().manual_seed(config.seed))

    def _restore(self, lq: Tensor, scale: Tensor, draws: Draws, step: int) -> tuple[Tensor, Tensor | None]:
        """The output (B, 3, T, H, W) and, every `noise_every` steps, how far the effect of two noises on the update's
        first sample left the anchor's: times the number of micro-batches where that sample is, as their mean is taken,
        0 elsewhere."""
        micro_batches = self.config.accumulate * self.run.world.size
        # A sharded model runs on all ranks or on none: they probe together, and one counts.
        due = step % self.config.noise_every == 0
        probed = int(due and draws.start < len(draws) * self.run.world.size)
        z_lq = encode(self.vae, lq, self.run)
        eps, other = (draws.normal_like(z_lq, self.preset.shared_noise) for _ in range(2))
        with self.run.autocast():
            x0 = one_step(self.student, torch.cat([eps, other[:probed]]), torch.cat([z_lq, z_lq[:probed]]))
            output, _ = self.vae.decode(x0[: len(draws)], lq, scale=scale)
        if not probed:
            return output.float(), x0.new_zeros(()) if due else None
        with torch.no_grad(), self.run.autocast():
            first, second = one_step(self.anchor, torch.cat([eps[:1], other[:1]]), torch.cat([z_lq[:1], z_lq[:1]]))
        drift = ((x0[0] - x0[-1]) - (first - second)).square().mean()
        return output.float(), drift * micro_batches if draws.start == 0 else drift * 0

    def loss(self, draws: Draws, step: int) -> tuple[Tensor, Metrics]:
        config = self.config
        hq, lq, scale = self.pool.frames(draws, config.crop, config.frames)
        output, drift = self._restore(lq, scale, draws, step)
        pair = luma_and_color(output), luma_and_color(hq)
        pixel = charbonnier(*pair)
        loss = pixel + config.gradient_weight * gradient_loss(*pair)
        loss = loss + config.psnr_weight * psnr_loss(output, hq)
        structure = ssim_loss(output, hq, config.ssim_scales)
        loss = loss + config.ssim_weight * structure
        noted = {"pixel": pixel, "ssim_loss": structure, "psnr_gain": psnr(output, hq) - psnr(lq, hq)}
        if self.motion is not None:
            noted["temporal_loss"] = temporal_loss(*pair, self.motion(hq))
            loss = loss + config.temporal_weight * noted["temporal_loss"]
        if config.detail_weight > 0:
            noted["detail_loss"] = detail_loss(output, hq)
            loss = loss + config.detail_weight * noted["detail_loss"]
        noted["loss"] = loss  # the terms that every step has
        if drift is not None:
            loss = loss + config.noise_weight * drift
            noted["noise_drift"] = drift
        if step % config.faithful_every == 0:
            with self.run.autocast():
                faithful, _ = self.vae.decode(None, lq, scale=scale)
            loss = loss + config.faithful_weight * charbonnier(luma_and_color(faithful.float()), pair[1])
        if step >= config.adversarial_start:
            self.discriminator.requires_grad_(False)
            with self.run.autocast():
                adversarial = hinge_generator_loss(self.discriminator(output, lq))
            self.discriminator.requires_grad_(True)
            loss = loss + config.adversarial_weight * adversarial
            noted["adversarial"] = adversarial
        if self._criticised(step):
            with self.run.autocast():
                real, fake = self.discriminator(hq, lq), self.discriminator(output.detach(), lq)
            criticism = hinge_discriminator_loss(real, fake)
            loss = loss + criticism  # no parameter is in both
            noted |= {"discriminator": criticism, "d_real": real.mean(), "d_fake": fake.mean()}
        return loss, noted

    def _criticised(self, step: int) -> bool:
        return step >= self.config.adversarial_start - self.config.discriminator_lead

    @torch.no_grad()
    def _move_norms(self) -> None:
        """One power iteration of the spectral norms: in a call of its own, so that micro-batches do not count."""
        blank = torch.zeros(1, 3, 1, 16, 16, device=self.run.device)
        self.discriminator.train()(blank, blank)
        self.discriminator.eval()

    def step(self, n: int) -> Metrics:
        if self._criticised(n):
            self._move_norms()
        optimizers = [self.optimizer, *([self.discriminator_optimizer] if self._criticised(n) else [])]
        return self.run.update(optimizers, lambda draws: self.loss(draws, n), n)


def train_refine(run: Run, config: RefineConfig, inputs: Inputs) -> None:
    """Refine the one-step student and the decoder of `inputs.init`; leaves `vae` and `model`."""
    refinement = Refinement(run, config, inputs)
    modules: dict[str, nn.Module] = {
        "model": refinement.student,
        "vae": refinement.vae,
        "discriminator": refinement.discriminator,
    }
    optimizers: dict[str, torch.optim.Optimizer] = {
        "model": refinement.optimizer,
        "discriminator": refinement.discriminator_optimizer,
    }
    restore = ode_restore(run, inputs.preset, refinement.vae, refinement.student, steps=1, shift=1.0)
    validate = Validation.maybe(run, inputs, restore)
    run_loop(run, Trained(modules, optimizers, ("model", "vae"), validate=validate), refinement.step)

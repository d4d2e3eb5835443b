"""TinyVAE training: reconstruct HQ from its latent and the degraded LQ (DESIGN section 2).

The hazards are a decoder that ignores the latent and a latent too fine for a small transformer to hit. So noise is
added to the latent while the decoder learns, and every few updates decode without a latent: that second path is
`--strength 0`.

The latent is its own, or, for a preset with a larger autoencoder, that one's: TinyVAE then learns to make and to decode
the latents that the preset's transformer knows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duovsr.model.layers import channels_last
from duovsr.model.tiny_vae import Decoder, Encoder, MemoryBlock, ResBlock, TinyVAE
from duovsr.options import Preset, TinyVAEConfig
from duovsr.train.data import Frames
from duovsr.train.distributed import mean_over_ranks, place
from duovsr.train.draws import Draws
from duovsr.train.loop import Metrics, Run, Trained, run_loop
from duovsr.train.losses import charbonnier, gradient_loss, luma_and_color, psnr, temporal_loss
from duovsr.train.motion import MotionEstimator
from duovsr.train.options import VAEConfig
from duovsr.train.roles import Inputs, decode, encode, fill
from duovsr.train.validation import Validation


def train_vae(run: Run, config: VAEConfig, inputs: Inputs) -> None:
    """Train the preset's TinyVAE, from scratch or on from `inputs.init`; leaves `vae`.

    Where the preset's autoencoder is another, which `inputs.init` has to bring: a `tiny_vae` for its latents.
    """
    pool, preset = inputs.frames(config), inputs.preset
    torch.manual_seed(config.seed)
    name, kind = _trained(preset)
    teacher = None if name == "vae" else inputs.autoencoder(run)
    vae = channels_last(TinyVAE(kind))
    if inputs.has(name) or (teacher is None and inputs.init is not None):
        fill(vae, inputs.weights(name), preset)
    else:
        vae.apply(_begin)
    place(vae, run.world)
    optimizer = run.adam(vae, config.learning_rate)
    moments: list[Tensor] = []
    motion = MotionEstimator.maybe(config.temporal_weight)

    def loss_of(draws: Draws) -> tuple[Tensor, Metrics]:
        hq, lq, scale = pool.frames(draws, config.crop, config.frames)
        noted: Metrics = {}
        with run.autocast():
            latents, _ = vae.encode(hq if teacher is None else torch.cat([hq, lq]))
            z = latents if teacher is None else encode(teacher, hq, run)
            sigma = config.latent_noise * draws.uniform().view(-1, 1, 1, 1, 1)
            output, _ = vae.decode(z + sigma * draws.normal_like(z), lq, scale=scale)
        loss = reconstruction_loss(output.float(), hq, motion, config)
        if teacher is None:
            moments.append(raw_moments(vae, latents))
        else:
            noted["latent"] = F.mse_loss(latents.float(), torch.cat([z, encode(teacher, lq, run)]))
            loss = loss + config.latent_weight * noted["latent"]
        return loss, {"loss": loss, **noted, "psnr": psnr(output.float(), hq), "psnr_lq": psnr(lq, hq)}

    def free_loss_of(draws: Draws) -> tuple[Tensor, Metrics]:
        hq, lq, scale = pool.frames(draws, config.crop, config.frames)
        with run.autocast():
            output, _ = vae.decode(None, lq, scale=scale)
        loss = reconstruction_loss(output.float(), hq, motion, config)
        return loss, {"loss_free": loss, "psnr_free": psnr(output.float(), hq), "psnr_lq": psnr(lq, hq)}

    def step(n: int) -> Metrics:
        if config.free_every and n % config.free_every == config.free_every - 1:
            return run.update([optimizer], free_loss_of, n)
        moments.clear()
        metrics = run.update([optimizer], loss_of, n)
        if teacher is not None:  # whose latents are normalised
            return metrics
        mean, square = mean_over_ranks(torch.stack(moments).mean(0), run.world)
        move_statistics(vae, mean, square, max(config.statistics_momentum, 1 / (n + 1)))
        return metrics

    def restore(frames: Frames, draws: Draws) -> Tensor:
        with run.autocast():
            latents, _ = vae.encode(frames.hq)
            return decode(vae, latents, frames)

    validate = Validation.maybe(run, inputs, restore)
    run_loop(run, Trained({name: vae}, {name: optimizer}, averaged=(name,), validate=validate), step)


def _trained(preset: Preset) -> tuple[str, TinyVAEConfig]:
    """What the stage leaves, by its name."""
    if isinstance(preset.vae, TinyVAEConfig):
        return "vae", preset.vae
    assert preset.tiny_vae is not None  # `stages.resolve` refuses other presets
    return "tiny_vae", preset.tiny_vae


@torch.no_grad()
def _begin(module: nn.Module) -> None:
    """Weights to start from, for `TinyVAE.apply`: parts before the whole.

    From torch's own, what the decoder adds to the LQ is noise at first; learning not to add it lets its features die,
    and the latents never come to matter. So nothing is added at first, features keep their size (He et al., 2015),
    residual branches start small, and the encoder looks at differences, which are what the LQ lacks.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, MemoryBlock):
        module.current.weight.mul_(0.5**0.5)  # two convolutions in one sum
        module.previous.weight.mul_(0.5**0.5)
        module.out.weight.mul_(0.1)
    elif isinstance(module, ResBlock):
        module.second.weight.mul_(0.1)
    elif isinstance(module, Encoder):
        module.conv_in.weight.sub_(module.conv_in.weight.mean((1, 2, 3), keepdim=True))
    elif isinstance(module, Decoder):
        nn.init.zeros_(module.conv_out.weight)


def reconstruction_loss(output: Tensor, target: Tensor, motion: MotionEstimator | None, config: VAEConfig) -> Tensor:
    pair = luma_and_color(output), luma_and_color(target)
    loss = charbonnier(*pair) + config.gradient_weight * gradient_loss(*pair)
    return loss if motion is None else loss + config.temporal_weight * temporal_loss(*pair, motion(target))


@torch.no_grad()
def raw_moments(vae: TinyVAE, latents: Tensor) -> Tensor:
    """Mean and mean square (2, C) of what the encoder gave before its normalisation."""
    raw = latents.float() * vae.latent_std.view(1, -1, 1, 1, 1) + vae.latent_mean.view(1, -1, 1, 1, 1)
    return torch.stack([raw.mean((0, 2, 3, 4)), raw.square().mean((0, 2, 3, 4))])


@torch.no_grad()
def move_statistics(vae: TinyVAE, mean: Tensor, square: Tensor, momentum: float) -> None:
    """Move the latents' normalisation towards what this step showed."""
    vae.latent_mean.lerp_(mean, momentum)
    vae.latent_std.lerp_((square - mean.square()).clamp_min(1e-6).sqrt(), momentum)

"""The base model: LQ-conditioned flow matching in a frozen autoencoder's latents (paper section 3.1, eq. 1-2)."""

from __future__ import annotations

import torch
from torch import Tensor

from duovsr.model import flow
from duovsr.train.distributed import place
from duovsr.train.draws import Draws
from duovsr.train.loop import Metrics, Run, Trained, run_loop
from duovsr.train.options import BaseConfig
from duovsr.train.roles import DiffusionModel, Inputs, LatentSource, fill, ode_restore
from duovsr.train.validation import Validation


def train_base(run: Run, config: BaseConfig, inputs: Inputs) -> None:
    """Train the preset's transformer on the autoencoder of `inputs.init`, from scratch or on from its `model`; leaves
    `vae` and `model`.

    Presets that learn their condition tokens see the positive ones with HQ of at least `sharpness` only, so that they
    come to mean "sharp" and guidance (eq. 4) points there; all others stand for everything, by dropout.
    """
    vae, preset = inputs.autoencoder(run), inputs.preset
    torch.manual_seed(config.seed)
    base = DiffusionModel(preset)
    if inputs.has("model"):
        fill(base, inputs.weights("model"), preset)
    base.transformer.checkpointing = config.checkpointing
    place(base, run.world, config.dtype)
    optimizer = run.adam(base, config.learning_rate)
    train_latents = inputs.latents(run, vae)

    def loss_of(draws: Draws, source: LatentSource = train_latents) -> tuple[Tensor, Metrics]:
        z0, z_lq, sharpness = source.latents(draws)
        eps = draws.normal_like(z0, preset.shared_noise)
        sigma = flow.shift_sigma(draws.uniform(), config.shift)
        dropped = draws.uniform() < config.prompt_dropout
        if preset.learned_prompt:
            dropped |= sharpness < config.sharpness
        with run.autocast():
            velocity = base(flow.add_noise(z0, eps, sigma), z_lq, sigma, dropped)
        loss = (velocity - flow.velocity_target(z0, eps)).square().mean()  # eq. 2
        return loss, {"loss": loss, "lq_error": (z0 - z_lq).square().mean()}

    def step(n: int) -> Metrics:
        return run.update([optimizer], loss_of, n)

    held_out = inputs.held_out_latents(run, vae)
    validate = Validation.maybe(
        run,
        inputs,
        ode_restore(run, preset, vae, base, steps=8, shift=config.shift),
        None if held_out is None else lambda draws: loss_of(draws, held_out)[0],
    )
    trained = Trained({"model": base}, {"model": optimizer}, ("model",), {"vae": vae}, validate)
    run_loop(run, trained, step)

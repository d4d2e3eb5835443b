"""Stage I, progressive guided distillation (paper section 3.3): guidance into the weights, then 64 steps into one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duovsr.model import flow
from duovsr.train.distributed import local
from duovsr.train.draws import Draws
from duovsr.train.loop import Metrics, Run, Trained, forget, run_loop
from duovsr.train.options import CFGConfig, ProgressiveConfig
from duovsr.train.roles import Inputs, LatentSource, guided_velocity, ode_restore, placed_model
from duovsr.train.validation import Validation


def train_cfg(run: Run, config: CFGConfig, inputs: Inputs) -> None:
    """Distil guidance (eq. 4): one call of the student does what two of the teacher do. Leaves `vae` and `model`."""
    vae, preset = inputs.autoencoder(run), inputs.preset
    teacher = placed_model(preset, inputs.weights("model"), run, trained=False)
    student = placed_model(preset, inputs.weights("model"), run, trained=True)
    optimizer = run.adam(student, config.learning_rate)
    train_latents = inputs.latents(run, vae)

    def loss_of(draws: Draws, source: LatentSource = train_latents) -> tuple[Tensor, Metrics]:
        z0, z_lq, _ = source.latents(draws)
        eps = draws.normal_like(z0, preset.shared_noise)
        sigma = flow.shift_sigma(draws.uniform(), config.shift)
        noisy = flow.add_noise(z0, eps, sigma)
        with run.autocast():
            with torch.no_grad():
                target = guided_velocity(teacher, noisy, z_lq, sigma, config.guidance)  # v_cfg
            velocity = student(noisy, z_lq, sigma)
        loss = (velocity - target).square().mean()  # eq. 4
        return loss, {"loss": loss}

    def step(n: int) -> Metrics:
        return run.update([optimizer], loss_of, n)

    held_out = inputs.held_out_latents(run, vae)
    validate = Validation.maybe(
        run,
        inputs,
        ode_restore(run, preset, vae, student, steps=8, shift=config.shift),
        None if held_out is None else lambda draws: loss_of(draws, held_out)[0],
    )
    trained = Trained({"model": student}, {"model": optimizer}, ("model",), {"vae": vae}, validate)
    run_loop(run, trained, step)


def two_teacher_steps(
    teacher: nn.Module, noisy: Tensor, z_lq: Tensor, sigma: Tensor, middle: Tensor, end: Tensor
) -> Tensor:
    """z~_{t''}: two Euler steps of the teacher, t -> t' -> t''; sigma, middle, end: (B,)."""
    z = flow.euler_step(noisy, teacher(noisy, z_lq, sigma), sigma, middle)
    return flow.euler_step(z, teacher(z, z_lq, middle), middle, end)


def grid_point(index: Tensor, n: int, shift: float) -> Tensor:
    """Sigma at `index` (0 .. n, halves allowed) of the shifted grid of n sampling steps."""
    return flow.shift_sigma(index / n, shift)


def train_progressive(run: Run, config: ProgressiveConfig, inputs: Inputs) -> None:
    """Halve the sampling steps round by round (eq. 5), `config.start` -> 1; after a round the teacher is the student.

    Leaves `vae`, the one-step `model`, and as `score` the many-step model it began with: stage II's score models.
    """
    vae, preset = inputs.autoencoder(run), inputs.preset
    weights = inputs.weights("model")
    score = placed_model(preset, weights, run, trained=False)
    teacher = placed_model(preset, weights, run, trained=False)
    student = placed_model(preset, weights, run, trained=True)
    optimizer = run.adam(student, config.learning_rate)
    train_latents = inputs.latents(run, vae)

    def loss_of(draws: Draws, n: int) -> tuple[Tensor, Metrics]:
        z0, z_lq, _ = train_latents.latents(draws)
        eps = draws.normal_like(z0, preset.shared_noise)
        index = (draws.uniform() * n).floor() + 1  # 1 .. n
        sigma, middle, end = (grid_point(index - back, n, config.shift) for back in (0.0, 0.5, 1.0))
        noisy = flow.add_noise(z0, eps, sigma)
        with run.autocast():
            with torch.no_grad():
                target = two_teacher_steps(teacher, noisy, z_lq, sigma, middle, end)
            velocity = student(noisy, z_lq, sigma)
        distance = (sigma - end).view(-1, 1, 1, 1, 1)
        error = velocity - (noisy - target) / distance  # v - v*: eq. 5 without its factor
        if config.weighting == "paper":
            error = error * distance
        loss = error.square().mean()
        return loss, {"loss": loss, "student_steps": torch.tensor(float(n))}

    def step(n: int) -> Metrics:
        finished, within = divmod(n, config.steps)
        if within == 0:
            forget(optimizer)  # each round is a training of its own
            if finished > 0:
                copy_weights(student, teacher)
        return run.update([optimizer], lambda draws: loss_of(draws, config.start >> (finished + 1)), n)

    validate = Validation.maybe(run, inputs, ode_restore(run, preset, vae, student, steps=1, shift=config.shift))
    trained = Trained(
        {"model": student, "teacher": teacher},
        {"model": optimizer},
        ("model",),
        {"vae": vae, "score": score},
        validate,
        total=config.steps * config.rounds,
        period=config.steps,
    )
    run_loop(run, trained, step)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    for mine, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        local(mine).copy_(local(theirs))

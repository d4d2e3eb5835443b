"""Stage II, dual-stream distillation (paper section 3.4, Algorithm 1): distribution matching and RFS-GAN together.

Roles: `student`, trained; `real_score`, frozen; `fake_score`, trained to follow the student's distribution; the
discriminator's `heads`, trained on features of both score models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duovsr.model import flow
from duovsr.train.distributed import place, set_trained
from duovsr.train.draws import Draws
from duovsr.train.loop import Metrics, Run, Trained, run_loop
from duovsr.train.losses import hinge_discriminator_loss, hinge_generator_loss
from duovsr.train.options import DualConfig
from duovsr.train.rfs_gan import Features, Heads, ScorePair, feature_channels
from duovsr.train.roles import Inputs, ode_restore, one_step, placed_model
from duovsr.train.validation import Validation


def dmd_gradient(x0: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """The normalised gradient of eq. 3 and 7 (DMD): (x_F - x_R) / mean |x0 - x_R|, the mean over each sample."""
    scale = (x0 - x0_real).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-6)
    return (x0_fake - x0_real) / scale


def dmd_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """E |x0 - sg[x0 - Grad]|^2 / 2 of eq. 7: its gradient with respect to x0 is Grad over the number of elements."""
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


def matching_loss(fake: Features, real: Features) -> Tensor:
    """L_FM of eq. 8: mean squared distance of features, over taps and models."""
    return torch.stack([F.mse_loss(f, r.detach()) for f, r in zip(fake, real, strict=True)]).mean()


def draw_sigma(draws: Draws, config: DualConfig) -> Tensor:
    """Uniform, shifted towards noise, clamped (DMD2)."""
    return flow.shift_sigma(draws.uniform(), config.shift).clamp(*config.sigma_range)


class DualStream:
    """The updates of Algorithm 1 on one set of roles."""

    def __init__(self, run: Run, config: DualConfig, inputs: Inputs) -> None:
        self.run, self.config, self.preset = run, config, inputs.preset
        every = 1 if config.count == "student" else config.auxiliary + 1
        self.total = max(1, config.steps // every)  # student updates
        self.vae = inputs.autoencoder(run)
        self.source = inputs.latents(run, self.vae)
        score = inputs.weights("score" if inputs.has("score") else "model")
        torch.manual_seed(config.seed)
        preset = self.preset
        self.student = placed_model(preset, inputs.weights("model"), run, trained=True)
        self.fake_score = placed_model(preset, score, run, trained=True)
        self.real_score = placed_model(preset, score, run, trained=False)
        self.scores = ScorePair(self.real_score, self.fake_score, config.features)
        channels = feature_channels(preset.transformer.dim, config.features)
        self.heads = place(Heads(channels, config.head_width), run.world)
        self.student_optimizer = run.adam(self.student, config.learning_rate)
        self.fake_optimizer = run.adam(self.fake_score, config.fake_rate)
        self.head_optimizer = run.adam(self.heads, config.head_rate)

    def streams(self, step: int) -> tuple[bool, bool]:
        """Whether DMD and the GAN are on at a step (Table 4)."""
        config = self.config
        if config.streams == "sequential":
            return step < self.total // 2, step >= self.total // 2
        return config.streams != "gan", config.streams != "dmd"

    def _eps(self, draws: Draws, x0: Tensor) -> Tensor:
        return draws.normal_like(x0, self.preset.shared_noise)

    @torch.no_grad()
    def _truth_features(self, z0: Tensor, z_lq: Tensor, sigma: Tensor, eps: Tensor) -> Features:
        """The one pass that the GAN adds to DMD: the real sample, noised as the student's is, or clean."""
        if self.config.discriminator_input == "clean":
            return self.scores(z0, torch.zeros_like(sigma), z_lq)[2]
        return self.scores(flow.add_noise(z0, eps, sigma), sigma, z_lq)[2]

    def _student_features(self, x0: Tensor, z_lq: Tensor, features: Features) -> Features:
        """The student's features: those of the scores' pass, or for the ablation of section 8 of its clean output."""
        if self.config.discriminator_input == "clean":
            return self.scores(x0, torch.zeros(x0.shape[0], device=x0.device), z_lq)[2]
        return features

    def auxiliary_update(self, step: int, part: int) -> Metrics:
        """(i) the fake score on the student's samples (eq. 6), (ii) the heads on features without gradient (eq. 8)."""
        gan = self.streams(step)[1]
        optimizers = [self.fake_optimizer, *([self.head_optimizer] if gan else [])]
        return self.run.update(optimizers, lambda draws: self._auxiliary_loss(draws, gan), step, part)

    def _auxiliary_loss(self, draws: Draws, gan: bool) -> tuple[Tensor, Metrics]:
        z0, z_lq, _ = self.source.latents(draws)
        with torch.no_grad(), self.run.autocast():
            x0 = one_step(self.student, self._eps(draws, z0), z_lq)
        sigma, eps = draw_sigma(draws, self.config), self._eps(draws, z0)
        noisy = flow.add_noise(x0, eps, sigma)
        with self.run.autocast():
            if gan:
                _, v_fake, features = self.scores(noisy, sigma, z_lq)
            else:
                v_fake = self.fake_score(noisy, z_lq, sigma)
            diffusion = (v_fake - flow.velocity_target(x0, eps)).square().mean()  # eq. 6
            noted = {"fake_score": diffusion}
            if not gan:
                return diffusion, noted
            with torch.no_grad():
                fake = tuple(f.detach() for f in self._student_features(x0, z_lq, features))
            d_real, d_fake = self.heads(self._truth_features(z0, z_lq, sigma, eps)), self.heads(fake)
        heads = torch.stack([hinge_discriminator_loss(r, f) for r, f in zip(d_real, d_fake, strict=True)]).mean()
        noted |= {
            "heads": heads,
            "d_real": torch.stack([r.mean() for r in d_real]).mean(),
            "d_fake": torch.stack([f.mean() for f in d_fake]).mean(),
        }
        return diffusion + heads, noted  # no parameter is in both

    def student_update(self, step: int) -> Metrics:
        for module in (self.fake_score, self.heads):
            set_trained(module, False)
        metrics = self.run.update([self.student_optimizer], lambda draws: self._student_loss(draws, step), step)
        for module in (self.fake_score, self.heads):
            set_trained(module, True)
        return metrics

    def _student_loss(self, draws: Draws, step: int) -> tuple[Tensor, Metrics]:
        """L_S = L_DMD + 0.1 L_G + 0.05 L_FM, from one pass of the student's noised sample through both score models."""
        config = self.config
        dmd, gan = self.streams(step)
        z0, z_lq, _ = self.source.latents(draws)
        with self.run.autocast():
            x0 = one_step(self.student, self._eps(draws, z0), z_lq)
            sigma, eps = draw_sigma(draws, config), self._eps(draws, z0)
            noisy = flow.add_noise(x0, eps, sigma)
            with torch.set_grad_enabled(gan and config.discriminator_input == "noised"):
                v_real, v_fake, features = self.scores(noisy, sigma, z_lq, config.guidance)
            loss = x0.new_zeros(())
            noted = {"error": (x0 - z0).square().mean()}
            if gan:
                features = self._student_features(x0, z_lq, features)
                adversarial = torch.stack([hinge_generator_loss(d) for d in self.heads(features)]).mean()
                matching = matching_loss(features, self._truth_features(z0, z_lq, sigma, eps))
                loss = config.gan_weight * adversarial + config.matching_weight * matching
                noted |= {"adversarial": adversarial, "matching": matching}
        if dmd:
            x0_real, x0_fake = (flow.x0_from_velocity(noisy, v, sigma).detach() for v in (v_real, v_fake))
            gradient = dmd_gradient(x0.detach(), x0_real, x0_fake)
            loss = loss + config.dmd_weight * dmd_loss(x0, gradient)
            noted["dmd_gradient"] = gradient.abs().mean()
        return loss, noted


def train_dual(run: Run, config: DualConfig, inputs: Inputs) -> None:
    """Algorithm 1: N auxiliary updates, then one of the student. Leaves `vae`, `model` and the real `score`."""
    dual = DualStream(run, config, inputs)

    def step(n: int) -> Metrics:
        metrics: Metrics = {}
        for k in range(config.auxiliary):
            metrics |= dual.auxiliary_update(n, part=k + 1)
        return metrics | dual.student_update(n)

    modules: dict[str, nn.Module] = {"model": dual.student, "fake_score": dual.fake_score, "heads": dual.heads}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "model": dual.student_optimizer,
        "fake_score": dual.fake_optimizer,
        "heads": dual.head_optimizer,
    }
    restore = ode_restore(run, inputs.preset, dual.vae, dual.student, steps=1, shift=config.shift)
    carried: dict[str, nn.Module] = {"vae": dual.vae, "score": dual.real_score}
    validate = Validation.maybe(run, inputs, restore)
    run_loop(run, Trained(modules, optimizers, ("model",), carried, validate, total=dual.total), step)

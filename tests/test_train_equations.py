"""What the stages compute, against the equations written out a second time: targets, weights, and gradients that
arrive. (Each function alone: `test_train_maths.py`.)"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from duovsr.model import flow
from duovsr.train.draws import Draws
from duovsr.train.loop import Metrics, Run
from duovsr.train.memory import roles_of
from duovsr.train.options import DualConfig, StageConfig
from duovsr.train.rfs_gan import ScorePair, feature_channels
from duovsr.train.roles import guided_velocity, ode_solution
from duovsr.train.runs import load_weights
from duovsr.train.stage1 import grid_point, two_teacher_steps
from duovsr.train.stage2 import DualStream, dmd_gradient
from duovsr.train.stage3 import flow_dpo_loss, velocity_error
from tests import toy

ROLES = ("student", "fake_score", "real_score", "heads")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (4, 3, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_random_run(tmp_path_factory.mktemp("run"))


def first_batch(config: StageConfig, out: Path) -> tuple[Draws, Tensor, Tensor, Tensor]:
    """What a stage sees in its first step: random numbers, z0, z_lq and noise."""
    (draws,) = Run(out, config, toy.ALONE).micro_batches(0)
    z0, z_lq, _ = toy.ToyPool(poor=0.0).latents(draws)
    return draws, z0, z_lq, draws.normal_like(z0)


# Eq. 2 and stage I


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_flow_losss_optimum_is_the_conditional_velocity(t: float) -> None:
    """Of data N(m, s^2), E[eps - z0 | z_t] is a line in z_t: least squares on eq. 2 must find it."""
    m, s, count = 0.7, 0.4, 1000
    columns = torch.cat([torch.ones(count, 1, dtype=torch.float64), normal(0, count, 2)], 1)
    exact = torch.linalg.qr(columns).Q[:, 1:] * math.sqrt(count)  # sample moments are those of N(0, 1), to the digit
    z0, eps = (column.reshape(-1, 1, 1, 1, 1) for column in (m + s * exact[:, 0], exact[:, 1]))
    noisy = flow.add_noise(z0, eps, torch.full((count,), t, dtype=torch.float64)).flatten()
    design = torch.stack([noisy, torch.ones_like(noisy)], 1)
    slope, offset = torch.linalg.lstsq(design, flow.velocity_target(z0, eps).flatten()[:, None]).solution.flatten()
    expected = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
    assert slope.item() == pytest.approx(expected, abs=1e-9)
    assert offset.item() == pytest.approx(-m - expected * (1 - t) * m, abs=1e-9)


def test_the_cfg_stage_starts_at_w_squared_of_the_guidance(run: Path, tmp_path: Path) -> None:
    config = toy.configure("cfg", 0, steps=1, batch=8, guidance=1.5)
    (loss,) = toy.losses(toy.run_stage(config, "cfg", tmp_path / "cfg", run))
    draws, z0, z_lq, eps = first_batch(config, tmp_path)
    sigma = flow.shift_sigma(draws.uniform(), toy.SHIFT)
    noisy, null = flow.add_noise(z0, eps, sigma), torch.ones(8, dtype=torch.bool)
    model = toy.load(run)
    difference = model(noisy, z_lq, sigma) - model(noisy, z_lq, sigma, null)  # the student starts as the teacher
    assert loss == pytest.approx(1.5**2 * difference.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("weighting", ["velocity", "paper"])
def test_the_progressive_stage_has_eq_5_in_both_forms(weighting: str, run: Path, tmp_path: Path) -> None:
    config = toy.configure("progressive", 0, steps=1, batch=8, start=8, weighting=weighting)
    loss = toy.losses(toy.run_stage(config, "progressive", tmp_path / "progressive", run))[0]
    draws, z0, z_lq, eps = first_batch(config, tmp_path)
    index = (4 * draws.uniform()).floor() + 1
    t, t1, t2 = (grid_point(index - back, 4, toy.SHIFT) for back in (0.0, 0.5, 1.0))
    noisy, model = flow.add_noise(z0, eps, t), toy.load(run)
    as_printed = flow.euler_step(noisy, model(noisy, z_lq, t), t, t2)
    as_printed = as_printed - two_teacher_steps(model, noisy, z_lq, t, t1, t2)
    distance = 1.0 if weighting == "paper" else (t - t2).view(-1, 1, 1, 1, 1)
    assert loss == pytest.approx((as_printed / distance).square().mean().item(), rel=1e-4)


def test_perfect_students_of_a_round_end_where_the_teacher_does() -> None:
    class Field(nn.Module):
        def forward(self, noisy: Tensor, lq: Tensor, sigma: Tensor) -> Tensor:
            return torch.sin(3 * noisy) + sigma.view(-1, 1, 1, 1, 1)

    n, shift, eps = 4, 3.0, normal(0).float()
    z = eps
    for i in range(n, 0, -1):
        t, t1, t2 = (grid_point(torch.full((4,), i - back), n, shift) for back in (0.0, 0.5, 1.0))
        z = two_teacher_steps(Field(), z, z, t, t1, t2)
    assert_close(z, ode_solution(Field(), eps, eps, 2 * n, shift))


# Stage II


def test_dmd_leads_from_the_students_distribution_to_the_teachers() -> None:
    """With the exact scores of N(0, 1), the student's, and of N(2, 1)."""
    t = torch.tensor([0.1, 0.4, 0.7, 0.98], dtype=torch.float64).view(-1, 1, 1, 1, 1)
    x0 = normal(0)
    noisy = flow.add_noise(x0, normal(1), t.flatten())
    variance = (1 - t) ** 2 + t**2
    real, fake = (mean + (1 - t) / variance * (noisy - (1 - t) * mean) for mean in (2.0, 0.0))
    score_difference = 2 * (1 - t) / variance * torch.ones_like(noisy)
    assert_close((1 - t) / t**2 * (real - fake), score_difference)  # s_real - s_fake of eq. 3
    assert (dmd_gradient(x0, real, fake) < 0).all()  # a descent moves x0 up, to 2
    assert dmd_gradient(x0, x0, fake).isfinite().all()


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@torch.no_grad()
def test_features_come_from_the_passes_that_give_the_scores(guidance: float) -> None:
    models = {"real": toy.random_model(0), "fake": toy.random_model(1)}
    noisy, z_lq, sigma = normal(0).float(), normal(1).float(), torch.tensor([0.1, 0.4, 0.7, 0.98])
    seen: dict[str, list[Tensor]] = {"real": [], "fake": []}
    for name, model in models.items():
        for block in model.transformer.blocks:  # all three are tapped
            block.register_forward_hook(lambda _, __, output, kept=seen[name]: kept.append(output[0].movedim(-1, 1)))
    for used, names in (("both", ("real", "fake")), ("real", ("real",)), ("fake", ("fake",))):
        scores = ScorePair(models["real"], models["fake"], used)
        v_real, v_fake, features = scores(noisy, sigma, z_lq, guidance)
        for i, feature in enumerate(features):
            assert_close(feature, torch.cat([seen[name][i] for name in names], 1))
            assert feature.shape[1] == feature_channels(toy.PRESET.transformer.dim, used)
        for kept in seen.values():
            kept.clear()
        assert_close(v_fake, models["fake"](noisy, z_lq, sigma))
        assert_close(v_real, guided_velocity(models["real"], noisy, z_lq, sigma, guidance))
        for kept in seen.values():
            kept.clear()


def dual_stream(run: Path, **settings: object) -> DualStream:
    config = toy.configure("dual", 0, batch=8, **settings)
    assert isinstance(config, DualConfig)
    dual = DualStream(Run(run, config, toy.ALONE), config, toy.ToyInputs(toy.PRESET, init=load_weights(run)))
    # Away from fake = real, where DMD has no gradient.
    nn.init.normal_(dual.fake_score.transformer.head.head.weight, std=0.1)
    return dual


def student_loss(dual: DualStream) -> tuple[Tensor, Metrics]:
    return dual._student_loss(next(iter(dual.run.micro_batches(0))), 0)


def student_gradient(dual: DualStream) -> list[Tensor]:
    """With respect to each of the student's parameters, 0 for the null prompt."""
    parameters = list(dual.student.parameters())
    gradients = torch.autograd.grad(student_loss(dual)[0], parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [{"streams": name} for name in ("joint", "dmd", "gan", "sequential")]
    + [{"guidance": 1.0}, {"streams": "dmd", "guidance": 1.0}, {"discriminator_input": "clean"}],
    ids=str,
)
def test_the_plan_counts_the_passes_that_are_made(run: Path, settings: dict[str, object]) -> None:
    dual = dual_stream(run, **settings)
    passes: list[bool] = []
    for role in ROLES[:3]:
        model = getattr(dual, role)
        model.transformer.register_forward_pre_hook(
            lambda module, _: passes.append(torch.is_grad_enabled() and next(module.parameters()).requires_grad)
        )
    steps = (0, dual.total - 1)  # of `sequential` one of each half
    for step in steps:
        for part in range(dual.config.auxiliary):
            dual.auxiliary_update(step, part + 1)
        dual.student_update(step)
    roles = roles_of("dual", dual.config)
    assert roles is not None
    assert sum(passes) == len(steps) * roles.backward
    assert len(passes) == len(steps) * (roles.forward + roles.backward + roles.through)


def test_roles_freeze_visibly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dual = dual_stream(run)

    def trainable() -> set[str]:
        flags = {name: {p.requires_grad for p in getattr(dual, name).parameters()} for name in ROLES}
        assert all(len(values) == 1 for values in flags.values())
        return {name for name, values in flags.items() if values == {True}}

    during: list[set[str]] = []
    loss_of: Callable[[Draws, int], tuple[Tensor, Metrics]] = dual._student_loss

    def noting(draws: Draws, step: int) -> tuple[Tensor, Metrics]:
        during.append(trainable())
        return loss_of(draws, step)

    monkeypatch.setattr(dual, "_student_loss", noting)
    assert trainable() == {"student", "fake_score", "heads"}
    dual.student_update(0)
    assert during == [{"student"}]
    assert trainable() == {"student", "fake_score", "heads"}


def test_the_students_loss_is_the_papers_sum(run: Path) -> None:
    loss, noted = student_loss(dual_stream(run))
    dmd, _ = student_loss(dual_stream(run, streams="dmd"))
    assert_close(loss, 1.0 * dmd + 0.1 * noted["adversarial"] + 0.05 * noted["matching"])
    parts = [student_gradient(dual_stream(run, streams=streams)) for streams in ("dmd", "gan")]
    for both, *each in zip(student_gradient(dual_stream(run)), *parts, strict=True):
        assert_close(both, each[0] + each[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("discriminator_input", ["noised", "clean"])
def test_the_gans_gradient_arrives_whole(discriminator_input: str, run: Path) -> None:
    """The slope of L_G + L_FM along its own gradient, by finite difference: nothing between is cut off."""
    dual = dual_stream(run, streams="gan", discriminator_input=discriminator_input, gan_weight=1.0, matching_weight=1.0)
    gradient = student_gradient(dual)
    norm = torch.cat([g.flatten() for g in gradient]).norm().item()

    @torch.no_grad()
    def after(step: float) -> float:
        for p, g in zip(dual.student.parameters(), gradient, strict=True):
            p.add_(g, alpha=step / norm)
        return student_loss(dual)[0].item()

    difference = after(0.01) - after(-0.02)  # from there back past where it began
    assert difference / 0.02 == pytest.approx(norm, rel=0.03)


@pytest.mark.parametrize(("discriminator_input", "depends"), [("noised", True), ("clean", False)])
def test_the_discriminator_sees_noised_or_clean_samples(discriminator_input: str, depends: bool, run: Path) -> None:
    dual = dual_stream(run, discriminator_input=discriminator_input)
    z0, z_lq, eps = (normal(i).float() for i in range(3))
    few, many = (dual._truth_features(z0, z_lq, torch.full((4,), sigma), eps)[0] for sigma in (0.2, 0.8))
    assert torch.equal(few, many) != depends


# Stage III


def test_dpos_gradient_where_student_and_reference_agree() -> None:
    chosen, rejected, eps, velocity = (normal(i) for i in range(4))
    mine = velocity.clone().requires_grad_()
    errors = [(velocity_error(mine, x0, eps), velocity_error(velocity, x0, eps).detach()) for x0 in (chosen, rejected)]
    loss, _ = flow_dpo_loss(errors[0], errors[1], beta=100.0)
    loss.backward()
    # sigmoid(0) beta / 2 d(|v - v^w|^2 - |v - v^l|^2), means over the batch and a sample's elements
    expected = 0.5 * 50 * 2 * (chosen - rejected) / eps[0].numel() / len(eps)
    assert mine.grad is not None
    assert_close(mine.grad, expected)

"""The stages' equations against closed forms and finite differences, in float64; who is trained and who is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from duovsr.model import flow
from duovsr.options import Preset
from duovsr.train.data import Latents
from duovsr.train.distributed import World
from duovsr.train.draws import Draws
from duovsr.train.loop import Run
from duovsr.train.losses import hinge_discriminator_loss, hinge_generator_loss
from duovsr.train.options import DualConfig
from duovsr.train.rfs_gan import tapped_blocks
from duovsr.train.roles import DiffusionModel, Inputs, guided_velocity
from duovsr.train.stage1 import grid_point, two_teacher_steps
from duovsr.train.stage2 import DualStream, dmd_gradient, dmd_loss, matching_loss
from duovsr.train.stage3 import flow_dpo_loss, velocity_error
from tests.conftest import SMALL

CPU = torch.device("cpu")
SHAPE = (2, 3, 2, 4, 4)


def latents(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class GaussianFlow(nn.Module):
    """The exact velocity of data N(0, spread^2), twice as far from the prompt as without it."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, noisy: Tensor, lq: Tensor, sigma: Tensor, dropped: Tensor | None = None) -> Tensor:
        t = sigma.view(-1, 1, 1, 1, 1)
        v = noisy * (t - (1 - t) * self.spread**2) / (t**2 + (1 - t) ** 2 * self.spread**2)
        return v if dropped is None else torch.where(dropped.view(-1, 1, 1, 1, 1), 0.5 * v, v)

    def solution(self, noisy: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
        """Where the ODE carries z: its deviation stays the marginal's."""
        deviation = [(t**2 + (1 - t) ** 2 * self.spread**2).sqrt().view(-1, 1, 1, 1, 1) for t in (sigma, end)]
        return noisy * deviation[1] / deviation[0]


def test_the_velocity_of_a_sample_leads_back_to_it() -> None:
    x0, eps = latents(0), latents(1)
    sigma = torch.tensor([0.3, 0.9], dtype=torch.float64)
    noisy, v = flow.add_noise(x0, eps, sigma), flow.velocity_target(x0, eps)
    torch.testing.assert_close(flow.x0_from_velocity(noisy, v, sigma), x0)
    torch.testing.assert_close(flow.euler_step(noisy, v, sigma, torch.zeros(2, dtype=torch.float64)), x0)


def test_guidance_goes_beyond_the_prompt() -> None:
    model, z, sigma = GaussianFlow(0.5), latents(0), torch.tensor([0.4, 0.8], dtype=torch.float64)
    plain = model(z, z, sigma)
    torch.testing.assert_close(guided_velocity(model, z, z, sigma, 0.0), plain)
    torch.testing.assert_close(guided_velocity(model, z, z, sigma, 3.0), 4 * plain - 3 * 0.5 * plain)  # eq. 4


def test_the_students_grid_lies_on_the_teachers() -> None:
    for n in (1, 4, 32):
        index = torch.arange(n + 1, dtype=torch.float64)
        torch.testing.assert_close(grid_point(index, n, 5.0), grid_point(2 * index, 2 * n, 5.0))
        middle = grid_point(index[1:] - 0.5, n, 5.0)
        torch.testing.assert_close(middle, grid_point(2 * index[1:] - 1, 2 * n, 5.0))
    assert grid_point(torch.tensor(1.0), 1, 5.0) == 1.0


def test_two_teacher_steps_follow_the_ode() -> None:
    model, z = GaussianFlow(0.5), latents(0)
    errors = []
    for n in (8, 16, 32):
        sigma, middle, end = (torch.full((2,), (4 * n / 8 - back) / n, dtype=torch.float64) for back in (0.0, 0.5, 1.0))
        reached = two_teacher_steps(model, z, z, sigma, middle, end)
        errors.append((reached - model.solution(z, sigma, end)).abs().max().item())
        # v* of a student's one step is where two steps went, over the distance: eq. 5 without its factor.
        v = (z - reached) / (sigma - end).view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(flow.euler_step(z, v, sigma, end), reached)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # Euler: second order a step


def test_the_dmd_loss_has_the_normalised_gradient() -> None:
    x0, real, fake = (latents(n) for n in range(3))
    x0.requires_grad_(True)
    gradient = dmd_gradient(x0.detach(), real, fake)
    for sample in range(2):
        expected = (fake[sample] - real[sample]) / (x0[sample] - real[sample]).abs().mean()
        torch.testing.assert_close(gradient[sample], expected.detach())
    dmd_loss(x0, gradient).backward()
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, gradient / x0.numel())
    # Descending moves from the fake score's estimate to the real one's.
    assert (gradient * (fake - real)).sum() > 0


def test_hinge_and_matching_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert hinge_discriminator_loss(real, fake) == 0.25 + 0.75
    assert hinge_generator_loss(fake) == 0.75
    mine, truth = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    matching_loss((mine,), (truth,)).backward()
    assert truth.grad is None
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, 2 * (mine - truth).detach() / mine.numel())


def test_the_dpo_loss_and_its_gradient() -> None:
    chosen, rejected, reference = (torch.rand(4, dtype=torch.float64) for _ in range(3))
    zero, margin = flow_dpo_loss((reference, reference), (reference, reference), 100.0)
    assert zero.item() == pytest.approx(0.6931471805599453)
    assert not margin.any()

    def loss(student: Tensor) -> Tensor:
        return flow_dpo_loss((student, chosen), (rejected, reference), 5.0)[0]

    student = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (student,))
    better, worse = loss(student - 0.1), loss(student + 0.1)  # a smaller error on the chosen one is preferred
    assert better < loss(student) < worse
    x0, eps = latents(0), latents(1)
    assert velocity_error(eps - x0, x0, eps).abs().max() == 0


def test_the_paper_taps_blocks_9_18_and_27_of_30() -> None:
    assert tapped_blocks(30) == (8, 17, 26)
    assert tapped_blocks(6) == (1, 3, 4)


class Clusters:
    """Latents of two kinds for the same LQ."""

    def latents(self, draws: Draws) -> Latents:
        z_lq = draws.normal_like(torch.zeros(len(draws), 16, 2, 4, 4))
        side = (draws.uniform() < 0.5).float().view(-1, 1, 1, 1, 1) * 2 - 1
        return Latents(z_lq + side, z_lq, torch.full((len(draws),), 1000.0))


class ToyInputs(Inputs):
    def autoencoder(self, run: Run) -> Any:
        return nn.Identity()

    def latents(self, run: Run, vae: nn.Module) -> Any:
        return Clusters()


@pytest.fixture
def dual(tmp_path: Path) -> DualStream:
    return make_dual(tmp_path, DualConfig(batch=2, dtype="float32", head_width=8, learning_rate=1e-3))


def make_dual(out: Path, config: DualConfig, preset: Preset = SMALL) -> DualStream:
    torch.manual_seed(0)
    score = DiffusionModel(preset)
    nn.init.normal_(score.transformer.head.head.weight, std=0.1)
    init = {"model": score.state_dict(), "vae": {}}
    return DualStream(Run(out, config, World(0, 1, CPU)), config, ToyInputs(preset, init=init))


def weights(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def changed(module: nn.Module, before: list[Tensor]) -> bool:
    return any(not torch.equal(now, then) for now, then in zip(module.state_dict().values(), before, strict=True))


def test_each_update_of_algorithm_1_moves_its_own_roles_only(dual: DualStream) -> None:
    roles = {"student": dual.student, "real": dual.real_score, "fake": dual.fake_score, "heads": dual.heads}
    before = {name: weights(module) for name, module in roles.items()}
    dual.auxiliary_update(0, part=1)
    assert {name for name, module in roles.items() if changed(module, before[name])} == {"fake", "heads"}
    before = {name: weights(module) for name, module in roles.items()}
    dual.student_update(0)
    assert {name for name, module in roles.items() if changed(module, before[name])} == {"student"}
    assert not any(p.requires_grad for p in dual.real_score.parameters())
    assert all(p.requires_grad for p in dual.fake_score.parameters())


def test_the_heads_loss_reaches_no_score_model(dual: DualStream) -> None:
    gradients = []
    for gan in (True, False):
        dual.fake_score.zero_grad(set_to_none=True)
        draws = Draws.of(range(2), seed=0, step=0, part=1, device=CPU)
        dual._auxiliary_loss(draws, gan)[0].backward()
        gradients.append([p.grad for p in dual.fake_score.parameters() if p.grad is not None])
    for with_heads, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_heads, without, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "noted", "missing"),
    [
        ({"streams": "dmd"}, {"dmd_gradient"}, {"adversarial", "matching"}),
        ({"streams": "gan"}, {"adversarial", "matching"}, {"dmd_gradient"}),
        ({"streams": "joint"}, {"dmd_gradient", "adversarial", "matching"}, set()),
        ({"features": "real"}, {"adversarial"}, set()),
        ({"features": "fake"}, {"adversarial"}, set()),
        ({"discriminator_input": "clean"}, {"adversarial", "dmd_gradient"}, set()),
    ],
)
def test_ablation_switches(tmp_path: Path, settings: dict[str, str], noted: set[str], missing: set[str]) -> None:
    config = replace(DualConfig(batch=2, dtype="float32", head_width=8), **settings)  # type: ignore[arg-type]
    dual = make_dual(tmp_path, config)
    dual.auxiliary_update(0, part=1)
    metrics = dual.student_update(0)
    assert noted <= set(metrics)
    assert not missing & set(metrics)
    channels = dual.heads.heads[0][0].num_channels  # type: ignore[index,union-attr]
    assert channels == SMALL.transformer.dim * (2 if config.features == "both" else 1)


def test_sequential_is_dmd_and_then_the_gan(tmp_path: Path) -> None:
    dual = make_dual(tmp_path, DualConfig(steps=10, streams="sequential", dtype="float32", head_width=8))
    assert [dual.streams(n) for n in (0, 4, 5, 9)] == [(True, False), (True, False), (False, True), (False, True)]

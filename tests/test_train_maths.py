"""The stages' equations against closed forms and finite differences, in float64 (stage II's roles: test_train_dual)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from duovsr.model import flow
from duovsr.train.losses import hinge_discriminator_loss, hinge_generator_loss
from duovsr.train.roles import guided_velocity
from duovsr.train.stage1 import grid_point, two_teacher_steps
from duovsr.train.stage2 import dmd_gradient, dmd_loss, matching_loss
from duovsr.train.stage3 import flow_dpo_loss, velocity_error

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


def test_the_flow_loss_is_least_at_the_mean_velocity() -> None:
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

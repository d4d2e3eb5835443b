"""Joint refinement: its losses do not know how a batch is cut into micro-batches and over processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duovsr.model.one_step import new_autoencoder
from duovsr.train.data import Pool
from duovsr.train.distributed import World
from duovsr.train.loop import Run
from duovsr.train.losses import PatchDiscriminator, psnr
from duovsr.train.options import RefineConfig
from duovsr.train.refine import Refinement
from duovsr.train.roles import DiffusionModel, Inputs
from tests.conftest import SMALL

CPU = torch.device("cpu")
CONFIG = RefineConfig(
    batch=2, crop=32, dtype="float32", device="cpu", clip=1e9, noise_weight=1.0, adversarial_start=0,
    adversarial_weight=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(training_pool: Path) -> Inputs:
    torch.manual_seed(0)
    model = DiffusionModel(SMALL)
    torch.nn.init.normal_(model.transformer.head.head.weight, std=0.1)
    init = {"vae": new_autoencoder(SMALL.vae).state_dict(), "model": model.state_dict()}
    return Inputs(SMALL, Pool([training_pool]), init=init)


def refinement(inputs: Inputs, config: RefineConfig, world: World, out: Path) -> Refinement:
    """Past its first steps: the student has left the anchor."""
    made = Refinement(Run(out, config, world), config, inputs)
    with torch.no_grad():
        for n, parameter in enumerate(made.student.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))
    return made


def gradients(made: Refinement) -> list[Tensor]:
    modules = (made.student, made.vae.decoder, made.discriminator)
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


def test_micro_batches_change_nothing(inputs: Inputs, tmp_path: Path) -> None:
    whole, parts = (refinement(inputs, replace(CONFIG, accumulate=n), World(0, 1, CPU), tmp_path) for n in (1, 2))
    noted = [made.step(0) for made in (whole, parts)]
    for name in noted[0].keys() - {"grad_norm"}:
        torch.testing.assert_close(noted[1][name], noted[0][name], rtol=0, atol=1e-5, msg=name)
    assert noted[0]["noise_drift"] > 1e-3
    assert len(gradients(whole)) > 50
    for mine, theirs in zip(gradients(parts), gradients(whole), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_processes_change_nothing(inputs: Inputs, tmp_path: Path) -> None:
    """Two ranks by hand, without the sharding: the mean of their gradients."""
    made = [refinement(inputs, CONFIG, World(rank, size, CPU), tmp_path) for rank, size in ((0, 1), (0, 2), (1, 2))]
    noted = [each.step(0) for each in made]
    for name in ("noise_drift", "psnr_gain"):
        mean = (noted[1][name] + noted[2][name]) / 2
        torch.testing.assert_close(mean, noted[0][name], rtol=0, atol=1e-5, msg=name)
    for alone, first, second in zip(*map(gradients, made), strict=True):
        torch.testing.assert_close((first + second) / 2, alone, rtol=0, atol=1e-6)


def test_the_discriminator_sees_the_frame_before() -> None:
    torch.manual_seed(0)
    critic, (frames, lq) = PatchDiscriminator().eval(), torch.rand(2, 1, 3, 3, 16, 16)
    other = frames.clone()
    other[:, :, 1] = torch.rand(3, 16, 16)  # the second frame alone
    with torch.no_grad():
        first, second, third = critic(other, lq) - critic(frames, lq)
    assert not first.any()
    assert second.abs().max() > 1e-4
    assert third.abs().max() > 1e-4


def test_frames_without_an_error_do_not_drown_the_others() -> None:
    """As black ones, clamped."""
    target = torch.zeros(2, 3, 1, 4, 4)
    output = target + torch.tensor([0.0, 0.2]).view(2, 1, 1, 1, 1)
    assert psnr(output, target).item() == pytest.approx((100 + 20) / 2)

"""A simple one-step start: the student learns where the base model's ODE carries each noise (trajectory-preserving).

The target is a deterministic function of (eps, z_lq), so the student keeps using its noise: it samples detail, it does
not average it away. Section 3.3 of the paper does the same in halving rounds with guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from duovsr.model import flow
from duovsr.options import PRESETS
from duovsr.train.base import PromptedTransformer, encode_pair, load_vae, shared_noise
from duovsr.train.data import Pool
from duovsr.train.loop import LoopConfig, optimizer_step, run_loop
from duovsr.train.runs import load_weights


@dataclass(frozen=True)
class OneStepTrainConfig:
    loop: LoopConfig = LoopConfig(steps=1500)
    learning_rate: float = 2e-4
    batch: int = 8
    crop: int = 192
    frames: int = 9
    teacher_steps: int = 4
    shift: float = 2.0


@torch.no_grad()
def ode_solution(teacher: PromptedTransformer, eps: Tensor, z_lq: Tensor, steps: int, shift: float) -> Tensor:
    """Euler from sigma 1 to 0 on the shifted grid: the teacher's x0 for this noise."""
    grid = flow.shift_sigma(torch.linspace(1, 0, steps + 1), shift)
    z = eps
    for sigma, following in zip(grid, grid[1:], strict=False):
        velocity = teacher(z, z_lq, sigma.expand(z.shape[0]))
        z = z - (sigma - following) * velocity
    return z


def train_one_step(pools: list[Path], init: Path, out: Path, config: OneStepTrainConfig) -> None:
    """Distil the base model of run `init` into one step; leaves `vae` and `model`."""
    preset = PRESETS["tiny"]
    torch.manual_seed(config.loop.seed)
    vae = load_vae(preset, init)
    teacher, student = PromptedTransformer(preset), PromptedTransformer(preset)
    for model in (teacher, student):
        model.load_state_dict(load_weights(init, "model"), strict=True)
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    pool = Pool(pools, config.loop.seed)

    def step(n: int) -> dict[str, Tensor]:
        hq, lq = pool.batch(n, config.batch, config.crop, config.frames)
        z0, z_lq = encode_pair(vae, hq, lq)
        eps = shared_noise(z0, preset.shared_noise)
        target = ode_solution(teacher, eps, z_lq, config.teacher_steps, config.shift)
        sigma = torch.ones(config.batch)
        x0 = flow.x0_from_velocity(eps, student(eps, z_lq, sigma), sigma)
        loss = (x0 - target).square().mean()
        norm = optimizer_step(loss, optimizer, config.loop.clip)
        return {"loss": loss.detach(), "target_variance": target.var(), "grad_norm": norm}

    modules, optimizers = {"model": student}, {"model": optimizer}
    run_loop(out, config.loop, modules, optimizers, step, config, ema_of=("model",), carried={"vae": vae})

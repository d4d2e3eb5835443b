"""A problem on which every stage runs in seconds, with a truth that can be drawn from at will.

A "clip" is one latent (3, 1, 4, 4). The LQ is a smooth field; the truth adds stripes, horizontal or vertical, of one
sign or the other: four modes, equally likely, whose mean is the LQ itself. What regresses to the mean is plainly wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duovsr.model.tiny_vae import TinyVAE, VAEState
from duovsr.options import Preset, TinyVAEConfig, TransformerConfig
from duovsr.train.base import train_base
from duovsr.train.data import Frames, Latents, PairPool, Pool
from duovsr.train.distributed import World
from duovsr.train.draws import Draws
from duovsr.train.loop import Run
from duovsr.train.options import (
    BaseConfig,
    CFGConfig,
    DPOConfig,
    DualConfig,
    PrefsConfig,
    ProgressiveConfig,
    StageConfig,
)
from duovsr.train.roles import DiffusionModel, Inputs, frozen, ode_solution, one_step
from duovsr.train.runs import FINAL, load_weights, save_atomically
from duovsr.train.stage1 import train_cfg, train_progressive
from duovsr.train.stage2 import train_dual
from duovsr.train.stage3 import build_pairs, train_dpo

PRESET = Preset(
    name="toy",
    transformer=TransformerConfig(
        dim=64, ffn_dim=128, heads=2, layers=3, latent_channels=3, freq_dim=64, text_dim=16, text_length=2
    ),
    vae=TinyVAEConfig(),  # not used: see `ToyVAE`
)
SIDE = 4
SHIFT = 2.0
TEACHER_STEPS = 64
NOISE = 0.05  # of the truth, on every element
POOR, POOR_NOISE = 0.3, 0.3  # part of the base model's data that is grainy: what guidance leads away from
SCALE = 4.0  # latents over frames
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)

_ROWS = torch.tensor([1.0, -1.0]).repeat(SIDE // 2).view(SIDE, 1).expand(SIDE, SIDE)
MODES = torch.stack([_ROWS, -_ROWS, _ROWS.T, -_ROWS.T])

Sample = Callable[[Tensor, Tensor], Tensor]  # noise and LQ -> z0


def draw_lq(draws: Draws) -> Tensor:
    coarse = 0.5 * draws.normal_like(torch.zeros(len(draws), 3, 1, 2, 2))
    return F.interpolate(coarse[:, :, 0], (SIDE, SIDE), mode="bilinear", align_corners=True)[:, :, None]


def centres(z_lq: Tensor) -> Tensor:
    """The modes (B, 4, C, T, H, W): a bright field has stronger stripes."""
    gain = 0.6 + 0.6 * torch.sigmoid(3 * z_lq.mean((1, 2, 3, 4)))
    return z_lq[:, None] + gain.view(-1, 1, 1, 1, 1, 1) * MODES[:, None, None]


def draw_truth(draws: Draws, z_lq: Tensor) -> Tensor:
    mode = (4 * draws.uniform()).long()
    return centres(z_lq)[torch.arange(len(mode)), mode] + NOISE * draws.normal_like(z_lq)


class ToyPool(Pool):
    """Pairs as latents for the stages, and as frames for the rankers."""

    def __init__(self, poor: float) -> None:
        self.poor, self.sources = poor, frozenset[str]()

    def latents(self, draws: Draws) -> Latents:
        z_lq = draw_lq(draws)
        z0, poor = draw_truth(draws, z_lq), (draws.uniform() < self.poor).float()
        z0 = z0 + POOR_NOISE * poor.view(-1, 1, 1, 1, 1) * draws.normal_like(z_lq)
        return Latents(z0, z_lq, sharpness=1 - poor)

    def frames(self, draws: Draws, crop: int, frames: int) -> Frames:
        z0, z_lq, _ = self.latents(draws)
        return Frames(z0 / SCALE, z_lq / SCALE, torch.full((len(z0),), 4.0))


class ToyVAE(TinyVAE):
    """Without weights: frames are latents at another scale."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def encode(self, frames: Tensor, state: VAEState | None = None) -> tuple[Tensor, VAEState]:
        return SCALE * frames, VAEState(())

    def decode(
        self, latents: Tensor | None, lq: Tensor, state: VAEState | None = None, *, scale: float | Tensor
    ) -> tuple[Tensor, VAEState]:
        assert latents is not None
        return latents / SCALE, VAEState(())


def clarity(z: Tensor) -> Tensor:
    """(B,): how strong the strongest of the four patterns is."""
    return torch.einsum("bcthw,mhw->bm", z, MODES).amax(1)


class Clarity:
    """A ranker that looks at the output alone."""

    name = "clarity"
    higher_is_better = True

    def __call__(self, output: Tensor, hq: Tensor) -> float:
        return clarity(output).item()

    def describe(self) -> dict[str, object]:
        return {}


@dataclass(frozen=True)
class ToyInputs(Inputs):
    poor: float = 0.0

    def frames(self, config: StageConfig) -> Pool:
        return ToyPool(self.poor)

    def autoencoder(self, run: Run) -> TinyVAE:
        return ToyVAE()

    def latents(self, run: Run, vae: nn.Module) -> ToyPool:
        return ToyPool(self.poor)


TRAINERS: dict[str, Callable[..., None]] = {
    "base": train_base,
    "cfg": train_cfg,
    "progressive": train_progressive,
    "dual": train_dual,
    "prefs": build_pairs,
    "dpo": train_dpo,
}
SETTINGS: dict[str, StageConfig] = {
    "base": BaseConfig(steps=600, batch=128, learning_rate=5e-3, sharpness=0.5, shift=SHIFT, ema=0.99),
    "cfg": CFGConfig(steps=80, batch=64, learning_rate=5e-4, guidance=0.5, shift=SHIFT, ema=0.95),
    "progressive": ProgressiveConfig(steps=30, batch=64, learning_rate=7e-4, start=TEACHER_STEPS, shift=SHIFT, ema=0.9),
    "dual": DualConfig(
        steps=100, batch=64, learning_rate=5e-4, fake_rate=1e-3, head_rate=1e-3, head_width=32, shift=SHIFT, ema=0.95
    ),
    "prefs": PrefsConfig(pairs=500),
    "dpo": DPOConfig(steps=150, batch=64, learning_rate=5e-5, beta=50.0, shift=SHIFT, ema=0.95),
}
_SAME = {"dtype": "float32", "device": "cpu", "crop": 16, "frames": 1, "warmup": 10, "save_every": 10**6}


def run_stage(config: StageConfig, stage: str, out: Path, init: Path | None = None, pairs: Path | None = None) -> Path:
    """Run a stage's real trainer on the toy, from run `init`. Returns `out`."""
    inputs = ToyInputs(
        PRESET,
        data=None if pairs is None else PairPool(pairs),
        init=None if init is None else load_weights(init),
        poor=POOR if stage == "base" else 0.0,
    )
    with patch("duovsr.train.stage3.make_rankers", return_value=[Clarity()]):
        TRAINERS[stage](Run(out, config, ALONE), config, inputs)
    return out


def configure(stage: str, seed: int, **settings: Any) -> StageConfig:
    config = SETTINGS[stage]
    changes: dict[str, Any] = {**_SAME, "seed": seed, **settings}
    return replace(config, **changes)


def run_chain(folder: Path, seed: int, last: str = "dpo") -> dict[str, Path]:
    """All stages up to `last`, each from the one before; the folders of the runs."""
    runs: dict[str, Path] = {}
    init = None
    for stage in TRAINERS:
        runs[stage] = run_stage(configure(stage, seed), stage, folder / stage, init, runs.get("prefs"))
        init = init if stage == "prefs" else runs[stage]
        if stage == last:
            break
    return runs


def losses(run: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines]


def load(run: Path) -> DiffusionModel:
    model = DiffusionModel(PRESET)
    model.load_state_dict(load_weights(run)["model"], strict=True)
    return frozen(model)


def random_model(seed: int) -> DiffusionModel:
    """Its output depends on everything: the zero-initialised head is filled."""
    torch.manual_seed(seed)
    model = DiffusionModel(PRESET)
    nn.init.normal_(model.transformer.head.head.weight, std=0.1)
    return model


def write_random_run(folder: Path) -> Path:
    """What stage II starts from, untrained."""
    weights = {"vae": {}, "model": random_model(0).state_dict(), "score": random_model(1).state_dict()}
    save_atomically(weights, folder / FINAL, ALONE)
    return folder


def held_out(count: int, part: int = 0) -> Draws:
    """Random numbers that no stage draws: their seeds are not negative."""
    return Draws.of(range(count), seed=-1, step=0, part=part, device=CPU)


def many_steps(model: nn.Module) -> Sample:
    return lambda eps, z_lq: ode_solution(model, eps, z_lq, TEACHER_STEPS, SHIFT)


def single_step(model: nn.Module) -> Sample:
    return lambda eps, z_lq: one_step(model, eps, z_lq)


@dataclass(frozen=True)
class Distance:
    """Of samples to the truth, given the LQ."""

    energy: float  # energy distance, 0 where the distributions are equal
    off_mode: float  # mean squared distance to the nearest mode, a element; NOISE squared for the truth
    modes: float  # how many are in use: exp of the entropy of their shares, 4 for the truth


@torch.no_grad()
def distance_to_truth(sample: Sample, conditions: int = 48, samples: int = 96) -> Distance:
    draws = held_out(conditions * samples)
    z_lq = draw_lq(held_out(conditions, part=1)).repeat_interleave(samples, 0)
    truth, output = draw_truth(draws, z_lq), sample(draws.normal_like(z_lq), z_lq)
    error, mode = (output[:, None] - centres(z_lq)).square().mean((2, 3, 4, 5)).min(1)
    shares = F.one_hot(mode, len(MODES)).view(conditions, samples, -1).double().mean(1)
    entropy = torch.special.entr(shares).sum(1).mean()
    x, y = output.view(conditions, samples, -1), truth.view(conditions, samples, -1)
    return Distance(energy_distance(x, y), error.mean().item(), entropy.exp().item())


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples (B, N, D) each, unbiased, the mean over B."""
    count = x.shape[1]
    within = [torch.cdist(z, z).sum((1, 2)) / (count * (count - 1)) for z in (x, y)]
    return (2 * torch.cdist(x, y).mean((1, 2)) - within[0] - within[1]).mean().item()


@torch.no_grad()
def one_step_error(model: nn.Module, teacher: nn.Module, count: int = 512) -> float:
    """Mean squared error of a model's one step against the teacher's many, from the same noise."""
    draws = held_out(count)
    z_lq = draw_lq(draws)
    eps = draws.normal_like(z_lq)
    return (one_step(model, eps, z_lq) - many_steps(teacher)(eps, z_lq)).square().mean().item()


@torch.no_grad()
def preference(student: nn.Module, reference: nn.Module, count: int = 256) -> float:
    """Part of held-out clips on which the ranker prefers the student, from the same noise."""
    draws = held_out(count)
    z_lq = draw_lq(draws)
    eps = draws.normal_like(z_lq)
    mine, theirs = (clarity(one_step(model, eps, z_lq)) for model in (student, reference))
    return (mine > theirs).float().mean().item()

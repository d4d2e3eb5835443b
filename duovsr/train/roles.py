"""The networks of the stages by their roles: student, teacher, real_score, fake_score, reference; and the autoencoder.

A role is a copy of one class; what is frozen says so where it is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from duovsr.errors import InputError, UsageError
from duovsr.model import flow
from duovsr.model.layers import channels_last
from duovsr.model.one_step import Autoencoder, new_autoencoder
from duovsr.model.prompt import Prompt
from duovsr.model.tiny_vae import TinyVAE
from duovsr.model.transformer import Transformer
from duovsr.options import Preset
from duovsr.train.data import Frames, LatentPool, Latents, PairPool, Pool, sharpness
from duovsr.train.distributed import place
from duovsr.train.draws import Draws
from duovsr.train.loop import Run
from duovsr.train.options import StageConfig
from duovsr.train.runs import Weights, pick

Module = TypeVar("Module", bound=nn.Module)
Cached = TypeVar("Cached", LatentPool, PairPool)


class DiffusionModel(nn.Module):
    """A transformer and its condition tokens: what the stages train, copy and freeze as one.

    Tokens that the preset does not learn are buffers: no optimiser and no `requires_grad_` reaches them.
    """

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.transformer = Transformer(preset.transformer)
        self.prompt = Prompt(preset.transformer, learned=preset.learned_prompt)

    def forward(self, noisy: Tensor, lq: Tensor, sigma: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Velocity (B, C, T, H, W) float32 at sigma (B,) in [0, 1]; `dropped` (B,) bool: with the null prompt."""
        tokens = self.prompt.tokens(noisy.shape[0], dropped)
        velocity: Tensor = self.transformer(noisy, lq, flow.TIMESTEP_SCALE * sigma, tokens)[0]
        return velocity


class LatentSource(Protocol):
    def latents(self, draws: Draws) -> Latents: ...


class EncodedFrames:
    """Latents of a pool's crops, encoded as they are needed."""

    def __init__(self, pool: Pool, vae: Autoencoder, run: Run) -> None:
        pool.require(run.config.crop, run.config.frames)
        self.pool, self.vae, self.run = pool, vae, run

    def latents(self, draws: Draws) -> Latents:
        config = self.run.config
        hq, lq, _ = self.pool.frames(draws, config.crop, config.frames)
        z0, z_lq = encode(self.vae, torch.cat([hq, lq]), self.run).chunk(2)
        return Latents(z0, z_lq, sharpness(hq))


@dataclass(frozen=True)
class Inputs:
    """What a stage is given: the preset, data, held-out data, and the weights it starts from."""

    preset: Preset
    data: Pool | LatentPool | PairPool | None = None
    held_out: Pool | None = None
    init: Weights | None = None
    source: Path = Path()  # of `init`, for messages

    def has(self, name: str) -> bool:
        return self.init is not None and name in self.init

    def weights(self, name: str) -> dict[str, Tensor]:
        """Raises UsageError without a run to start from, InputError where it lacks the module."""
        if self.init is None:
            raise UsageError("this stage needs a run to start from", hint="add `--init RUN`")
        return pick(self.init, name, self.source)

    def frames(self, config: StageConfig) -> Pool:
        if not isinstance(self.data, Pool):
            raise self._trains_on("frames", "give it a pool, not cached latents")
        self.data.require(config.crop, config.frames)
        return self.data

    def autoencoder(self, run: Run) -> Autoencoder:
        """The autoencoder of `init`, frozen, on this process's device."""
        vae = channels_last(new_autoencoder(self.preset.vae))
        return frozen(fill(vae, self.weights("vae"), self.preset)).to(run.device)

    def latents(self, run: Run, vae: Autoencoder) -> LatentSource:
        """Raises UsageError where cached latents are another autoencoder's than `vae`."""
        if isinstance(self.data, LatentPool):
            return _encoded_by(vae, self.data)
        return EncodedFrames(self.frames(run.config), vae, run)

    def pairs(self, vae: Autoencoder) -> PairPool:
        """Raises UsageError where there are none, or another autoencoder's than `vae`."""
        if not isinstance(self.data, PairPool):
            raise self._trains_on("preference pairs", "make them with `duovsr train prefs`")
        return _encoded_by(vae, self.data)

    def _trains_on(self, wanted: str, hint: str) -> UsageError:
        instead = "" if self.data is None else f", not on what `{self.data.folder}` holds"
        return UsageError(f"this stage trains on {wanted}{instead}", hint=hint)

    def held_out_latents(self, run: Run, vae: Autoencoder) -> LatentSource | None:
        return None if self.held_out is None else EncodedFrames(self.held_out, vae, run)


def diffusion_model(preset: Preset, weights: Mapping[str, Tensor], run: Run, *, trained: bool) -> DiffusionModel:
    model = fill(DiffusionModel(preset), weights, preset)
    # Frozen ones too: the student's gradient passes through the score models.
    model.transformer.checkpointing = run.config.checkpointing
    return model if trained else frozen(model)


def placed_model(preset: Preset, weights: Mapping[str, Tensor], run: Run, *, trained: bool) -> DiffusionModel:
    """On the run's devices, sharded where it is, and computing in its dtype."""
    return place(diffusion_model(preset, weights, run, trained=trained), run.world, run.config.dtype)


def fill(module: Module, weights: Mapping[str, Tensor], preset: Preset, *, assign: bool = False) -> Module:
    """Copy weights into a module of the preset, or `assign` them as they are. Raises InputError where they are of
    another."""
    try:
        module.load_state_dict(weights, strict=True, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"the weights to start from are not of preset `{preset.name}`: {reason}",
            hint="give `--preset` as the run had it",
        ) from error
    return module


def _encoded_by(vae: Autoencoder, data: Cached) -> Cached:
    if data.encoded_by != digest(vae):
        hint = "make them anew from this `--init`, or give the one they were made from"
        raise UsageError(f"latents of another autoencoder: `{data.folder}`", hint=hint)
    return data


def digest(module: nn.Module) -> str:
    """sha256 of a module's weights in bfloat16: the same of a run and of the model exported from it."""
    sha256 = hashlib.sha256()
    for value in module.state_dict().values():
        sha256.update(value.detach().cpu().bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    return sha256.hexdigest()


def frozen(module: Module) -> Module:
    return module.requires_grad_(False).eval()


@torch.no_grad()
def encode(vae: Autoencoder, frames: Tensor, run: Run) -> Tensor:
    """Latents of frames (B, 3, T, H, W), float32, without gradient."""
    with run.autocast():
        latents, _ = vae.encode(frames)
    return latents.float()


def decode(vae: Autoencoder, latents: Tensor, seen: Frames) -> Tensor:
    """Frames like the LQ (B, 3, T, H, W), not clamped. TinyVAE's decoder sees the LQ, Wan2.1's does not."""
    frames, _ = vae.decode(latents, seen.lq, scale=seen.scale) if isinstance(vae, TinyVAE) else vae.decode(latents)
    return frames


def ode_solution(model: nn.Module, eps: Tensor, z_lq: Tensor, steps: int, shift: float) -> Tensor:
    """Euler from sigma 1 to 0 on the shifted grid: the model's x0 for this noise."""
    grid = flow.shift_sigma(torch.linspace(1, 0, steps + 1, device=eps.device), shift)
    z = eps
    for sigma, following in pairwise(grid):
        at, to = sigma.expand(z.shape[0]), following.expand(z.shape[0])
        z = flow.euler_step(z, model(z, z_lq, at), at, to)
    return z


def guided_velocity(model: nn.Module, noisy: Tensor, z_lq: Tensor, sigma: Tensor, guidance: float) -> Tensor:
    """v_cfg = (1 + w) v(c) - w v(null) of eq. 4."""
    positive: Tensor = model(noisy, z_lq, sigma)
    if guidance == 0:
        return positive
    everything = torch.ones(noisy.shape[0], dtype=torch.bool, device=noisy.device)
    return (1 + guidance) * positive - guidance * model(noisy, z_lq, sigma, everything)


def ode_restore(
    run: Run, preset: Preset, vae: Autoencoder, model: nn.Module, steps: int, shift: float
) -> Callable[[Frames, Draws], Tensor]:
    """LQ frames -> restored frames by `steps` sampling steps, as `Validation` wants it."""

    def restore(frames: Frames, draws: Draws) -> Tensor:
        z_lq = encode(vae, frames.lq, run)
        with run.autocast():
            z = ode_solution(model, draws.normal_like(z_lq, preset.shared_noise), z_lq, steps, shift)
            return decode(vae, z, frames)

    return restore


def one_step(student: nn.Module, eps: Tensor, z_lq: Tensor) -> Tensor:
    """z_0 of a single step from pure noise: eps - v(eps, 1)."""
    sigma = torch.ones(eps.shape[0], device=eps.device)
    return flow.x0_from_velocity(eps, student(eps, z_lq, sigma), sigma)

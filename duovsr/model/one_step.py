"""One-step restoration: everything between upsampled LQ frames and HQ frames, for any preset with a TinyVAE.

z_lq = encode(lq); eps ~ N(0, I); v = transformer(eps, z_lq, t = 1000); z_0 = eps - v; hq = decode(z_0, lq).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duovsr.model import flow
from duovsr.model.tiny_vae import SPATIAL_FACTOR, TinyVAE, VAEState
from duovsr.model.transformer import Transformer, TransformerState
from duovsr.options import Preset


@dataclass(frozen=True)
class RestoreState:
    """What one chunk leaves to the next of the same scene."""

    next_latent: int
    encoder: VAEState
    transformer: TransformerState | None
    decoder: VAEState | None
    faithful: VAEState | None


@dataclass(frozen=True)
class OneStepModel:
    """The networks of a preset, on one device and in one dtype, with its prompt tokens (1, L, text_dim)."""

    preset: Preset
    transformer: Transformer
    vae: TinyVAE
    prompt: Tensor

    @property
    def device(self) -> torch.device:
        return self.prompt.device

    @property
    def dtype(self) -> torch.dtype:
        return self.prompt.dtype

    @torch.inference_mode()
    def restore(
        self,
        lq: Tensor,
        state: RestoreState | None,
        *,
        seed: int,
        strength: float = 1.0,
        origin: tuple[int, int, int] = (0, 0, 0),
    ) -> tuple[Tensor, RestoreState]:
        """Restore LQ frames (1, 3, T, H, W) in [-1, 1], resized to the target; H and W multiples of 16.

        T is 4k + 1 at a scene's start (`state` None) and 4k after it. `origin` places its noise: the latent index
        since the scene's start where the state is fresh, and the (y, x) of a tile in pixels, multiples of 16. Returns
        frames like `lq`, not clamped.
        """
        index = origin[0] if state is None else state.next_latent
        if strength == 0:
            frames, faithful = self.vae.decode(None, lq, None if state is None else state.faithful)
            encoder = VAEState(()) if state is None else state.encoder
            return frames, RestoreState(index, encoder, None, None, faithful)
        z_lq, encoder = self.vae.encode(lq, None if state is None else state.encoder)
        _, C, T, H, W = z_lq.shape
        place = (index, origin[1] // SPATIAL_FACTOR, origin[2] // SPATIAL_FACTOR)
        eps = flow.noise(seed, (C, T, H, W), origin=place, shared=self.preset.shared_noise, device=self.device)
        timestep = torch.full((1,), flow.TIMESTEP_SCALE, device=self.device)
        velocity, transformer = self.transformer(
            eps, z_lq, timestep, self.prompt, None if state is None else state.transformer
        )
        frames, decoder = self.vae.decode(eps - velocity, lq, None if state is None else state.decoder)
        plain_state = None
        if strength < 1:
            plain, plain_state = self.vae.decode(None, lq, None if state is None else state.faithful)
            frames = plain + strength * (frames - plain)
        return frames, RestoreState(index + T, encoder, transformer, decoder, plain_state)

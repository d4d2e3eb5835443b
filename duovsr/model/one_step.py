"""One-step restoration: everything between upsampled LQ frames and HQ frames, for any preset.

z_lq = encode(lq); eps ~ N(0, I); v = transformer(eps, z_lq, t = 1000); z_0 = eps - v; hq = decode(z_0, lq).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duovsr.model import flow
from duovsr.model.quantise import precision_of, quantise
from duovsr.model.tiny_vae import SPATIAL_FACTOR, TinyVAE, VAEState
from duovsr.model.transformer import Transformer, TransformerState
from duovsr.model.wan_vae import WanVAE
from duovsr.options import Preset, TinyVAEConfig, WanVAEConfig, WindowConfig

Autoencoder = TinyVAE | WanVAE


def new_autoencoder(config: TinyVAEConfig | WanVAEConfig) -> Autoencoder:
    return WanVAE(config) if isinstance(config, WanVAEConfig) else TinyVAE(config)


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
    """The networks of a preset, in one dtype, with its prompt tokens (1, L, text_dim) on the device that computes.

    `digest` tells the weights from others, however they are held.
    """

    preset: Preset
    transformer: Transformer
    vae: Autoencoder
    prompt: Tensor
    digest: str

    @property
    def device(self) -> torch.device:
        return self.prompt.device

    @property
    def dtype(self) -> torch.dtype:
        return self.prompt.dtype

    @property
    def precision(self) -> str:
        """How the transformer's weights are held, in words: see `precision_of`."""
        return precision_of(self.transformer)

    @property
    def attention(self) -> str:
        """Who computes it, as `Transformer.attend_with` was told. `auto` only on a GPU, where it depends on the shapes:
        what was measured for each is remembered there; elsewhere torch's is taken."""
        told = self.transformer.backend
        return "sdpa" if told == "auto" and self.device.type != "cuda" else told

    def fingerprint(self) -> str:
        """A digest of all that the pixels depend on: the weights, the autoencoder, and where attention looks."""
        described = f"{self.preset.name} {self.preset.transformer.window} {type(self.vae).__name__} {self.digest}"
        return hashlib.sha256(described.encode()).hexdigest()

    def quantised(self, precision: str, dtype: torch.dtype) -> OneStepModel:
        """With the transformer's weights in 8 bits, computing in `dtype`. This model's own parts are changed."""
        quantise(self.transformer, precision, dtype)
        return replace(self, vae=self.vae.to(dtype), prompt=self.prompt.to(dtype))

    def with_window(self, tokens: int) -> OneStepModel:
        """The same weights with attention in windows of `tokens` x `tokens`, over all frames of a call.

        For a transformer of full attention, whose cost grows with the square of a frame's size. Positions stay those
        of the whole frame; inside a window they differ by no more than in the small frames that it was trained on.
        """
        config = replace(self.preset.transformer, window=WindowConfig(tokens, tokens, past=None))
        with torch.device("meta"):
            transformer = Transformer(config)
        transformer.load_state_dict(self.transformer.state_dict(), assign=True)
        preset = replace(self.preset, transformer=config)
        return replace(self, preset=preset, transformer=transformer.requires_grad_(False).eval())

    def encode(self, lq: Tensor, state: VAEState | None = None) -> tuple[Tensor, VAEState]:
        """LQ frames (1, 3, T, H, W) -> normalised latents; T is 4k + 1 at a start (`state` None) and 4k after it."""
        return self.vae.encode(lq, state)

    def generate(
        self, z_lq: Tensor, seed: int, place: tuple[int, int, int], state: TransformerState | None = None
    ) -> tuple[Tensor, TransformerState | None]:
        """z_0 of LQ latents whose first element is at `place`: latent index since the scene's start, y, x."""
        _, C, T, H, W = z_lq.shape
        eps = flow.noise(seed, (C, T, H, W), origin=place, shared=self.preset.shared_noise, device=self.device)
        timestep = torch.full((1,), flow.TIMESTEP_SCALE, device=self.device)
        velocity, state = self.transformer(eps, z_lq, timestep, self.prompt, state)
        return eps - velocity, state

    def decode(
        self, latents: Tensor | None, lq: Tensor, state: VAEState | None = None, *, scale: float
    ) -> tuple[Tensor, VAEState]:
        """Frames like `lq`, which was enlarged by `scale`; not clamped. With `latents` None the faithful ones.

        TinyVAE's decoder sees the LQ. Wan2.1's does not, and faithful to the LQ are its own, bicubic, frames.
        """
        if isinstance(self.vae, TinyVAE):
            return self.vae.decode(latents, lq, state, scale=scale)
        return (lq, VAEState(())) if latents is None else self.vae.decode(latents, state)

    @torch.inference_mode()
    def restore(
        self,
        lq: Tensor,
        state: RestoreState | None,
        *,
        seed: int,
        scale: float,
        strength: float = 1.0,
        origin: tuple[int, int, int] = (0, 0, 0),
    ) -> tuple[Tensor, RestoreState]:
        """Restore LQ frames (1, 3, T, H, W) in [-1, 1], enlarged by `scale` to the target; H and W multiples of 16.

        T is 4k + 1 at a scene's start (`state` None) and 4k after it; only a model that streams goes on from a state
        to the frames that a longer call would give. `origin` places its noise: the latent index
        since the scene's start where the state is fresh, and the (y, x) of a tile in pixels, multiples of 16. Returns
        frames like `lq`, not clamped.
        """
        index = origin[0] if state is None else state.next_latent
        if strength == 0:
            frames, faithful = self.decode(None, lq, None if state is None else state.faithful, scale=scale)
            encoder = VAEState(()) if state is None else state.encoder
            return frames, RestoreState(index, encoder, None, None, faithful)
        z_lq, encoder = self.encode(lq, None if state is None else state.encoder)
        place = (index, origin[1] // SPATIAL_FACTOR, origin[2] // SPATIAL_FACTOR)
        z_0, transformer = self.generate(z_lq, seed, place, None if state is None else state.transformer)
        frames, decoder = self.decode(z_0, lq, None if state is None else state.decoder, scale=scale)
        plain_state = None
        if strength < 1:
            plain, plain_state = self.decode(None, lq, None if state is None else state.faithful, scale=scale)
            frames = plain + strength * (frames - plain)
        return frames, RestoreState(index + z_lq.shape[2], encoder, transformer, decoder, plain_state)

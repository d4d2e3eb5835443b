"""The video diffusion transformer of the paper (section 3.1), shaped and named as Wan2.1's, for every preset.

Parameter names are Wan2.1's own, so that original checkpoints load without a key map. Where a preset has a local
window, self-attention looks at the current and a few earlier latent frames only; the keys and values of those frames
are state that the caller carries from chunk to chunk, and a streamed clip equals the whole one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from duovsr.kernels import backends
from duovsr.kernels.attention import attention
from duovsr.kernels.modulate import gated_residual, gated_residual_norm, modulated_norm, residual_modulated_norm
from duovsr.kernels.prologue import rotated_norms
from duovsr.model.layers import RMSNorm, rope_table, timestep_embedding
from duovsr.options import TransformerConfig


@dataclass(frozen=True)
class TransformerState:
    """What a transformer that streams remembers: the next latent index, and each block's k, v of the last frames."""

    next_index: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def describe_attention(device: torch.device) -> dict[str, Any]:
    """What can compute attention on `device`, and what `auto` takes."""
    return backends.describe(device)


class Attention(nn.Module):
    """The projections that both kinds of attention have; q and k are normed over all channels."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.backend = "auto"  # see `Transformer.attend_with`
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)


class SelfAttention(Attention):
    """Attention among the latents' tokens, rotated by their positions; full, or in windows with a past."""

    def __init__(self, config: TransformerConfig, shifted: bool) -> None:
        super().__init__(config)
        self.window, self.shifted = config.window, shifted
        self.past = config.window.past if config.window is not None else None

    def forward(
        self, x: Tensor, rope: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x (B, T, H, W, D) and the keys and values of earlier frames -> the same shape, and the new ones."""
        q, k = rotated_norms(self.q(x), self.k(x), self.norm_q.weight, self.norm_k.weight, rope, self.norm_q.eps)
        v = self.v(x).unflatten(-1, (self.heads, -1))
        if self.past is not None:
            k, v = _with_past(k, v, past, self.past)
            past = k[:, -self.past :].clone(), v[:, -self.past :].clone()  # views would keep all frames alive
        attended = attention(q, k, v, self.window, shifted=self.shifted, backend=self.backend)
        return self.o(attended.flatten(-2)), past


def _with_past(k: Tensor, v: Tensor, before: tuple[Tensor, Tensor] | None, frames: int) -> tuple[Tensor, Tensor]:
    """Put the earlier frames in front. A scene's first frame stands in for the frames before it: a key that appears
    twice with its value changes nothing in a softmax average over that frame alone."""
    if before is None:
        before = k[:, :1].repeat(1, frames, 1, 1, 1, 1), v[:, :1].repeat(1, frames, 1, 1, 1, 1)
    return torch.cat([before[0], k], dim=1), torch.cat([before[1], v], dim=1)


class CrossAttention(Attention):
    """Attention to the prompt's tokens: no mask, no positions (Wan2.1)."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (B, T, H, W, D), text (B, L, D) -> (B, T, H, W, D)."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        k = self.norm_k(self.k(text))[:, :, None, None].unflatten(-1, (self.heads, -1))
        v = self.v(text)[:, :, None, None].unflatten(-1, (self.heads, -1))
        return self.o(attention(q, k, v, backend=self.backend).flatten(-2))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, shifted: bool) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)
        self.self_attn = SelfAttention(config, shifted)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor, rope: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        parts = (self.modulation.float() + modulation).to(x.dtype).unsqueeze(2).unsqueeze(2)  # (B, 6, 1, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = (part.unsqueeze(1) for part in parts.unbind(1))
        attended, past = self.self_attn(modulated_norm(x, shift1, scale1, self.eps), rope, past)
        x, h = gated_residual_norm(x, gate1, attended, self.norm3.weight, self.norm3.bias, self.eps)
        x, h = residual_modulated_norm(x, self.cross_attn(h, text), shift2, scale2, self.eps)
        return gated_residual(x, gate2, self.ffn(h)), past


class Head(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        patch_volume = config.patch[0] * config.patch[1] * config.patch[2]
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, patch_volume * config.latent_channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, embedded_time: Tensor) -> Tensor:
        parts = (self.modulation.float() + embedded_time[:, None]).to(x.dtype)  # (B, 2, D)
        shift, scale = (part[:, None, None, None] for part in parts.unbind(1))
        return self.head(modulated_norm(x, shift, scale, self.eps))


class Transformer(nn.Module):
    """Velocity v = eps - x0 of noisy latents, given LQ latents, a timestep and prompt tokens (paper eq. 2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # training: recompute the blocks' activations in the backward pass
        self.backend = "auto"  # of attention
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), nn.Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))
        self.blocks = nn.ModuleList(Block(config, shifted=i % 2 == 1) for i in range(config.layers))
        self.head = Head(config)

    def attend_with(self, backend: str, device: torch.device) -> None:
        """Compute attention on `device`, where the weights may not be yet, by one of `kernels.backends.BACKENDS`, or by
        the fastest: `auto`. Raises UsageError for one that is not available. Where a gradient is wanted it is torch's
        all the same."""
        backends.require(backend, device, self.patch_embedding.weight.dtype, self.config.dim // self.config.heads)
        self.backend = backend
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def forward(
        self,
        noisy: Tensor,
        lq: Tensor,
        timestep: Tensor,
        text: Tensor,
        state: TransformerState | None = None,
    ) -> tuple[Tensor, TransformerState | None]:
        """Predict the velocity.

        noisy, lq: latents (B, C, T, H, W), H and W multiples of the patch; timestep (B,) = 1000 sigma; text
        (B, L, text_dim) with L <= text_length, zero-padded here. `state` is None at a scene's first latent and where
        the config does not stream. Returns the velocity in the shape of `noisy` (float32) and the next state.
        """
        config = self.config
        x = self._patchify(torch.cat([noisy, lq], dim=1))
        start = 0 if state is None else state.next_index
        T, H, W = x.shape[1:4]
        rope = rope_table(T, H, W, config.dim // config.heads, start, x.device)
        embedded_time = self.time_embedding(timestep_embedding(timestep, config.freq_dim).to(x.dtype))
        modulation = self.time_projection(embedded_time).unflatten(1, (6, -1)).float()
        text = self.text_embedding(F.pad(text, (0, 0, 0, config.text_length - text.shape[1])).to(x.dtype))

        pasts = []
        for i, block in enumerate(self.blocks):
            past = None if state is None else (state.keys[i], state.values[i])
            if self.checkpointing:
                x, past = checkpoint(block, x, modulation, text, rope, past, use_reentrant=False)
            else:
                x, past = block(x, modulation, text, rope, past)
            pasts.append(past)
        velocity = self._unpatchify(self.head(x, embedded_time.float())).float()
        if not config.streams:
            return velocity, None
        keys, values = zip(*pasts, strict=True)
        return velocity, TransformerState(start + T, keys, values)

    def _patchify(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) -> tokens (B, T', H', W', D). A matmul: convolution kernels are slow at stride = size."""
        B, C, T, H, W = latents.shape
        pt, ph, pw = self.config.patch
        patches = latents.view(B, C, T // pt, pt, H // ph, ph, W // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.patch_embedding.bias)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T', H', W', pt ph pw C), channel last within a patch -> (B, C, T, H, W)."""
        B, T, H, W, _ = patches.shape
        pt, ph, pw = self.config.patch
        latents = patches.view(B, T, H, W, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return latents.reshape(B, -1, T * pt, H * ph, W * pw)

"""TinyVAE: a light causal autoencoder whose decoder sees the LQ frames (DESIGN section 2).

8x8 in space, 4x in time, 16 channels. Frames and latents are aligned as in Wan2.1: latent 0 holds frame 0 alone (the
three frames that would precede it are copies of it), latent i holds frames 4i - 3 .. 4i. Since the decoder receives
the LQ frames at the target size, the latent only carries what the LQ lacks. By how much they were enlarged it is told:
a soft picture is blurred where it was enlarged by four, and may well be meant where it was by 1.5.

Everything is causal in time with one step of memory per `MemoryBlock`; the memory is passed in and out, so a streamed
clip equals the whole one. Frames of one call are processed as one batch of 2D convolutions, channels last.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duovsr.kernels.convolution import convolve
from duovsr.options import TinyVAEConfig

TEMPORAL_FACTOR = 4
SPATIAL_FACTOR = 8
_SCALES = (1.5, 4.0)  # trained for; what lies beyond counts as the nearer one
_GAIN = 10  # of what is told of the scale, whose few weights AdamW moves no faster than all others


@dataclass(frozen=True)
class VAEState:
    """What an autoencoder remembers between calls. TinyVAE: the last input of each memory block and, after a decode
    with latents, of the latents' expansion, (B, C, H, W) each."""

    memories: tuple[Tensor, ...]


class MemoryBlock(nn.Module):
    """Residual block whose first convolution also sees the step before. Input (B, T, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.current = nn.Conv2d(channels, channels, 3, padding=1)
        self.previous = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.middle = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the output and the next memory. At a scene's start (`memory` None) step 0 is its own predecessor."""
        B, T = x.shape[:2]
        before = _with_before(x, memory)
        merged = _merge(x)
        h = convolve(merged, self.current, plus=convolve(_merge(before), self.previous), relu=True)
        h = convolve(h, self.middle, relu=True)
        return _split(convolve(h, self.out, plus=merged), B), _last(x)


class ResBlock(nn.Module):
    """Two convolutions with a skip, one frame at a time. Input (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(convolve(x, self.first, relu=True), self.second, plus=x)


class Encoder(nn.Module):
    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        width = config.encoder_width
        self.conv_in = nn.Conv2d(3 * SPATIAL_FACTOR**2, width, 3, padding=1)
        self.block = ResBlock(width)
        self.merge_time = nn.Conv2d(TEMPORAL_FACTOR * width, config.width_8, 1)
        self.memory_block = MemoryBlock(config.width_8)
        self.conv_out = nn.Conv2d(config.width_8, config.latent_channels, 3, padding=1)

    def forward(self, frames: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """frames (B, 4T, 3, H, W), or 3 fewer at a scene's start -> latents (B, T, C, H / 8, W / 8)."""
        B, dtype = frames.shape[0], self.merge_time.weight.dtype
        h = self.block(convolve(unshuffle(_merge(frames.to(dtype)), SPATIAL_FACTOR), self.conv_in, relu=True))
        h = _whole_steps(_split(h, B), memory)
        h = _channels_last(h.unflatten(1, (-1, TEMPORAL_FACTOR)).flatten(0, 1).flatten(1, 2))
        h, memory = self.memory_block(_split(convolve(h, self.merge_time, relu=True), B), memory)
        return _split(self.conv_out(_merge(h)), B), memory


class Decoder(nn.Module):
    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        w8, w4 = config.width_8, config.width_4
        self.lq_in = nn.Conv2d(3 * 4**2, w4, 3, padding=1)
        self.lq_down = nn.Conv2d(4 * w4, w8, 1)
        self.latent_in = nn.Conv2d(config.latent_channels, w8, 3, padding=1)
        self.latent_blocks = nn.ModuleList(ResBlock(w8) for _ in range(config.latent_blocks))
        self.expand_time = nn.Conv2d(TEMPORAL_FACTOR * w8, TEMPORAL_FACTOR * w8, 1, groups=TEMPORAL_FACTOR)
        self.memory_blocks = nn.ModuleList(MemoryBlock(w8) for _ in range(config.blocks_8))
        self.up = nn.Conv2d(w8, 4 * w4, 1)
        self.blocks = nn.ModuleList(ResBlock(w4) for _ in range(config.blocks_4))
        self.conv_out = nn.Conv2d(w4, 3 * 4**2, 3, padding=1)
        self.scale_8 = nn.Linear(2, w8, bias=False)
        self.scale_4 = nn.Linear(2, w4, bias=False)
        for told in (self.scale_8, self.scale_4):
            nn.init.zeros_(told.weight)

    def forward(
        self, latents: Tensor | None, lq: Tensor, memories: tuple[Tensor, ...] | None, scale: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """latents (B, T, C, H / 8, W / 8) or None for the latent-free decode, lq (B, 4T, 3, H, W), or 3 frames fewer at
        a scene's start, enlarged by scale (B,) -> frames like lq."""
        B, dtype = lq.shape[0], self.up.weight.dtype
        lq_quarter = convolve(unshuffle(_merge(lq.to(dtype)), 4), self.lq_in, relu=True)
        before = iter(memories) if memories is not None else repeat(None)
        next_memories = []
        if latents is None:
            h = _whole_steps(_split(self.lq_down(unshuffle(lq_quarter, 2)), B), memories)
        else:
            expanded, memory = self._expand(latents.to(dtype), next(before))
            h = _whole_steps(_split(unshuffle(lq_quarter, 2), B), memories)
            h = _split(convolve(_merge(h), self.lq_down, plus=expanded), B)
            next_memories.append(memory)
        octaves = torch.log2(_SCALES[1] / scale.clamp(*_SCALES))  # 0 at x4
        known = (_GAIN * torch.stack([octaves, octaves.square()], dim=1)).to(dtype)
        h = h + self.scale_8(known)[:, None, :, None, None]
        for block in self.memory_blocks:
            h, memory = block(h, next(before))
            next_memories.append(memory)
        quarter = shuffle(self.up(_merge(h[:, -lq.shape[1] :])), 2) + lq_quarter
        quarter = quarter + self.scale_4(known).repeat_interleave(lq.shape[1], 0)[:, :, None, None]
        for block in self.blocks:
            quarter = block(quarter)
        residual = shuffle(self.conv_out(quarter), 4)
        # Added in the frames' own type: bfloat16 would round the picture itself to 8 bits less a sign.
        return lq + _split(residual, B), tuple(next_memories)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        complete(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _expand(self, latents: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latents (B, T, C, h, w) -> features (B 4T, width_8, h, w), and the next memory.

        Each latent step gives four frames, on a straight way from the step before to its own: the change from frame
        to frame is as large where a latent ends as elsewhere, and no end shows as a jump.
        """
        z = convolve(_merge(latents), self.latent_in, relu=True)
        for block in self.latent_blocks:
            z = block(z)
        z = _split(z, latents.shape[0])
        before = _with_before(z, memory)
        assert self.expand_time.bias is not None
        weights = self.expand_time.weight.flatten(1).chunk(TEMPORAL_FACTOR)
        frames = []
        for frame, (weight, bias) in enumerate(zip(weights, self.expand_time.bias.chunk(TEMPORAL_FACTOR), strict=True)):
            step = _merge(torch.lerp(before, z, (frame + 1) / TEMPORAL_FACTOR)).permute(0, 2, 3, 1)
            frames.append(F.linear(step, weight, bias))  # the convolution, as a matmul: its own kernels are slow here
        return torch.stack(frames, dim=1).flatten(0, 1).permute(0, 3, 1, 2), _last(z)


class TinyVAE(nn.Module):
    """Frames (B, 3, T, H, W) in [-1, 1] <-> normalised latents (B, 16, T', H / 8, W / 8). H, W: multiples of 8."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def encode(self, frames: Tensor, state: VAEState | None = None) -> tuple[Tensor, VAEState]:
        """Encode 4k + 1 frames at a scene's start (`state` None), 4k after it; k + 1 or k latents come out.

        Latents are normalised per channel to zero mean and unit variance (statistics of the training data).
        """
        latents, memory = self.encoder(_time_first(frames), None if state is None else state.memories[0])
        latents = latents.transpose(1, 2).float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std, VAEState((memory,))

    def decode(
        self, latents: Tensor | None, lq: Tensor, state: VAEState | None = None, *, scale: float | Tensor
    ) -> tuple[Tensor, VAEState]:
        """Decode normalised latents with the LQ frames of the same times at the target size (B, 3, T, H, W), to which
        they were enlarged by `scale`, one for all or (B,).

        `latents` None gives the faithful, latent-free decode. Returns frames in the shape of `lq`, not clamped.
        """
        if latents is not None:
            mean, std = self._statistics(latents)
            latents = (latents * std + mean).transpose(1, 2)
        if not isinstance(scale, Tensor):
            scale = torch.full(lq.shape[:1], scale, device=lq.device)
        frames, memories = self.decoder(latents, _time_first(lq), None if state is None else state.memories, scale)
        return frames.transpose(1, 2), VAEState(memories)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        return self.latent_mean.to(latents.dtype).view(shape), self.latent_std.to(latents.dtype).view(shape)


def complete(state: dict[str, Tensor], prefix: str = "decoder.") -> None:
    """Add to a TinyVAE's weights from before its decoder was told the scale what they lack: they say nothing of it."""
    up = state.get(f"{prefix}up.weight")
    if up is not None:
        state.setdefault(f"{prefix}scale_8.weight", up.new_zeros(up.shape[1], 2))
        state.setdefault(f"{prefix}scale_4.weight", up.new_zeros(up.shape[0] // 4, 2))


def _time_first(frames: Tensor) -> Tensor:
    """(B, 3, T, H, W) -> (B, T, 3, H, W)."""
    return frames.transpose(1, 2)


def _whole_steps(x: Tensor, memory: object | None) -> Tensor:
    """Put TEMPORAL_FACTOR - 1 copies of the first frame of (B, T, ...) in front at a scene's start (`memory` None).

    Of features rather than of pixels: what each frame gives by itself need not be computed for the copies.
    """
    return x if memory is not None else _cat_time([x[:, :1]] * (TEMPORAL_FACTOR - 1) + [x])


def _with_before(x: Tensor, memory: Tensor | None) -> Tensor:
    """Each step's predecessor in x (B, T, C, H, W); the first one's is `memory` or, at a scene's start, itself."""
    first = x[:, 0] if memory is None else memory
    return _cat_time([first[:, None], x[:, :-1]])


def _last(x: Tensor) -> Tensor:
    """The last step of x (B, T, C, H, W), to be remembered: a view would keep all of x alive."""
    return x[:, -1].clone()


def _cat_time(parts: list[Tensor]) -> Tensor:
    """Parts (B, T, C, H, W) that are channels last in memory to one that is: torch keeps that in 4 dimensions only."""
    return torch.cat([part.permute(0, 1, 3, 4, 2) for part in parts], dim=1).permute(0, 1, 4, 2, 3)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _merge(x: Tensor) -> Tensor:
    """(B, T, C, H, W) -> (B T, C, H, W), channels last."""
    return _channels_last(x.flatten(0, 1))


def _split(x: Tensor, B: int) -> Tensor:
    """(B T, C, H, W) -> (B, T, C, H, W)."""
    return x.unflatten(0, (B, -1))


def unshuffle(x: Tensor, factor: int) -> Tensor:
    """Pixel-unshuffle (N, C, H, W) -> (N, factor^2 C, H / factor, W / factor), channels (row, column, C).

    This channel order keeps runs of C values together in channels-last memory, where torch's own order strides.
    """
    N, C, H, W = x.shape
    x = x.permute(0, 2, 3, 1).reshape(N, H // factor, factor, W // factor, factor, C).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(N, H // factor, W // factor, factor * factor * C).permute(0, 3, 1, 2)


def shuffle(x: Tensor, factor: int) -> Tensor:
    """The inverse of `unshuffle`."""
    N, C, H, W = x.shape
    x = x.permute(0, 2, 3, 1).reshape(N, H, W, factor, factor, C // factor**2).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(N, H * factor, W * factor, -1).permute(0, 3, 1, 2)

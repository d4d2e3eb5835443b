"""The Wan2.1 VAE, exact: 8x8 in space, 4x in time, 16 channels (reference: Wan2.1 `wan/modules/vae.py`).

Latent 0 holds frame 0 alone, latent i holds frames 4i - 3 .. 4i. Parameter names are Wan2.1's own, so that original
checkpoints load without a key map.

Wan2.1 encodes one frame and then four a call, and decodes one latent a call, with caches inside its modules. That is
ordinary causal convolution over the whole clip, zeros before frame 0, but for two exceptions at its first frame:

    down: y = cat(x[:1], conv(x))               kernel 3, stride 2, no padding: windows 0-2, 2-4, ...
    up:   y = cat(x[:1], interleave(conv(x[1:])))     zeros, not frame 0, to the left of frame 1

So any number of frames makes a call here; what the convolutions remember between calls is passed in and out. Inside a
call, frame 0 goes alone, and then each resolution takes as many frames at a time as memory allows (`frames_at_once`).
Activations are channels last (`channels_last_3d`), where a frame's channels lie together and frames can be merged into
the batch without a copy.

Two steps are computed otherwise than Wan2.1 does, to the same values: attention by rows, which bounds its memory, and
doublings without the enlarged picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise, starmap
from operator import mul

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duovsr.kernels.dispatch import fused
from duovsr.kernels.vae import channel_norm
from duovsr.model.causal import Memories, as_weights, first_alone, joined
from duovsr.model.layers import to_device
from duovsr.model.tiny_vae import VAEState
from duovsr.options import WanVAEConfig

ALL_FRAMES = 2**31
MOST_SCORES = 2**28  # elements of attention's weights at once, where a backend writes them down: 0.5 GiB in bfloat16


class ChannelNorm(nn.Module):
    """Each position's channels divided by their root mean square, times gamma. Input (N, C, ...)."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.gamma)


def causal_conv(in_channels: int, out_channels: int) -> nn.Conv3d:
    """A 3x3x3 convolution whose padding in time is that of `Memories`."""
    return nn.Conv3d(in_channels, out_channels, 3, padding=(0, 1, 1))


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Apply an image module (N, C, H, W) to each frame of x (B, C, T, H, W).

    Channels go last for the reshapes: these would otherwise give a single frame strides in which torch does not
    recognise the layout.
    """
    frames = x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)
    return module(frames).permute(0, 2, 3, 1).unflatten(0, (x.shape[0], -1)).permute(0, 4, 1, 2, 3)


class ResBlock(nn.Module):
    """Two causal convolutions with a skip. (B, in_channels, T, H, W) -> (B, out_channels, T, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(  # Wan2.1's indices: its SiLUs and a dropout of 0 stand between these
            {
                "0": ChannelNorm(in_channels),
                "2": causal_conv(in_channels, out_channels),
                "3": ChannelNorm(out_channels),
                "6": causal_conv(out_channels, out_channels),
            }
        )
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, memories: Memories) -> Tensor:
        norm_1, conv_1, norm_2, conv_2 = self.residual.values()
        # In one expression: a name would keep the first result alive beside the second.
        h = memories.convolve_normed(norm_2, conv_2, memories.convolve_normed(norm_1, conv_1, x))
        return h.add_(x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """Self-attention within an image (N, C, H, W): one head over all channels, no positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (N, H W, 3 C)
        return x + self.proj(attend_images(qkv).transpose(1, 2).unflatten(2, x.shape[2:]))


def _thirds_fit(qkv: Tensor) -> bool:
    """The fused kernel takes Wan2.1's own 384 channels as three blocks, whose sides are powers of two."""
    third, rest = divmod(qkv.shape[2] // 3, 3)
    return rest == 0 and third in (16, 32, 64, 128) and qkv.dtype != torch.float32


@fused(_thirds_fit)
def attend_images(qkv: Tensor) -> Tensor:
    """Attention within each image: queries, keys and values (N, L, 3 C) -> (N, L, C)."""
    return torch.cat([attend(*image.chunk(3, dim=-1)) for image in qkv.split(1)])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head, (1, L, C) each, by rows of at most MOST_SCORES weights.

    Flash kernels refuse heads of more than 256 channels, and torch may fall back to one that writes all L^2 weights.
    """
    rows = max(1, MOST_SCORES // k.shape[1])
    parts = [F.scaled_dot_product_attention(part[:, None], k[:, None], v[:, None]) for part in q.split(rows, dim=1)]
    return torch.cat(parts, dim=2)[:, 0]


class Middle(nn.ModuleList):
    """The blocks at the lowest resolution, which the encoder ends and the decoder begins with."""

    def __init__(self, channels: int) -> None:
        super().__init__([ResBlock(channels, channels), Attention(channels), ResBlock(channels, channels)])

    def forward(self, x: Tensor, memories: Memories) -> Tensor:
        first, attention, last = self
        return last(per_frame(attention, first(x, memories)), memories)


class Downsample(nn.Module):
    """Halves H and W and, if `temporal`, the frame rate: T -> T / 2, but frame 0 alone -> itself."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, memories: Memories) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        if self.time_conv in memories:
            return memories.convolve(self.time_conv, x, keep=1)
        memories.begin(self.time_conv, x)
        return x


class DoublingConv(nn.Conv2d):
    """A 3x3 convolution of the twofold nearest-neighbour enlargement of (N, C, H, W), without making the enlargement.

    Of the nine enlarged pixels that an output pixel sees, those that are copies of one pixel share a product: each of
    the four phases (even or odd row and column) is a 2x2 convolution of x, and all four are one with four times the
    channels. That takes 4/9 of the operations and a sixth of the memory. Exact but for rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        phases = F.conv2d(x, self._folded(), None if self.bias is None else self.bias.repeat(4), padding=1)
        N, _, H, W = x.shape
        phases = phases.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))  # (N, H + 1, W + 1, row, column, C)
        image, down, right, row, column, channel = phases.stride()
        # Phase (i, j) of pixel (y, x) is at (y + i, x + j): a step to the next phase is one along both of its axes.
        pixels = phases.as_strided(
            (N, H, 2, W, 2, phases.shape[5]),
            (image, down, down + row, right, right + column, channel),
            phases.storage_offset(),
        )
        return pixels.reshape(N, 2 * H, 2 * W, -1).permute(0, 3, 1, 2)

    def _folded(self) -> Tensor:
        """(4 C_out, C_in, 2, 2), phases (row, column) first. An even output row sees rows i - 1, i, i of x; an odd one
        i, i, i + 1. The sums are float32: bfloat16 would round twice."""
        weight = self.weight.float()
        for axis in (2, 3):
            first, middle, last = weight.split(1, dim=axis)
            even, odd = torch.cat([first, middle + last], axis), torch.cat([first + middle, last], axis)
            weight = torch.cat([even, odd])  # phases of this axis before those of the axis before
        columns_first = weight.unflatten(0, (2, 2, -1))
        folded = columns_first.transpose(0, 1).flatten(0, 2).to(self.weight.dtype)
        return folded.contiguous(memory_format=torch.channels_last)


class Upsample(nn.Module):
    """Doubles H and W, halves C and, if `temporal`, doubles the frame rate: T -> 2T, but frame 0 alone -> one."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None
        self.resample = nn.ModuleDict({"1": DoublingConv(channels, channels // 2, 3, padding=1)})

    def forward(self, x: Tensor, memories: Memories) -> Tensor:
        if self.time_conv is not None and self.time_conv in memories:
            x = _interleave(memories.convolve(self.time_conv, x))
        elif self.time_conv is not None:
            B, C, _, H, W = x.shape
            memories.begin(self.time_conv, x.new_zeros(B, 2, H, W, C).permute(0, 4, 1, 2, 3))
        return per_frame(self.resample["1"], x)


def _interleave(x: Tensor) -> Tensor:
    """(B, 2 C, T, H, W) -> (B, C, 2 T, H, W): the first half of the channels is frame 2t, the second frame 2t + 1."""
    pairs = x.unflatten(1, (2, -1)).permute(0, 3, 1, 4, 5, 2).contiguous()  # (B, T, 2, H, W, C)
    return pairs.flatten(1, 2).permute(0, 4, 1, 2, 3)


class Encoder(nn.Module):
    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in config.multipliers]
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(pairwise([config.dim, *widths])):
            layers += starmap(ResBlock, [(before, width)] + [(width, width)] * (config.res_blocks - 1))
            if i < len(config.temporal_downsample):
                layers.append(Downsample(width, config.temporal_downsample[i]))
        self.conv1 = causal_conv(3, config.dim)
        self.downsamples = nn.ModuleList(layers)
        self.middle = Middle(widths[-1])
        self.head = nn.ModuleDict(
            {"0": ChannelNorm(widths[-1]), "2": causal_conv(widths[-1], 2 * config.latent_channels)}
        )
        count = config.res_blocks + 1
        self.stages = [slice(i * count, (i + 1) * count) for i in range(len(widths))]  # of `downsamples`, finest first

    def forward(self, frames: Tensor, memories: Memories, at_once: int) -> Tensor:
        """frames (B, 3, T, H, W) -> what becomes mean and log-variance (B, 2 C, T', H / 8, W / 8).

        T is 1 at a scene's start and 4k after it. `at_once`: see `WanVAE`.
        """
        level, parts = len(self.stages) - 1, []
        for piece in frames.split(at_once << level, dim=2):
            x = self.middle(self._descend(piece, level, memories, at_once), memories)
            parts.append(memories.convolve_normed(self.head["0"], self.head["2"], x))
        return joined(parts)

    def _descend(self, frames: Tensor, level: int, memories: Memories, at_once: int) -> Tensor:
        """What the stage at 1 / 2^level of the size makes of the frames; the one before takes half as many at once."""
        if level > 0:
            pieces = frames.split(at_once << (level - 1), dim=2)
            x = joined([self._descend(piece, level - 1, memories, at_once) for piece in pieces])
        else:
            x = memories.convolve(self.conv1, as_weights(frames, self.conv1))
        for layer in self.downsamples[self.stages[level]]:
            x = layer(x, memories)
        return x


class Decoder(nn.Module):
    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in reversed(config.multipliers)]
        temporal_upsample = config.temporal_downsample[::-1]
        layers: list[nn.Module] = []
        before = widths[0]
        for i, width in enumerate(widths):
            layers += starmap(ResBlock, [(before, width)] + [(width, width)] * config.res_blocks)
            if i < len(temporal_upsample):
                layers.append(Upsample(width, temporal_upsample[i]))
                before = width // 2
        self.conv1 = causal_conv(config.latent_channels, widths[0])
        self.middle = Middle(widths[0])
        self.upsamples = nn.ModuleList(layers)
        self.head = nn.ModuleDict({"0": ChannelNorm(widths[-1]), "2": causal_conv(widths[-1], 3)})
        count = config.res_blocks + 2
        coarsest_first = [slice(max(0, i * count - 1), (i + 1) * count - 1) for i in range(len(widths))]
        self.stages = coarsest_first[::-1]  # of `upsamples`, finest first; all but the coarsest begin with a doubling
        factors = [2 if temporal else 1 for temporal in config.temporal_downsample]
        self.frames_each = [*accumulate(factors, mul), config.temporal_factor]  # that come of one that a stage takes

    def forward(self, latents: Tensor, memories: Memories, at_once: int) -> Iterator[Tensor]:
        """latents (B, C, T', H / 8, W / 8), not normalised -> frames, one after the other in pieces (B, 3, T, H, W).

        T' is 1 at a scene's start. `at_once`: see `WanVAE`.
        """
        return self._ascend(latents, len(self.stages) - 1, memories, at_once)

    def _ascend(self, x: Tensor, level: int, memories: Memories, at_once: int) -> Iterator[Tensor]:
        """Frames of x, which the stage at 1 / 2^level of the size takes; the one after takes half as many at once."""
        for piece in x.split((at_once << level) // self.frames_each[level], dim=2):
            if level == len(self.stages) - 1:
                piece = self.middle(memories.convolve(self.conv1, piece), memories)
            for layer in self.upsamples[self.stages[level]]:
                piece = layer(piece, memories)
            if level > 0:
                yield from self._ascend(piece, level - 1, memories, at_once)
            else:
                yield memories.convolve_normed(self.head["0"], self.head["2"], piece)


class WanVAE(nn.Module):
    """Frames (B, 3, T, H, W) in [-1, 1] <-> normalised latents (B, 16, T', H / 8, W / 8). H, W: multiples of 8.

    `frames_at_once` bounds the memory and leaves the result: the stages at full size work on so many frames of the
    video at a time, those at half of it on twice as many, and so on; no other stage's tensors are then larger.
    """

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        assert not config.temporal_downsample[0], "frames go one at a time as far as half the size"
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.conv2 = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)
        self.frames_at_once = ALL_FRAMES

    def encode(self, frames: Tensor, state: VAEState | None = None) -> tuple[Tensor, VAEState]:
        """Encode 4k + 1 frames at a scene's start (`state` None), 4k after it; k + 1 or k latents come out.

        The latents are the posterior's mean, normalised by Wan2.1's statistics, float32.
        """
        frames_left = (frames.shape[2] - (state is None)) % self.config.temporal_factor
        assert frames_left == 0, f"{frames.shape[2]} frames"
        assert all(side % self.config.spatial_factor == 0 for side in frames.shape[3:]), tuple(frames.shape)
        memories = Memories(self.encoder, state)
        moments = joined([self.encoder(part, memories, self.frames_at_once) for part in first_alone(frames, state)])
        mean, std = self._statistics(frames.device)
        return (self.conv1(moments)[:, : self.config.latent_channels].float() - mean) / std, memories.state()

    def decode(self, latents: Tensor, state: VAEState | None = None) -> tuple[Tensor, VAEState]:
        """Decode k + 1 normalised latents at a scene's start (`state` None) to 4k + 1 frames, k after it to 4k.

        The frames are float32 and not clamped.
        """
        memories = Memories(self.decoder, state)
        mean, std = self._statistics(latents.device)
        latents = self.conv2(as_weights(latents.float() * std + mean, self.conv2))
        B, _, T, H, W = latents.shape
        scale, factor = self.config.spatial_factor, self.config.temporal_factor
        count = factor * T - (factor - 1 if state is None else 0)
        frames, done = torch.empty(B, 3, count, scale * H, scale * W, device=latents.device), 0
        for part in first_alone(latents, state):
            for piece in self.decoder(part, memories, self.frames_at_once):
                frames[:, :, done : done + piece.shape[2]] = piece
                done += piece.shape[2]
        return frames, memories.state()

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C, 1, 1, 1). Not buffers: these would be keys that no Wan2.1 checkpoint has."""
        both = to_device(torch.tensor([self.config.latent_mean, self.config.latent_std]), device)
        mean, std = both.view(2, -1, 1, 1, 1)
        return mean, std

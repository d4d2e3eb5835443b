"""The Wan2.1 VAE, exact: 8x8 in space, 4x in time, 16 channels (reference: Wan2.1 `wan/modules/vae.py`).

Latent 0 holds frame 0 alone, latent i holds frames 4i - 3 .. 4i. Parameter names are Wan2.1's own, so that original
checkpoints load without a key map.

Wan2.1 encodes one frame and then four a call, and decodes one latent a call, with caches inside its modules. That is
ordinary causal convolution over the whole clip, zeros before frame 0, but for two exceptions at its first frame:

    down: y = cat(x[:1], conv(x))               kernel 3, stride 2, no padding: windows 0-2, 2-4, ...
    up:   y = cat(x[:1], interleave(conv(x[1:])))     zeros, not frame 0, to the left of frame 1

So any number of frames makes a call here; what the convolutions remember between calls is passed in and out.
Activations are channels last (`channels_last_3d`), where a frame's channels lie together and frames can be merged into
the batch without a copy.

Two steps are computed otherwise than Wan2.1 does, to the same values: attention by rows, which bounds its memory, and
doublings without the enlarged picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, repeat, starmap

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duovsr.kernels.dispatch import fused
from duovsr.kernels.vae import after, channel_norm, norm_silu_after
from duovsr.model.tiny_vae import VAEState
from duovsr.options import WanVAEConfig

MOST_SCORES = 2**28  # elements of attention's weights at once, where a backend writes them down: 0.5 GiB in bfloat16


class Memories:
    """What the temporal convolutions of one call remember, in order of use: from the call before, for the call after.

    It lives for one call; between calls it is a `VAEState`.
    """

    def __init__(self, state: VAEState | None) -> None:
        self.at_start = state is None
        self._before: Iterator[Tensor | None] = repeat(None) if state is None else iter(state.memories)
        self._after: list[Tensor] = []

    def prepend(self, x: Tensor, keep: int = 2, zeros: int = 2) -> Tensor:
        """x (B, C, T, H, W) with the last `keep` frames of the call before in front, or with zeros at a start.

        The last `keep` frames of the result are what the next call gets.
        """
        return self._remember(after(x, next(self._before), zeros), keep)

    def prepend_normed(self, x: Tensor, gamma: Tensor) -> Tensor:
        """`prepend` to the SiLU of a `ChannelNorm` of x."""
        return self._remember(norm_silu_after(x, gamma, next(self._before), 2), 2)

    def _remember(self, x: Tensor, keep: int) -> Tensor:
        self._after.append(x[:, :, -keep:].clone())  # a view would keep all of x alive
        return x

    def state(self) -> VAEState:
        return VAEState(tuple(self._after))


class ChannelNorm(nn.Module):
    """Each position's channels divided by their root mean square, times gamma. Input (N, C, ...)."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.gamma)


def causal_conv(in_channels: int, out_channels: int) -> nn.Conv3d:
    """A 3x3x3 convolution whose padding in time is `Memories.prepend`'s."""
    return nn.Conv3d(in_channels, out_channels, 3, padding=(0, 1, 1))


def norm_silu_conv(layers: nn.ModuleDict, norm: str, conv: str, x: Tensor, memories: Memories) -> Tensor:
    """The step of which nearly all of the VAE is made."""
    return layers[conv](memories.prepend_normed(x, layers[norm].get_parameter("gamma")))


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
        h = norm_silu_conv(self.residual, "0", "2", x, memories)
        h = norm_silu_conv(self.residual, "3", "6", h, memories)
        return h + (x if self.shortcut is None else self.shortcut(x))


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
    """Halves H and W and, if `temporal`, the frame rate: T -> T / 2, and at a start T = 2k + 1 -> k + 1."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, memories: Memories) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        first, x = x[:, :, :1], memories.prepend(x, keep=1, zeros=0)
        if not memories.at_start:
            return self.time_conv(x)
        return torch.cat([first, self.time_conv(x)], dim=2) if x.shape[2] > 1 else first


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
    """Doubles H and W, halves C and, if `temporal`, doubles the frame rate: T -> 2T, and at a start T -> 2T - 1."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None
        self.resample = nn.ModuleDict({"1": DoublingConv(channels, channels // 2, 3, padding=1)})

    def forward(self, x: Tensor, memories: Memories) -> Tensor:
        if self.time_conv is not None:
            x = self._double_rate(self.time_conv, x, memories)
        return per_frame(self.resample["1"], x)

    def _double_rate(self, time_conv: nn.Conv3d, x: Tensor, memories: Memories) -> Tensor:
        if not memories.at_start:
            return _interleave(time_conv(memories.prepend(x)))
        first, rest = x[:, :, :1], x[:, :, 1:]
        padded = memories.prepend(rest)
        return torch.cat([first, _interleave(time_conv(padded))], dim=2) if rest.shape[2] else first


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

    def forward(self, frames: Tensor, memories: Memories) -> Tensor:
        """frames (B, 3, T, H, W) -> what becomes mean and log-variance (B, 2 C, T', H / 8, W / 8)."""
        x = self.conv1(memories.prepend(frames))
        for layer in self.downsamples:
            x = layer(x, memories)
        return norm_silu_conv(self.head, "0", "2", self.middle(x, memories), memories)


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

    def forward(self, latents: Tensor, memories: Memories) -> Tensor:
        """latents (B, C, T', H / 8, W / 8), not normalised -> frames (B, 3, T, H, W)."""
        x = self.middle(self.conv1(memories.prepend(latents)), memories)
        for layer in self.upsamples:
            x = layer(x, memories)
        return norm_silu_conv(self.head, "0", "2", x, memories)


class WanVAE(nn.Module):
    """Frames (B, 3, T, H, W) in [-1, 1] <-> normalised latents (B, 16, T', H / 8, W / 8). H, W: multiples of 8."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.conv2 = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, frames: Tensor, state: VAEState | None = None) -> tuple[Tensor, VAEState]:
        """Encode 4k + 1 frames at a scene's start (`state` None), 4k after it; k + 1 or k latents come out.

        The latents are the posterior's mean, normalised by Wan2.1's statistics, float32.
        """
        frames_left = (frames.shape[2] - (state is None)) % self.config.temporal_factor
        assert frames_left == 0, f"{frames.shape[2]} frames"
        assert all(side % self.config.spatial_factor == 0 for side in frames.shape[3:]), tuple(frames.shape)
        memories = Memories(state)
        moments = self.conv1(self.encoder(self._prepare(frames), memories))
        mean, std = self._statistics(frames.device)
        return (moments[:, : self.config.latent_channels].float() - mean) / std, memories.state()

    def decode(self, latents: Tensor, state: VAEState | None = None) -> tuple[Tensor, VAEState]:
        """Decode k + 1 normalised latents at a scene's start (`state` None) to 4k + 1 frames, k after it to 4k.

        The frames are float32 and not clamped.
        """
        memories = Memories(state)
        mean, std = self._statistics(latents.device)
        frames = self.decoder(self.conv2(self._prepare(latents.float() * std + mean)), memories)
        return frames.float(), memories.state()

    def _prepare(self, x: Tensor) -> Tensor:
        """In the weights' type, channels last."""
        return x.to(self.conv1.weight.dtype).contiguous(memory_format=torch.channels_last_3d)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C, 1, 1, 1). Not buffers: these would be keys that no Wan2.1 checkpoint has."""
        both = torch.tensor([self.config.latent_mean, self.config.latent_std], device=device)
        mean, std = both.view(2, -1, 1, 1, 1)
        return mean, std

"""The discriminator of RFS-GAN (paper section 3.4, eq. 8): conv heads on features of both score models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from duovsr.train.roles import DiffusionModel, guided_velocity

Features = tuple[Tensor, ...]

_TAPS = (0.3, 0.6, 0.9)  # of a model's depth: after 9, 18 and 27 of 30 blocks (paper, section 8)


def tapped_blocks(depth: int) -> tuple[int, ...]:
    """Blocks whose output is a feature, from 0."""
    return tuple(max(1, round(fraction * depth)) - 1 for fraction in _TAPS)


def feature_channels(dim: int, used: str) -> int:
    """Of the features of a tap, where models of width `dim` give them: `used` is both, real or fake (Table 5)."""
    return 2 * dim if used == "both" else dim


class ScorePair:
    """The two score models run together; features are taken from the passes that give the scores."""

    def __init__(self, real: DiffusionModel, fake: DiffusionModel, used: str) -> None:
        """`used`: both, real or fake (Table 5)."""
        self.real, self.fake, self.used = real, fake, used
        self._kept: dict[str, list[Tensor]] = {"real": [], "fake": []}
        self._running = False
        for name, model in (("real", real), ("fake", fake)):
            for index in tapped_blocks(len(model.transformer.blocks)):
                model.transformer.blocks[index].register_forward_hook(self._hook(name))

    def __call__(
        self, noisy: Tensor, sigma: Tensor, z_lq: Tensor, guidance: float = 0.0
    ) -> tuple[Tensor, Tensor, Features]:
        """Velocities of both models and the features (B, C, T, h / 2, w / 2) of each tap."""
        for kept in self._kept.values():
            kept.clear()
        self._running = True
        v_fake = self.fake(noisy, z_lq, sigma)
        v_real = guided_velocity(self.real, noisy, z_lq, sigma, guidance)
        self._running = False  # blocks also run again in the backward pass, where activations are recomputed
        taps = len(self._kept["fake"])
        pairs = zip(self._kept["real"][:taps], self._kept["fake"], strict=True)  # guidance calls the model again
        chosen = {"both": slice(0, 2), "real": slice(0, 1), "fake": slice(1, 2)}[self.used]
        # Contiguous: torch 2.13's GroupNorm crashes on a channels-last volume in the backward pass (on the CPU).
        features = tuple(torch.cat(list(pair)[chosen], dim=-1).movedim(-1, 1).float().contiguous() for pair in pairs)
        return v_real, v_fake, features

    def _hook(self, name: str) -> Callable[[nn.Module, object, tuple[Tensor, object]], None]:
        def keep(module: nn.Module, arguments: object, output: tuple[Tensor, object]) -> None:
            if self._running:
                self._kept[name].append(output[0])  # tokens (B, T, H, W, D)

        return keep


class Heads(nn.Module):
    """A small convolutional head for each tap -> a map of logits each. The widths are ours; the paper says
    "convolutional heads"."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(min(32, channels // 4), channels),
                nn.Conv3d(channels, width, 1),
                nn.LeakyReLU(0.2),
                nn.Conv3d(width, width, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv3d(width, 1, 3, padding=1),
            )
            for _ in _TAPS
        )

    def forward(self, features: Features) -> list[Tensor]:
        # In float32: hinge margins are small, and oneDNN's bfloat16 weight gradient of a volume two deep is garbage.
        with torch.autocast(features[0].device.type, enabled=False):
            return [head(feature) for head, feature in zip(self.heads, features, strict=True)]

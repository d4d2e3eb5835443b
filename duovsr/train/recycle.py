"""Dormant features of TinyVAE's decoder, put back to use (ReDo: Sokar et al., "The dormant neuron phenomenon in deep
reinforcement learning", ICML 2023, algorithm 1).

A feature that a ReLU keeps at zero for every picture gets no gradient and stays there: it is computed for nothing.
Features of the LQ itself begin anew as what the others have no eye for, colour without light (ours).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duovsr.model.tiny_vae import Decoder, MemoryBlock, ResBlock, TinyVAE

_COLOR_GAIN = 0.5


@dataclass(frozen=True)
class Features:
    """Inside a residual block: the convolutions whose sum makes them, before a ReLU, and the one that takes them in."""

    made_by: tuple[nn.Conv2d, ...]
    taken_by: nn.Conv2d


def features_of(vae: TinyVAE) -> Iterator[Features]:
    for block in vae.decoder.modules():
        if isinstance(block, MemoryBlock):
            yield Features((block.current, block.previous), block.middle)
            yield Features((block.middle,), block.out)
        elif isinstance(block, ResBlock):
            yield Features((block.first,), block.second)


def recycle(vae: TinyVAE, lq: Tensor, scale: Tensor, threshold: float, generator: torch.Generator) -> tuple[int, int]:
    """Start dormant features anew; returns how many, and of how many.

    Dormant: at most `threshold` times as large, on LQ frames (B, 3, T, H, W), enlarged by `scale` (B,), restored by
    their own latents, as the mean of their layer. Such a one is made from random weights as large as its neighbours',
    and taken with a weight of zero: what the decoder gives changes by no more than what was dormant. Features of
    the LQ, which a skip takes too, see colour alone: grey pictures come out as before. `vae` is frozen as yet.
    """
    everything = list(features_of(vae))
    sizes = _sizes(vae, lq, scale, [*(features.taken_by for features in everything), vae.decoder.lq_down])
    dormant = 0
    for features in everything:
        chosen = _small(sizes[features.taken_by], threshold)
        _begin_anew(features, chosen, generator)
        dormant += int(chosen.sum())
    width = vae.decoder.lq_in.out_channels
    chosen = _small(sizes[vae.decoder.lq_down].view(-1, width).mean(0), threshold)
    _see_color(vae.decoder, chosen, generator)
    return dormant + int(chosen.sum()), sum(features.taken_by.in_channels for features in everything) + width


def _sizes(vae: TinyVAE, lq: Tensor, scale: Tensor, modules: list[nn.Conv2d]) -> dict[nn.Module, Tensor]:
    """The mean of every feature that these modules take in; they come from ReLUs, and none is below zero."""
    sizes: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes[module] = inputs[0].float().mean((0, 2, 3)).cpu()

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    with torch.enable_grad():  # without it, convolutions may bypass their modules
        latents, _ = vae.encode(lq)
        vae.decode(latents, lq, scale=scale)
    for hook in hooks:
        hook.remove()
    return sizes


def _small(sizes: Tensor, threshold: float) -> Tensor:
    return sizes <= threshold * sizes.mean()


@torch.no_grad()
def _begin_anew(features: Features, chosen: Tensor, generator: torch.Generator) -> None:
    if chosen.all() or not chosen.any():  # nothing is dormant beside nothing
        return
    for conv in features.made_by:
        size = conv.weight[~chosen].flatten(1).norm(dim=1).mean()
        fresh = torch.randn(conv.weight[chosen].shape, generator=generator).to(conv.weight)
        conv.weight[chosen] = fresh * (size / fresh.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        if conv.bias is not None:
            conv.bias[chosen] = 0
    features.taken_by.weight[:, chosen] = 0


@torch.no_grad()
def _see_color(decoder: Decoder, chosen: Tensor, generator: torch.Generator) -> None:
    """Let features of the LQ begin as its means over 4 x 4 pixels, each weighed by a random colour that has no light in
    it, so that grey pictures come out as before."""
    conv, down = decoder.lq_in, decoder.lq_down
    assert conv.bias is not None
    colors = torch.randn(int(chosen.sum()), 3, generator=generator)
    colors = F.normalize(colors - colors.mean(dim=1, keepdim=True), dim=1)
    conv.weight[chosen] = 0
    conv.weight[chosen, :, 1, 1] = (_COLOR_GAIN / 4**2 * colors.repeat(1, 4**2)).to(conv.weight)
    conv.bias[chosen] = 0
    down.weight[:, chosen.repeat(down.in_channels // len(chosen))] = 0

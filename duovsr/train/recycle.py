"""Dormant features of TinyVAE's decoder, put back to use (ReDo: Sokar et al., "The dormant neuron phenomenon in deep
reinforcement learning", ICML 2023, algorithm 1).

A feature that a ReLU keeps at zero for every picture gets no gradient and stays there: it is computed for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duovsr.model.tiny_vae import MemoryBlock, ResBlock, TinyVAE


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


def recycle(vae: TinyVAE, lq: Tensor, threshold: float, generator: torch.Generator) -> tuple[int, int]:
    """Start dormant features anew; returns how many, and of how many.

    Dormant: at most `threshold` times as large, on LQ frames (B, 3, T, H, W) restored by their own latents, as the mean
    of their layer. Such a one is made from random weights as large as its neighbours', and taken with a weight of
    zero: what the decoder gives changes by no more than what was dormant. `vae` is frozen as yet.
    """
    everything = list(features_of(vae))
    sizes = {id(features.taken_by): torch.zeros(1) for features in everything}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes[id(module)] = sizes[id(module)] + inputs[0].float().mean((0, 2, 3))  # of a ReLU: never below zero

    hooks = [features.taken_by.register_forward_pre_hook(note) for features in everything]
    with torch.enable_grad():  # without it, convolutions may bypass their modules
        latents, _ = vae.encode(lq)
        vae.decode(latents, lq)
    for hook in hooks:
        hook.remove()
    dormant = 0
    for features in everything:
        size = sizes[id(features.taken_by)]
        chosen = size <= threshold * size.mean()
        _begin_anew(features, chosen, generator)
        dormant += int(chosen.sum())
    return dormant, sum(features.taken_by.in_channels for features in everything)


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

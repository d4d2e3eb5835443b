"""A model with TinyVAE whose widest layers, most of its work, compute in 8 bits (`duovsr.kernels.int8`).

They are the autoencoder's wide 3 x 3 convolutions and the linear layers of the transformer's blocks; the blocks' sums
and what attention works on stay in the dtype that is computed with. The grids of the activations come from one pass
over made-up pictures, with room to spare: the wider range costs less than a value beyond it. What comes into a
residual block of the autoencoder needs no room: where that is clamped, the sum with what it was still is not.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duovsr.kernels.convolution import convolve
from duovsr.kernels.int8 import Grid, Int8Convolution, Int8Linear, is_int8_fast
from duovsr.model.one_step import OneStepModel
from duovsr.model.tiny_vae import MemoryBlock, ResBlock, TinyVAE
from duovsr.model.transformer import Block, CrossAttention, SelfAttention

_ROOM = 1.5  # most grids reach so far beyond what the pictures give
_FRAMES = Grid.over(-1.1, 1.1)  # with what resizing overshoots
_SIDE = 96
_SCALES = (4.0, 4.0, 1.5, 1.5)  # by which each picture is said to be enlarged


class Int8MemoryBlock(nn.Module):
    """`MemoryBlock` for one clip, without gradients; overwrites its input. `seen`: inputs to make its grids by."""

    def __init__(self, block: MemoryBlock, seen: Tensor) -> None:
        super().__init__()
        steps = seen.flatten(0, 1)
        first = convolve(steps, block.current, plus=convolve(steps, block.previous), relu=True)
        inputs = _grid(steps, room=1)
        middle, last = (_grid(x) for x in (first, convolve(first, block.middle, relu=True)))
        both = torch.cat([block.current.weight, block.previous.weight], dim=1)
        self.first = Int8Convolution(both, block.current.bias, inputs, middle)
        self.middle = Int8Convolution(block.middle.weight, block.middle.bias, middle, last)
        self.last = Int8Convolution(block.out.weight, block.out.bias, last)

    def forward(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        steps, grid = x[0], self.first.before
        values = grid.quantise(steps)
        before = torch.cat([values[:1] if memory is None else grid.quantise(memory), values[:-1]])
        memory = x[:, -1].clone()
        h = self.middle(self.first(torch.cat([values, before], dim=1)))
        return self.last(h, onto=steps)[None], memory


class Int8ResBlock(nn.Module):
    """`ResBlock` without gradients; overwrites its input."""

    def __init__(self, block: ResBlock, seen: Tensor) -> None:
        super().__init__()
        middle = _grid(convolve(seen, block.first, relu=True))
        self.first = Int8Convolution(block.first.weight, block.first.bias, _grid(seen, room=1), middle)
        self.second = Int8Convolution(block.second.weight, block.second.bias, middle)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), onto=x)


class Int8FeedForward(nn.Module):
    """A transformer block's `ffn` without gradients."""

    def __init__(self, ffn: nn.Sequential, seen: Tensor) -> None:
        super().__init__()
        first, activation, second = ffn
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        middle = _grid(activation(first(seen)))
        self.first, self.second = Int8Linear(first, _grid(seen), middle), Int8Linear(second, middle)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Int8Attention(nn.Module):
    """A transformer block's attention without gradients; its input is put on its grid once for all projections.

    The keys and values of a prompt are left as they are. `seen`: inputs; `attended`: those of the last projection.
    """

    def __init__(self, attention: SelfAttention | CrossAttention, seen: Tensor, attended: Tensor) -> None:
        super().__init__()
        self.attention, self.grid = attention, _grid(seen)
        for name in ("q", "k", "v") if isinstance(attention, SelfAttention) else ("q",):
            linear = attention.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            attention.set_submodule(name, Int8Linear(linear, self.grid))
        attention.set_submodule("o", Int8Linear(attention.o, _grid(attended)))

    def forward(self, x: Tensor, *others: Tensor | None) -> Any:
        return self.attention(self.grid.quantise(x), *others)


def favours_int8(device: torch.device) -> bool:
    """Whether models that `to_int8` takes are faster so on the device."""
    return device.type == "cpu" and is_int8_fast()


def is_faster_in_int8(model: OneStepModel) -> bool:
    """Whether `to_int8` takes the model, and makes it faster on this machine."""
    return favours_int8(model.device) and model.preset.transformer.streams


@torch.inference_mode()
def to_int8(model: OneStepModel) -> OneStepModel:
    """A model with TinyVAE, on a CPU where `is_int8_fast`, for inference alone. The given one's parts are changed."""
    vae, transformer = model.vae, model.transformer
    assert isinstance(vae, TinyVAE)
    wanted = [module for module in vae.modules() if isinstance(module, MemoryBlock | ResBlock)]
    blocks = [module for module in transformer.blocks if isinstance(module, Block)]
    parts = [(b.self_attn, b.self_attn.o, b.cross_attn, b.cross_attn.o, b.ffn) for b in blocks]
    seen = _inputs(model, [*wanted, vae.decoder.conv_out, *chain.from_iterable(parts)])
    convolutions = {
        "encoder.conv_in": _FRAMES,
        "decoder.lq_in": _FRAMES,
        "decoder.conv_out": _grid(seen[vae.decoder.conv_out]),
    }
    for name, module in list(vae.named_modules()):
        if isinstance(module, MemoryBlock):
            vae.set_submodule(name, Int8MemoryBlock(module, seen[module]))
        elif isinstance(module, ResBlock):
            vae.set_submodule(name, Int8ResBlock(module, seen[module]))
        elif isinstance(module, nn.Conv2d) and name in convolutions:
            vae.set_submodule(name, Int8Convolution(module.weight, module.bias, convolutions[name]))
    for block in blocks:
        for name in ("self_attn", "cross_attn"):
            attention = block.get_submodule(name)
            assert isinstance(attention, SelfAttention | CrossAttention)
            block.set_submodule(name, Int8Attention(attention, seen[attention], seen[attention.o]))
        block.set_submodule("ffn", Int8FeedForward(block.ffn, seen[block.ffn]))
    return replace(model, digest=f"{model.digest} in 8 bits")  # other pixels: a job begun otherwise does not go on so


def _grid(seen: Tensor, room: float = _ROOM) -> Grid:
    return Grid.over(room * min(seen.min().item(), 0.0), room * max(seen.max().item(), 0.0))


def _inputs(model: OneStepModel, modules: list[nn.Module]) -> dict[nn.Module, Tensor]:
    """What comes into the modules where the pictures are restored."""
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module].append(inputs[0])

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    for seed, (picture, scale) in enumerate(zip(_pictures(len(_SCALES)).split(1), _SCALES, strict=True)):
        model.restore(picture, None, seed=seed, scale=scale)
    for hook in hooks:
        hook.remove()
    return {module: torch.cat(parts) for module, parts in seen.items()}


def _pictures(count: int) -> Tensor:
    """(count, 3, 1, side, side) in [-1, 1]: noise of every scale, by turns in hard squares and in soft spots."""
    generator = torch.Generator().manual_seed(0)
    pictures, size = torch.zeros(count, 3, _SIDE, _SIDE), 2
    while size <= _SIDE:
        noise = 0.4 * torch.randn(count, 3, size, size, generator=generator)
        pictures[::2] += F.interpolate(noise[::2], (_SIDE, _SIDE), mode="nearest")
        pictures[1::2] += F.interpolate(noise[1::2], (_SIDE, _SIDE), mode="bilinear")
        size *= 2
    return pictures.clamp_(-1, 1)[:, :, None]

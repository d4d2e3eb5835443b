"""Convolutions that are causal in time, over a clip that comes in pieces."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duovsr.kernels.vae import after, norm_silu_after
from duovsr.model.tiny_vae import VAEState


class Memories:
    """What the convolutions in time of an encoder or a decoder remember: the last frames that each has taken in.

    They live for one call, in which a convolution may be used many times, and are let go one by one as newer ones take
    their place. Between calls they are a `VAEState`, in the order of the convolutions.
    """

    def __init__(self, part: nn.Module, state: VAEState | None) -> None:
        self._convs = [conv for conv in part.modules() if isinstance(conv, nn.Conv3d) and conv.kernel_size[0] > 1]
        self._last: dict[nn.Module, Tensor] = {}
        if state is not None:
            self._last.update(zip(self._convs, state.memories, strict=True))

    def __contains__(self, conv: nn.Module) -> bool:
        """Whether it has taken in anything since the scene's start."""
        return conv in self._last

    def begin(self, conv: nn.Module, frames: Tensor) -> None:
        """Let it remember `frames` without having seen them."""
        self._last[conv] = frames

    def convolve(self, conv: nn.Module, x: Tensor, keep: int = 2) -> Tensor:
        """conv of x (B, C, T, H, W) after what it remembers, or after two zeros at a start; then it keeps the last."""
        x = after(x, self._last.pop(conv, None), 2)
        return self._remember(conv, x, keep)

    def convolve_normed(self, norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
        """`convolve` of the SiLU of a norm of x: the step of which nearly all of the VAE is made."""
        x = norm_silu_after(x, norm.get_parameter("gamma"), self._last.pop(conv, None), 2)
        return self._remember(conv, x, 2)

    def _remember(self, conv: nn.Module, x: Tensor, keep: int) -> Tensor:
        result: Tensor = conv(x)
        self._last[conv] = x[:, :, -keep:].clone()  # a view would keep all of x alive
        return result

    def state(self) -> VAEState:
        return VAEState(tuple(self._last[conv] for conv in self._convs))


def first_alone(x: Tensor, state: VAEState | None) -> list[Tensor]:
    """x (B, C, T, H, W) in the parts that a call takes: changes of the frame rate leave a scene's frame 0 as it is."""
    return [x] if state is not None or x.shape[2] == 1 else [x[:, :, :1], x[:, :, 1:]]


def joined(parts: list[Tensor]) -> Tensor:
    """Parts (B, C, T, H, W) along the time."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def as_weights(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """In the type of the weights, channels last."""
    return x.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last_3d)

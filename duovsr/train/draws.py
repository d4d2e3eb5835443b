"""Random numbers that belong to a sample: a function of (seed, step, part, index), on any device, in any company."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class Draws:
    """The random numbers of a micro-batch, one CPU generator a sample; tensors are returned on `device`.

    `start`: which sample of the global batch its first one is.
    """

    def __init__(self, seeds: list[int], device: torch.device, start: int = 0) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device, self.start = device, start

    @classmethod
    def of(cls, indices: range, *, seed: int | str, step: int, part: int, device: torch.device) -> Draws:
        """Those of samples `indices` of the global batch. `part` tells the updates of one step apart."""
        return cls([_seed(f"{seed}/{step}/{part}/{index}") for index in indices], device, indices.start)

    def __len__(self) -> int:
        return len(self.generators)

    def normal_like(self, x: Tensor, shared: float = 0.0) -> Tensor:
        """Standard normal in the shape of x (B, C, T, H, W); `shared` of the variance is one field for all T, as in
        `flow.noise` at inference."""
        own = torch.stack([torch.randn(x.shape[1:], generator=g) for g in self.generators]).to(self.device)
        if shared == 0.0:
            return own
        common_shape = (x.shape[1], 1, *x.shape[3:])
        common = torch.stack([torch.randn(common_shape, generator=g) for g in self.generators]).to(self.device)
        mixed: Tensor = shared**0.5 * common + (1 - shared) ** 0.5 * own
        return mixed

    def uniform(self) -> Tensor:
        """(B,) in [0, 1)."""
        return torch.stack([torch.rand((), generator=g) for g in self.generators]).to(self.device)

    def normal(self) -> Tensor:
        """(B,), standard normal."""
        return torch.stack([torch.randn((), generator=g) for g in self.generators]).to(self.device)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

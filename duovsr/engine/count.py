"""Counting what a computation takes, by running it on torch's meta device, where tensors have shapes but no values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Result = TypeVar("Result")


@dataclass(frozen=True)
class Work:
    """`flops`: 2 a multiplication and addition, of matrix products, convolutions and attention. `peak_bytes`: of the
    tensors that were made and alive at once; not of kernels' own buffers, nor of what the allocator cannot use.
    `most_elements`: of the largest tensor."""

    flops: int
    peak_bytes: int
    most_elements: int


def count(compute: Callable[[], Result]) -> tuple[Result, Work]:
    """The result and the work of a computation; on real devices it is computed, too."""
    memory = _Memory()
    with torch.inference_mode(), FlopCounterMode(display=False) as flops, memory:
        result = compute()
    return result, Work(flops.get_total_flops(), memory.peak, memory.most_elements)


class _Memory(TorchDispatchMode):
    """Follows the storage of every tensor that an operation returns until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.most_elements = self._live = 0
        self._followed: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.most_elements = max(self.most_elements, tensor.numel())
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._followed:
            self._followed.add(key)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._followed.remove(key)
        self._live -= size

"""Counting the memory that a computation takes, by running it on the meta device: tensors with shapes, no values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def count(compute: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the tensors that were made and alive at once, not of kernels' own buffers, nor of what the allocator
    cannot use; and elements of the largest tensor. On real devices it is computed, too."""
    memory = _Memory()
    with torch.inference_mode(), memory:
        compute()
    return memory.peak, memory.most_elements


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

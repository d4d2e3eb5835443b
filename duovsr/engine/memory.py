"""How much memory there is, and what running out of it looks like."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_UNKNOWN_MEMORY = 4 * 2**30  # Windows: assume a small machine
_PART = 0.6  # of the free memory may be planned for: other processes, fragmentation


def free_memory(device: torch.device) -> int:
    """Bytes that a plan may spend on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _PART)
    if device.type == "mps":
        return int((torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) * _PART)
    return int(_free_host_memory() * _PART)


def _free_host_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        if not hasattr(os, "sysconf"):
            return _UNKNOWN_MEMORY
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    available = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep the large blocks that torch frees on a CPU: it maps and clears each anew by default.

    Every intermediate tensor of a frame is such a block, and clearing them anew is a good part of a frame's time.
    """
    libc = _glibc()
    if device.type == "cpu" and libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises its own type on GPUs, and a plain RuntimeError of the CPU allocator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def weight_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))


def to_host(module: nn.Module) -> None:
    """Move the weights to host memory: page-locked, where the GPU fetches them at the full speed of the bus."""
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_cuda:
            tensor.data = tensor.data.cpu().pin_memory()


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The weights are on `device` in this context, and afterwards where they were: nothing is copied back."""
    tensors = list(chain(module.parameters(), module.buffers()))
    homes = [tensor.data for tensor in tensors]
    try:
        with torch.inference_mode(False):  # weights that inference mode makes could not be put in place
            for tensor in tensors:
                tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None  # musl has no such calls

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

from duovsr.errors import OutOfMemoryError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

# What the CPU's allocator says; CUDA itself, of page-locked memory; its library, of room to work in; and Apple's GPUs'.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory",
)  # fmt: skip
_ONEDNN = "could not create a primitive"  # all that it says then; with more words it is another matter

_UNKNOWN_MEMORY = 4 * 2**30  # Windows: assume a small machine
_PART = 0.6  # of the free memory beside the weights may be planned for: other processes, fragmentation


def free_memory(device: torch.device) -> int:
    """Bytes that nobody holds on `device`."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch does, for itself
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()  # less what torch keeps
    return _free_host_memory()


def spendable(free_bytes: int, weights: int) -> int:
    """What a plan may spend where so much would be free without the weights."""
    return weights + int((free_bytes - weights) * _PART)


def _free_host_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        if not hasattr(os, "sysconf"):
            return _UNKNOWN_MEMORY
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    available = next(line for line in lines if line.startswith("MemAvailable:"))
    return min([int(available.split()[1]) * 1024, *left_in_groups()])


def left_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes that the control groups of this process leave, its own and those around it, as far as they have a limit.

    Containers and batch systems set one: who goes over it is killed, without an error to step down from. Cached files
    do not count, they make room.
    """
    for line in _lines(own):
        number, controllers, name = line.split(":", 2)
        if number == "0":
            top, limit, used, prefix = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):  # version 1
            top, limit, used, prefix = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):  # in a container the nearest that it sees is the top
            bounds = [*_lines(folder / limit), *_lines(folder / used)]
            if folder.is_relative_to(top) and len(bounds) == 2 and bounds[0] != "max":
                stat = dict(line.split() for line in _lines(folder / "memory.stat"))
                cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield max(0, int(bounds[0]) - (int(bounds[1]) - cached))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # a kernel or a sandbox without it
        return []


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep the large blocks that torch frees on a CPU: it maps and clears each anew by default.

    Every intermediate tensor of a frame is such a block, and clearing them anew is a good part of a frame's time.
    """
    libc = _glibc()
    if device.type == "cpu" and libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises its own type where it allocates on GPUs, and a plain RuntimeError elsewhere."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return str(error) == _ONEDNN or any(sign in str(error) for sign in _OUT_OF_MEMORY)


@contextmanager
def memory_errors(hint: str) -> Iterator[None]:
    """Memory that runs out becomes an `OutOfMemoryError` of one line, with this hint."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise OutOfMemoryError(f"out of memory: {reason}" if reason else "out of memory", hint=hint) from error


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


def place(module: nn.Module, device: torch.device) -> None:
    """Move the weights to `device`."""
    module.load_state_dict({name: tensor.to(device) for name, tensor in module.state_dict().items()}, assign=True)


def to_host(module: nn.Module) -> None:
    """Move the weights to page-locked host memory, where a GPU fetches them at the full speed of the bus."""
    home = {name: t if t.is_pinned() else t.cpu().pin_memory() for name, t in module.state_dict().items()}
    module.load_state_dict(home, assign=True)


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The weights are on `device` in this context, and afterwards where they were: nothing is copied back."""
    home = module.state_dict()
    lent_weights = {name: tensor.to(device, non_blocking=True) for name, tensor in home.items()}
    module.load_state_dict(lent_weights, assign=True)
    try:
        yield
    finally:
        module.load_state_dict(home, assign=True)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None  # musl has no such calls

"""The one place where a fused kernel is taken instead of its twin, the same function in plain torch.

Twins define the results: they run on CPUs and other devices, and wherever a gradient is wanted, which the fused ones
do not give. Triton is imported here alone, and only where it can run.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OLDEST = (8, 0)  # compute capability: bfloat16 in matrix units, copies past the registers


def fused(fits: Callable[..., bool] = lambda *args: True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A twin, or the operator `duovsr::` of its name and arguments where that can take its tensors and they fit.

    The twin itself stays reachable as `__wrapped__`.
    """

    def decorate(twin: Callable[P, R]) -> Callable[P, R]:
        name = twin.__name__

        @wraps(twin)
        def dispatched(*args: P.args, **kwargs: P.kwargs) -> R:
            if takes_fused(*(arg for arg in args if isinstance(arg, Tensor))) and fits(*args, **kwargs):
                return getattr(torch.ops.duovsr, name)(*args, **kwargs)
            return twin(*args, **kwargs)

        return dispatched

    return decorate


def takes_fused(*tensors: Tensor) -> bool:
    """Whether Triton's kernels can take these tensors: floats on an NVIDIA GPU, and no gradient wanted."""
    first = tensors[0]
    if not first.is_cuda or first.dtype not in _DTYPES or needs_gradient(*tensors):
        return False
    return triton_failure(first.get_device()) is None


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@torch.compiler.assume_constant_result
def triton_failure(device: int) -> str | None:
    """Why the fused kernels do not run on a CUDA device, found by running one; None: they do."""
    if device != torch.cuda.current_device():  # where Triton launches, whatever the tensors are on
        return "not the current device"
    return _triton_failure(device)


@cache
def _triton_failure(device: int) -> str | None:
    if torch.version.cuda is None:
        return "not an NVIDIA GPU"
    if find_spec("triton") is None:
        return "not installed"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return f"compute capability below {_OLDEST[0]}.{_OLDEST[1]}"
    from triton import TritonError

    try:
        from duovsr.kernels.fused import attention, modulate, prologue, vae  # noqa: F401  # registers the operators

        with torch.inference_mode():
            row = torch.ones(1, 64, dtype=torch.bfloat16, device=torch.device("cuda", device))
            torch.ops.duovsr.rms_norm(row, row[0], 1e-6).cpu()
    except torch.OutOfMemoryError:
        raise  # the plan's to answer
    except (TritonError, RuntimeError, OSError, AssertionError, subprocess.CalledProcessError) as error:
        # Triton needs a C compiler, Python's headers and a GPU that it knows, and says so in one of these ways.
        return f"does not run: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    return None

"""How kernels are cut: what they ask of the device and of the width of a row."""

import torch
import triton
from torch import Tensor

_TILE = 4096  # numbers a program: 32 a thread of four warps, which hold them in registers between two passes


def row_tiles(channels: int) -> dict[str, int]:
    """Whole rows: ROWS of them, BLOCK_D wide, for so many warps."""
    width = triton.next_power_of_2(channels)
    return {"ROWS": max(1, _TILE // width), "BLOCK_D": width, "num_warps": 4 if width <= _TILE else 8}


def capability(x: Tensor) -> tuple[int, int]:
    """Of the GPU that x is on; elsewhere, where kernels are only interpreted or compiled, of an A100."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)

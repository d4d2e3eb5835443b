"""Convolution of images with what follows it, a sum and a ReLU, in one pass over the result."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duovsr.kernels.int8 import Int8Convolution


def convolve(x: Tensor, conv: nn.Conv2d | Int8Convolution, *, relu: bool = False, plus: Tensor | None = None) -> Tensor:
    """conv(x) + plus, then a ReLU where `relu`. x (N, C, H, W); `plus` has the shape of the result."""
    if isinstance(conv, Int8Convolution):
        assert plus is None
        return conv(x, relu=relu)
    return (_one_pass if _is_one_pass(x) else _reference)(x, conv, relu, plus)


def _reference(x: Tensor, conv: nn.Conv2d, relu: bool, plus: Tensor | None) -> Tensor:
    h = conv(x)
    if plus is not None:
        h = h + plus
    return F.relu(h, inplace=not torch.is_grad_enabled()) if relu else h


def _one_pass(x: Tensor, conv: nn.Conv2d, relu: bool, plus: Tensor | None) -> Tensor:
    """oneDNN's, by the operators to which torch.compile lowers these sums on CPUs."""
    shape = (conv.padding, conv.stride, conv.dilation, conv.groups)
    activation = "relu" if relu else None
    if plus is None:
        return torch.ops.mkldnn._convolution_pointwise(x, conv.weight, conv.bias, *shape, activation or "none", [], "")
    fused = torch.ops.mkldnn._convolution_pointwise.binary
    return fused(x, plus, conv.weight, conv.bias, *shape, "add", None, activation, [], None)


def _is_one_pass(x: Tensor) -> bool:
    """The operators have no gradient, and are there where torch was built with oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )

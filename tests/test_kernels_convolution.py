"""Convolutions with what follows them in one pass, and in 8 bits, beside plain torch."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from duovsr.kernels import convolution
from duovsr.kernels.convolution import convolve
from duovsr.kernels.int8 import Grid, Int8Convolution, Int8Linear, is_int8_fast

needs_int8 = pytest.mark.skipif(not is_int8_fast(), reason="a CPU without VNNI, or with AMX")


def channels_last(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_one_pass_equals_plain_torch(kernel: int, relu: bool, added: bool, bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, kernel, padding=kernel // 2, bias=bias)
    x, plus = channels_last(3, 6, 7, 9), channels_last(3, 10, 7, 9) if added else None
    kept = None if plus is None else plus.clone()
    with torch.inference_mode():
        result = convolve(x, conv, relu=relu, plus=plus)
        assert_close(result, convolution._reference(x, conv, relu, plus), rtol=0, atol=1e-5)
    assert plus is None or torch.equal(plus, kept), "the sum's other part is not overwritten"


def test_one_pass_rounds_bfloat16_once() -> None:
    conv, x, plus = nn.Conv2d(8, 8, 3, padding=1), channels_last(2, 8, 5, 6), channels_last(2, 8, 5, 6)
    with torch.inference_mode():
        exact = convolve(x.bfloat16().float(), conv.bfloat16().float(), relu=True, plus=plus.bfloat16().float())
        result = convolve(x.bfloat16(), conv.bfloat16(), relu=True, plus=plus.bfloat16())
    assert result.dtype == torch.bfloat16
    assert_close(result.float(), exact, rtol=2**-8, atol=1e-2)


def test_training_takes_plain_torch() -> None:
    conv, x = nn.Conv2d(4, 4, 3, padding=1), channels_last(1, 4, 5, 5)
    with patch.object(convolution, "_one_pass", side_effect=AssertionError):
        convolve(x, conv, relu=True, plus=x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert convolve(x, conv).dtype == torch.bfloat16
    assert conv.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (-1.0, 2.0), (-0.5, 0.0)])
def test_a_grid_rounds_to_its_nearest_integers_and_clamps(low: float, high: float, dtype: torch.dtype) -> None:
    grid = Grid.over(low, high)
    x = torch.linspace(2 * low - 0.1, 2 * high + 0.1, 501).to(dtype)
    integers = grid.quantise(x)
    assert integers.dtype == torch.uint8
    expected = (x.double() / grid.step + grid.zero).clamp(0, 255)
    largest = 0.51 if dtype == torch.float32 else 0.76  # bfloat16 has steps of 1/2 there
    assert (integers.double() - expected).abs().max() < largest


def int8_twin(conv: nn.Conv2d, x: Tensor, before: Grid) -> Tensor:
    steps = conv.weight.abs().amax((1, 2, 3), keepdim=True) / 127
    values = (before.quantise(x).float() - before.zero) * before.step
    return F.conv2d(values, (conv.weight / steps).round() * steps, conv.bias, padding=conv.padding)


@needs_int8
@pytest.mark.parametrize("kernel", [1, 3])
@torch.inference_mode()
def test_int8_convolution_equals_its_twin(kernel: int) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 10, kernel, padding=kernel // 2), channels_last(3, 6, 7, 9)
    before, after = Grid.over(-3, 3.5), Grid.over(0, 2)
    plain = int8_twin(conv, x, before)
    floats = Int8Convolution(conv.weight, conv.bias, before)
    assert_close(floats(x), plain, rtol=0, atol=1e-5)
    assert_close(convolve(x, floats, relu=True), plain.relu(), rtol=0, atol=1e-5)
    other = channels_last(3, 10, 7, 9)
    assert_close(floats(before.quantise(x), onto=other.clone()), plain + other, rtol=0, atol=1e-5)
    integers = Int8Convolution(conv.weight, conv.bias, before, after)(x)
    assert (integers.int() - after.quantise(plain.relu()).int()).abs().max() <= 1


@needs_int8
@torch.inference_mode()
def test_int8_linear_layer_equals_its_twin() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 10), torch.randn(2, 3, 5, 6)
    before, after = Grid.over(-3, 3.5), Grid.over(-0.2, 2)
    steps = linear.weight.abs().amax(1, keepdim=True) / 127
    values = (before.quantise(x).float() - before.zero) * before.step
    plain = F.linear(values, (linear.weight / steps).round() * steps, linear.bias)
    assert_close(Int8Linear(linear, before)(x), plain, rtol=0, atol=1e-5)
    integers = Int8Linear(linear, before, after)(x)
    assert (integers.int() - after.quantise(F.gelu(plain, approximate="tanh")).int()).abs().max() <= 1

"""Models as they are held in memory: on which device, in which precision, with which attention, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from duovsr.engine.memory import free_memory, spendable, weight_bytes
from duovsr.engine.plan import PAD_MULTIPLE, Precision, WeightBytes
from duovsr.errors import UsageError
from duovsr.model.one_step import OneStepModel
from duovsr.model.quantise import EIGHT_BITS, bytes_held
from duovsr.options import DTYPES


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(device for device in ("cuda", "mps", "cpu") if available[device]))
    if name not in available:
        raise UsageError(f"unknown device: `{name}`", hint="use auto, cpu, cuda or mps")
    if not available[name]:
        raise UsageError(f"device `{name}` is not available", hint="see `duovsr doctor`")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What is computed with: but for a dtype that is named, bfloat16 where the hardware multiplies it, float16 on other
    GPUs, float32 on other CPUs."""
    if name not in DTYPES:
        raise UsageError(f"unknown dtype: `{name}`", hint=f"use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if name == "fp8" and device.type == "mps":
        raise UsageError("device `mps` has no fp8", hint="use int8")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in dtypes:
        return dtypes[name]
    if device.type == "cpu":
        # Private in torch, and the only question that tells native bfloat16 from a slow emulation.
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bfloat16 else torch.float16


def held(
    make: Callable[[torch.dtype], OneStepModel],
    device: torch.device,
    window: int | None,
    attention: str,
    precision: str,
) -> OneStepModel:
    """The model that `make` makes in a dtype, with `window` and `attention`, its weights held in `precision`."""
    dtype = choose_dtype(precision, device)
    model = make(torch.bfloat16 if precision in EIGHT_BITS else dtype)  # the files' own, and no more
    model = model if window is None else with_window(model, window)
    model = model.quantised(precision, dtype) if precision in EIGHT_BITS else model
    model.transformer.attend_with(attention, device)  # last: windows make the transformer anew
    return model


def with_window(model: OneStepModel, pixels: int) -> OneStepModel:
    """The model with attention in local windows of `pixels` of the output a side, instead of over whole frames.

    The cost of full attention grows with the square of a frame's size. Raises UsageError for a model that has windows
    of its own, and for a window that is not a multiple of 32: tokens are 16 pixels, and layers shift by half a window.
    """
    if model.preset.transformer.window is not None:
        raise UsageError(f"preset `{model.preset.name}` has attention windows of its own", hint="leave out `--window`")
    if pixels < 32 or pixels % 32:
        raise UsageError(f"unsupported window: `{pixels}`", hint="use a multiple of 32 pixels")
    return model.with_window(pixels // PAD_MULTIPLE)


def precisions_of(model: OneStepModel, names: Sequence[str]) -> list[Precision]:
    """What the model would take, and leave, with its weights held in each of these ways."""
    parts = (model.transformer, model.vae)
    there = [part for part in parts if next(part.parameters()).device.type == model.device.type]
    free, value_bytes = free_memory(model.device) + sum(map(weight_bytes, there)), model.dtype.itemsize
    precisions = []
    for name in names:
        weights = WeightBytes(bytes_held(model.transformer, name, value_bytes), weight_bytes(model.vae))
        spend = spendable(free, weights.transformer + weights.vae)
        precisions.append(Precision(name, value_bytes, weights, spend))
    return precisions

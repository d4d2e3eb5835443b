"""Models as they are held in memory: with which attention, and what they take in each precision."""

from __future__ import annotations

from collections.abc import Sequence

from duovsr.engine.memory import free_memory, spendable, weight_bytes
from duovsr.engine.plan import PAD_MULTIPLE, Precision, WeightBytes
from duovsr.errors import UsageError
from duovsr.model.one_step import OneStepModel
from duovsr.model.quantise import bytes_held


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

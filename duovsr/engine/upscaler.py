"""Doing: frames through the model in the chunks and tiles of a plan, and whole files from path to path."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.engine import files
from duovsr.engine.blend import blend_tiles
from duovsr.engine.chunks import Chunk, cut_into_chunks
from duovsr.engine.color import transfer_color
from duovsr.engine.files import StageTimes, UpscaleReport
from duovsr.engine.jobs import States
from duovsr.engine.memory import (
    free_memory,
    is_out_of_memory,
    keep_freed_memory,
    release_memory,
    synchronize,
    weight_bytes,
)
from duovsr.engine.phases import restore_clip
from duovsr.engine.plan import PAD_MULTIPLE, TEMPORAL_FACTOR, TILE_OVERLAP, Plan, WeightBytes, plan_clip, step_down
from duovsr.errors import InputError, OutOfMemoryError, UsageError
from duovsr.model.one_step import OneStepModel, RestoreState
from duovsr.model.resize import resize_frames
from duovsr.options import Progress, UpscaleOptions
from duovsr.weights import load_model

FrameArray = TypeVar("FrameArray", np.ndarray, Tensor)


class Upscaler:
    """A loaded one-step model. Streams hold their own state: several may run from one model."""

    def __init__(self, model: OneStepModel) -> None:
        self.model = model

    @classmethod
    def from_preset(
        cls, name: str = "tiny", *, device: str = "auto", dtype: str = "auto", window: int | None = None
    ) -> Upscaler:
        """Load a model. On Linux CPUs this also tells glibc, for the whole process, to keep freed memory.

        `device`: auto, cpu, cuda or mps; `dtype`: auto, float32, bfloat16 or float16; `window`: see `with_window`.
        Raises UsageError for what this machine does not have, InputError for missing or altered model files.
        """
        chosen = choose_device(device)
        keep_freed_memory(chosen)
        model = load_model(name, chosen, choose_dtype(dtype, chosen))
        return cls(model if window is None else with_window(model, window))

    def plan(self, width: int, height: int, options: UpscaleOptions) -> Plan:
        """The plan for a clip of `width` x `height` frames."""
        model = self.model
        weights = WeightBytes(weight_bytes(model.transformer), weight_bytes(model.vae))
        return plan_clip(
            width,
            height,
            options,
            model.preset,
            device=model.device.type,
            dtype=str(model.dtype).removeprefix("torch."),
            dtype_bytes=model.dtype.itemsize,
            free_bytes=free_memory(model.device) + weights.transformer + weights.vae,
            weights=weights,
        )

    def stream(self, frames: Iterable[FrameArray], options: UpscaleOptions | None = None) -> Iterator[FrameArray]:
        """Upscale frames as they come.

        `frames`: (H, W, 3) arrays or tensors, all of one size and type: uint8, uint16, or float32 in [0, 1]. Yields
        the same kind at the target size, one for one. Memory does not grow with their number. Raises InputError
        where a frame differs in size or type from the first, or has another type.
        """
        options = options or UpscaleOptions()
        source = iter(frames)
        for first in source:
            arrays = _checked(_to_numpy(frame) for frame in chain([first], source))
            array = next(arrays)
            plan = self.plan(array.shape[1], array.shape[0], options)
            for output in self.restore(chain([array], arrays), plan, options, StageTimes(), []):
                yield torch.from_numpy(output).to(first.device) if isinstance(first, Tensor) else output

    def upscale_file(
        self,
        source: Path | str,
        destination: Path | str,
        options: UpscaleOptions | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> UpscaleReport:
        """Upscale a video, an image or a numbered sequence of images; `-` is standard input or output.

        `destination` appears whole and verified, or not at all. Every frame keeps its pts; audio and other streams are
        copied. What is done is kept in `DESTINATION.duovsr/` until then: after a crash the same call goes on. When
        `should_stop` says so, the piece at work is finished, and `Interrupted` raised. Raises UsageError, InputError,
        NoSpaceError or OutOfMemoryError (duovsr.errors).
        """
        return files.upscale_file(
            self, Path(source), Path(destination), options or UpscaleOptions(), on_progress, should_stop
        )

    def chunks(
        self, frames: Iterable[np.ndarray], plan: Plan, options: UpscaleOptions, stages: StageTimes
    ) -> Iterator[Chunk]:
        """`frames` in the chunks of `plan`; adds to `stages` what waiting for them took."""
        chunks = cut_into_chunks(frames, plan.chunk, plan.overlap, scene_cuts=options.scene_cuts)
        while True:
            before = time.perf_counter()
            chunk = next(chunks, None)
            stages.decode += time.perf_counter() - before
            if chunk is None:
                return
            yield chunk

    def restore_chunk(
        self,
        chunk: Chunk,
        states: States | None,
        plan: Plan,
        options: UpscaleOptions,
        stages: StageTimes,
        notices: list[str],
    ) -> tuple[list[np.ndarray], States]:
        """(target height, target width, 3) arrays of the chunk's type, and the states for the next chunk.

        Adds to `stages` what it spends, and to `notices` every step down. Raises OutOfMemoryError after the last.
        """
        if states is None or chunk.fresh:
            states = (None,) * len(plan.tiles)
        outputs, states = self._step_down(chunk, states, plan, options, stages, notices)
        return outputs[chunk.warm_up : len(chunk.frames)], states

    def restore(
        self, frames: Iterable[np.ndarray], plan: Plan, options: UpscaleOptions, stages: StageTimes, notices: list[str]
    ) -> Iterator[np.ndarray]:
        """(H, W, 3) arrays in, (target height, target width, 3) arrays of the same type out, as `plan` says."""
        states: States | None = None
        for chunk in self.chunks(frames, plan, options, stages):
            outputs, states = self.restore_chunk(chunk, states, plan, options, stages, notices)
            yield from outputs

    def _step_down(
        self, chunk: Chunk, states: States, plan: Plan, options: UpscaleOptions, stages: StageTimes, notices: list[str]
    ) -> tuple[list[np.ndarray], States]:
        """Restore a chunk; where memory runs out, with less of it."""
        try:
            return self._restore_chunk(chunk, states, plan, options, stages)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory(self.model.device)
        if self.model.preset.transformer.streams:
            return self._in_halves(chunk, states, plan, options, stages, notices)
        smaller = step_down(plan)
        if smaller is None:
            raise OutOfMemoryError(
                f"out of {plan.device} memory with a chunk of {chunk.padded_length} frames",
                hint="use a smaller `--chunk` or `--size`, or `--device cpu`",
            )
        tiles = "" if len(smaller.tiles) == 1 else f", {len(smaller.tiles)} tiles of all"
        notice = f"memory ran out: the autoencoder went on with {smaller.pieces}{tiles}"
        if notice not in notices:
            notices.append(notice)
        return self._step_down(chunk, (None,) * len(smaller.tiles), smaller, options, stages, notices)

    def _in_halves(
        self, chunk: Chunk, states: States, plan: Plan, options: UpscaleOptions, stages: StageTimes, notices: list[str]
    ) -> tuple[list[np.ndarray], States]:
        """Each half hands its state to the next."""
        head = (chunk.padded_length // 2 - chunk.fresh) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + chunk.fresh
        if not 0 < head < chunk.padded_length:
            raise OutOfMemoryError(
                f"out of {plan.device} memory with a chunk of {chunk.padded_length} frames",
                hint="use a smaller `--tile` (512 is the least) or `--device cpu`",
            )
        notice = f"memory ran out: chunks of {chunk.padded_length} frames were halved"
        if notice not in notices:
            notices.append(notice)
        first, rest = chunk.split(head)
        done, states = self._step_down(first, states, plan, options, stages, notices)
        more, states = self._step_down(rest, states, plan, options, stages, notices)
        return done + more, states

    @torch.inference_mode()
    def _restore_chunk(
        self, chunk: Chunk, states: States, plan: Plan, options: UpscaleOptions, stages: StageTimes
    ) -> tuple[list[np.ndarray], States]:
        device, (width, height) = self.model.device, plan.target_size
        times = [time.perf_counter()]

        def measured() -> float:
            synchronize(device)
            times.append(time.perf_counter())
            return times[-1] - times[-2]

        lq = resize_frames(_to_tensor(chunk.padded_frames(), device), height, width)
        stages.copies += measured()
        hq, next_states = self.restore_lq(lq, chunk.start, states, plan, options)
        stages.model += measured()
        outputs = []
        for part, lq_part in zip(hq.split(TEMPORAL_FACTOR, 2), lq.split(TEMPORAL_FACTOR, 2), strict=True):
            colored = transfer_color(part, lq_part, options.color)  # of a few frames at once, which bounds its memory
            stages.color += measured()
            outputs += _to_arrays(colored, chunk.frames[0].dtype)
            stages.copies += measured()
        return outputs, next_states

    def restore_lq(
        self, lq: Tensor, start: int, states: States, plan: Plan, options: UpscaleOptions
    ) -> tuple[Tensor, States]:
        """HQ frames, not clamped, of LQ frames (1, 3, T, H, W) at the target size; and the tiles' next states.

        `start`: how many frames after the scene's the first one is.
        """
        model, (height, width) = self.model, lq.shape[3:]
        padding = (0, plan.padded_size[0] - width, 0, plan.padded_size[1] - height, 0, 0)
        padded = F.pad(lq, padding, mode="replicate") if any(padding) else lq
        strength = model.preset.default_strength if options.strength is None else options.strength
        next_states: list[RestoreState | None] = []

        def restored() -> Iterator[Tensor]:
            for tile, state in zip(plan.tiles, states, strict=True):
                region = padded[..., tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
                origin = (start // TEMPORAL_FACTOR, tile.y, tile.x)
                if model.preset.transformer.streams:
                    part, state = model.restore(region, state, seed=options.seed, strength=strength, origin=origin)
                else:
                    part = restore_clip(model, region, plan, seed=options.seed, strength=strength, origin=origin)
                next_states.append(state)
                yield part

        hq = blend_tiles(restored(), plan.tiles, *plan.padded_size, TILE_OVERLAP)
        return hq[..., :height, :width], tuple(next_states)


_FRAME_DTYPES = (np.uint8, np.uint16, np.float32)
_FRAME_HINT = "frames are (H, W, 3) arrays or tensors of uint8, uint16 or float32"


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
    """`auto` is bfloat16 where the hardware multiplies it, float16 on other GPUs, float32 on other CPUs."""
    if name == "auto":
        if device.type == "cpu":
            # Private in torch, and the only question that tells native bfloat16 from a slow emulation.
            return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise UsageError(f"unknown dtype: `{name}`", hint="use auto, float32, bfloat16 or float16")
    return dtypes[name]


def _to_tensor(frames: np.ndarray, device: torch.device) -> Tensor:
    """(T, H, W, 3) uint8, uint16 or float32 in [0, 1] -> (1, 3, T, H, W) float32 in [-1, 1]."""
    top = float(np.iinfo(frames.dtype).max) if np.issubdtype(frames.dtype, np.integer) else 1.0
    # torch's uint16 has few operations: widen before the transfer.
    wide = frames.astype(np.float32) if frames.dtype == np.uint16 else frames
    return torch.from_numpy(wide).to(device).permute(3, 0, 1, 2)[None].float() * (2 / top) - 1


def _to_arrays(frames: Tensor, dtype: np.dtype) -> list[np.ndarray]:
    """(1, 3, T, H, W) float32 in [-1, 1] -> T arrays (H, W, 3) of `dtype`."""
    pixels = frames[0].permute(1, 2, 3, 0).add(1).clamp_(0, 2)
    if not np.issubdtype(dtype, np.integer):
        return list(pixels.mul_(0.5).contiguous().cpu().numpy())
    scaled = pixels.mul_(np.iinfo(dtype).max / 2).round_()
    # Through int32: conversions from float to uint16 are not implemented on every device.
    whole = scaled.to(torch.uint8 if dtype == np.uint8 else torch.int32)
    return list(whole.contiguous().cpu().numpy().astype(dtype, copy=False))


def _to_numpy(frame: np.ndarray | Tensor) -> np.ndarray:
    """A copy: frames wait for their chunk, and many readers fill one buffer again and again."""
    if isinstance(frame, Tensor):
        if frame.dtype not in (torch.uint8, torch.uint16, torch.float32):
            raise InputError(f"frames of {frame.dtype}", hint=_FRAME_HINT)
        return frame.detach().cpu().numpy().copy()
    if not isinstance(frame, np.ndarray):
        raise InputError(f"a frame is a {type(frame).__name__}", hint=_FRAME_HINT)
    return frame.copy()


def _checked(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    expected: tuple[tuple[int, ...], np.dtype] | None = None
    for n, frame in enumerate(frames):
        if frame.ndim != 3 or frame.shape[2] != 3 or not frame.size or frame.dtype not in _FRAME_DTYPES:
            raise InputError(f"frame {n} is {frame.dtype} of shape {frame.shape}", hint=_FRAME_HINT)
        expected = expected or (frame.shape, frame.dtype)
        if (frame.shape, frame.dtype) != expected:
            raise InputError(f"frame {n} is {frame.dtype} {frame.shape}, the first was {expected[1]} {expected[0]}")
        yield frame

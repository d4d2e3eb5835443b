"""Doing: frames through the model in the chunks and tiles of a plan, and whole files from path to path."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.engine import files
from duovsr.engine.blend import Tail, blend_tiles, cross_fade
from duovsr.engine.chunks import Chunk, cut_into_chunks
from duovsr.engine.color import transfer_color
from duovsr.engine.files import StageTimes, UpscaleReport
from duovsr.engine.frames import checked, to_arrays, to_numpy, to_tensor
from duovsr.engine.jobs import States, TileStates
from duovsr.engine.memory import is_out_of_memory, keep_freed_memory, release_memory, synchronize
from duovsr.engine.phases import restore_clip
from duovsr.engine.plan import TEMPORAL_FACTOR, TILE_OVERLAP, Plan, plan_clip, shorter_calls, step_down
from duovsr.engine.precision import precisions_of, with_window
from duovsr.errors import OutOfMemoryError, UsageError
from duovsr.model.int8 import is_faster_in_int8, to_int8
from duovsr.model.one_step import OneStepModel, RestoreState
from duovsr.model.quantise import EIGHT_BITS
from duovsr.model.resize import resize_frames
from duovsr.options import DTYPES, Progress, UpscaleOptions
from duovsr.weights import load_model

FrameArray = TypeVar("FrameArray", np.ndarray, Tensor)


class Upscaler:
    """A loaded one-step model. Streams hold their own state: several may run from one model.

    `precisions`: ways to hold the weights, of which a plan takes the first that leaves enough memory; `load` makes the
    model so held. Without them the model stays as it is.
    """

    def __init__(
        self,
        model: OneStepModel,
        load: Callable[[str], OneStepModel] | None = None,
        precisions: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self.precisions = precisions or (model.precision,)
        self._load = load
        self._fitting: dict[Plan, Plan] = {}  # what plans had to give way to, where memory ran out

    @classmethod
    def from_preset(
        cls,
        name: str = "tiny",
        *,
        device: str = "auto",
        dtype: str = "auto",
        window: int | None = None,
        vae: str | None = None,
        attention: str = "auto",
    ) -> Upscaler:
        """Load a model. On Linux CPUs this also tells glibc, for the whole process, to keep freed memory.

        `device`: auto, cpu, cuda or mps; `dtype`: auto (on some CPUs `tiny` with 8-bit layers), float32, bfloat16 or
        float16, or int8 or fp8 for the transformer's weights alone; `window`: see `with_window`; `vae`: wan or tiny, if
        not the model's own; `attention`: triton, cudnn, sdpa or xformers, if not the fastest. Raises UsageError for
        what this machine or the model does not have, InputError for missing or altered model files.
        """
        chosen = choose_device(device)
        keep_freed_memory(chosen)
        return cls.loaded(lambda kind: load_model(name, chosen, kind, vae), dtype, chosen, window, attention)

    @classmethod
    def loaded(
        cls,
        make: Callable[[torch.dtype], OneStepModel],
        dtype: str,
        device: torch.device,
        window: int | None,
        attention: str = "auto",
    ) -> Upscaler:
        """With the model that `make` makes in a dtype, and anew where a plan wants its weights held otherwise."""
        load = partial(_held, make, device, window, attention)
        compute = str(choose_dtype(dtype, device)).removeprefix("torch.")
        model = load(dtype if dtype in EIGHT_BITS else compute)
        if dtype == "auto" and is_faster_in_int8(model):
            model = to_int8(model)
        short = dtype == "auto" and not model.preset.transformer.streams  # weights are most of what these take
        return cls(model, load, (model.precision, "int8") if short else (model.precision,))

    def plan(self, width: int, height: int, options: UpscaleOptions) -> Plan:
        """The plan for a clip of `width` x `height` frames."""
        model = self.model
        precisions = precisions_of(model, self.precisions)
        return plan_clip(width, height, options, model.preset, device=model.device.type, precisions=precisions)

    def stream(self, frames: Iterable[FrameArray], options: UpscaleOptions | None = None) -> Iterator[FrameArray]:
        """Upscale frames as they come.

        `frames`: (H, W, 3) arrays or tensors, all of one size and type: uint8, uint16, or float32 in [0, 1]. Yields
        the same kind at the target size, one for one. Memory does not grow with their number. Raises InputError
        where a frame differs in size or type from the first, or has another type.
        """
        options = options or UpscaleOptions()
        source = iter(frames)
        for first in source:
            arrays = checked(to_numpy(frame) for frame in chain([first], source))
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
        chunks = cut_into_chunks(frames, plan.chunk, plan.overlap, fade=plan.fade, scene_cuts=options.scene_cuts)
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
        """`chunk.shown` arrays (target height, target width, 3) of the chunk's type, and the states for the next chunk.

        Adds to `stages` what it spends, and to `notices` every step down. Raises OutOfMemoryError after the last.
        """
        if plan.dtype != self.precisions[0]:
            _note(notices, f"memory is short: the transformer's weights are held as {plan.dtype}")
        self._hold(plan.dtype)
        before: TileStates = (None,) * len(plan.tiles)
        if isinstance(states, tuple) and not chunk.fresh:
            before = states
        outputs, after = self._step_down(chunk, before, plan, options, stages, notices)
        if chunk.fade:
            assert isinstance(states, Tail)
            outputs[: chunk.fade] = cross_fade(states, outputs[: chunk.fade])
        end = chunk.warm_up + chunk.shown
        return outputs[chunk.warm_up : end], _tail(outputs[end:]) if plan.fade else after

    def restore(
        self, frames: Iterable[np.ndarray], plan: Plan, options: UpscaleOptions, stages: StageTimes, notices: list[str]
    ) -> Iterator[np.ndarray]:
        """(H, W, 3) arrays in, (target height, target width, 3) arrays of the same type out, as `plan` says."""
        states: States | None = None
        for chunk in self.chunks(frames, plan, options, stages):
            outputs, states = self.restore_chunk(chunk, states, plan, options, stages, notices)
            yield from outputs

    def _hold(self, precision: str) -> None:
        """Load the weights anew where they are held otherwise."""
        if precision != self.model.precision:
            assert self._load is not None, "a plan of another model"
            del self.model  # its memory, before the next one takes it
            self.model = self._load(precision)

    def _step_down(
        self,
        chunk: Chunk,
        states: TileStates,
        plan: Plan,
        options: UpscaleOptions,
        stages: StageTimes,
        notices: list[str],
    ) -> tuple[list[np.ndarray], TileStates]:
        """Restore a chunk; where memory runs out, it and those after it with less."""
        streams = self.model.preset.transformer.streams
        fitting = self._fitting.get(plan, plan)
        while True:
            if fitting != plan:
                _note(notices, f"memory ran out: {_how(fitting, streams)}")
            try:
                return self._in_calls(chunk, states, fitting, options, stages)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            release_memory(self.model.device)
            smaller = shorter_calls(fitting) if streams else step_down(fitting)
            if smaller is None:
                self._fitting.pop(plan, None)  # at another time there may be more
                hint = "a smaller `--tile` (512 is the least)" if streams else "a smaller `--chunk` or `--size`"
                raise OutOfMemoryError(
                    f"out of {plan.device} memory with a chunk of {chunk.padded_length} frames",
                    hint=f"use {hint}, or `--device cpu`",
                )
            fitting = self._fitting[plan] = smaller

    def _in_calls(
        self, chunk: Chunk, states: TileStates, plan: Plan, options: UpscaleOptions, stages: StageTimes
    ) -> tuple[list[np.ndarray], TileStates]:
        if not self.model.preset.transformer.streams:
            return self._restore_chunk(chunk, (None,) * len(plan.tiles), plan, options, stages)
        outputs = []
        for call in chunk.calls(plan.chunk + (plan.overlap or 0)):
            done, states = self._restore_chunk(call, states, plan, options, stages)
            outputs += done
        return outputs, states

    @torch.inference_mode()
    def _restore_chunk(
        self, chunk: Chunk, states: TileStates, plan: Plan, options: UpscaleOptions, stages: StageTimes
    ) -> tuple[list[np.ndarray], TileStates]:
        device, (width, height) = self.model.device, plan.target_size
        times = [time.perf_counter()]

        def measured() -> float:
            synchronize(device)
            times.append(time.perf_counter())
            return times[-1] - times[-2]

        lq = resize_frames(to_tensor(chunk.padded_frames(), device), height, width)
        stages.copies += measured()
        hq, next_states = self.restore_lq(lq, chunk.start, states, plan, options)
        stages.model += measured()
        outputs = []
        for part, lq_part in zip(hq.split(TEMPORAL_FACTOR, 2), lq.split(TEMPORAL_FACTOR, 2), strict=True):
            colored = transfer_color(part, lq_part, options.color)  # of a few frames at once, which bounds its memory
            stages.color += measured()
            outputs += to_arrays(colored, chunk.frames[0].dtype)
            stages.copies += measured()
        return outputs[: len(chunk.frames)], next_states

    def restore_lq(
        self, lq: Tensor, start: int, states: TileStates, plan: Plan, options: UpscaleOptions
    ) -> tuple[Tensor, TileStates]:
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


def _held(
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


def _how(plan: Plan, streams: bool) -> str:
    """How the work went on by a smaller plan, in words."""
    if streams:
        return f"the model went on with calls of {plan.chunk} frames"
    tiles = "" if len(plan.tiles) == 1 else f", {len(plan.tiles)} tiles of all"
    return f"the autoencoder went on with {plan.pieces}{tiles}"


def _note(notices: list[str], notice: str) -> None:
    if notice not in notices:
        notices.append(notice)


def _tail(outputs: list[np.ndarray]) -> Tail:
    return Tail(torch.from_numpy(np.array(outputs)))

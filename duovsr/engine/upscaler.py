"""Doing: frames through the model in the chunks and tiles of a plan, and whole files from path to path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.engine.blend import Tail, blend_tiles, cross_fade
from duovsr.engine.chunks import Chunk, cut_into_chunks
from duovsr.engine.color import transfer_color
from duovsr.engine.frames import checked, to_floats, to_numpy, to_pixels
from duovsr.engine.memory import is_out_of_memory, keep_freed_memory, release_memory
from duovsr.engine.phases import restore_clip
from duovsr.engine.pipeline import one_ahead
from duovsr.engine.plan import TEMPORAL_FACTOR, TILE_OVERLAP, Plan, plan_clip, shorter_calls, step_down
from duovsr.engine.precision import choose_device, choose_dtype, held, precisions_of
from duovsr.engine.run import Launched, Run, States, TileStates
from duovsr.engine.stages import Marks, StageTimes, Watch, WatchedModel, new_clock
from duovsr.engine.transfer import Arriving, transfer_to
from duovsr.errors import OutOfMemoryError, Remark
from duovsr.model.int8 import is_faster_in_int8, to_int8
from duovsr.model.one_step import OneStepModel, RestoreState
from duovsr.model.quantise import EIGHT_BITS
from duovsr.model.resize import resize_frames
from duovsr.options import Progress, UpscaleOptions
from duovsr.weights import load_model

if TYPE_CHECKING:
    from duovsr.engine.files import UpscaleReport

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
        load = partial(held, make, device, window, attention)
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
        the same kind at the target size, one for one. Memory does not grow with their number. What `options` say of
        files (`start`, `end`, codecs, sound) has no effect here. Raises InputError where a frame differs in size or
        type from the first, or has another type; UsageError for options that cannot be; OutOfMemoryError.
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
        NoSpaceError, OutOfMemoryError, or DuovsrError itself where the output cannot be written (duovsr.errors).
        """
        from duovsr.engine import files  # with PyAV, which frames in memory do not need

        return files.upscale_file(
            self, Path(source), Path(destination), options or UpscaleOptions(), on_progress, should_stop
        )

    def begin(self, plan: Plan, options: UpscaleOptions, stages: StageTimes, notices: list[str]) -> Run:
        """For the chunks of one clip; adds to `stages` what it spends, and to `notices` every step down."""
        device = self.model.device
        return Run(plan, options, notices, new_clock(device, stages), transfer_to(device))

    def chunks(self, frames: Iterable[np.ndarray], run: Run) -> Iterator[Chunk]:
        """`frames` in the chunks of the plan."""
        plan = run.plan
        chunks = cut_into_chunks(frames, plan.chunk, plan.overlap, fade=plan.fade, scene_cuts=run.options.scene_cuts)
        while True:
            with run.clock.spent("reading"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def launch(self, chunk: Chunk, states: States | None, run: Run) -> Launched:
        """Give the device a chunk, with the states of the one before, launched or loaded; a CPU does it at once.

        Raises OutOfMemoryError after the last step down.
        """
        plan = run.plan
        if plan.dtype != self.precisions[0]:
            _note(run.notices, f"memory is short: the transformer's weights are held as {plan.dtype}")
        self._hold(plan.dtype)
        before: TileStates = (None,) * len(plan.tiles)
        if isinstance(states, tuple) and not chunk.fresh:
            before = states
        marks = run.clock.start()
        arriving, after = self._step_down(chunk, before, run, marks)
        return Launched(chunk, arriving, after, marks)

    def finish(self, launched: Launched, states: States | None, run: Run) -> tuple[list[np.ndarray], States]:
        """`chunk.shown` arrays (target height, target width, 3) of the chunk's type, and the states for the next chunk.

        Once for every launched chunk, in their order, with the states of the one before, finished or loaded.
        """
        chunk, outputs = launched.chunk, list[np.ndarray]()
        with run.clock.spent("copies"):
            while launched.arriving:
                outputs += list(launched.arriving.pop(0)().view(chunk.frames[0].dtype))
        launched.marks.read()
        if chunk.fade:
            assert isinstance(states, Tail)
            outputs[: chunk.fade] = cross_fade(states, outputs[: chunk.fade])
        end = chunk.warm_up + chunk.shown
        return outputs[chunk.warm_up : end], _tail(outputs[end:]) if run.plan.fade else launched.states

    def restore(
        self, frames: Iterable[np.ndarray], plan: Plan, options: UpscaleOptions, stages: StageTimes, notices: list[str]
    ) -> Iterator[np.ndarray]:
        """(H, W, 3) arrays in, (target height, target width, 3) arrays of the same type out, as `plan` says."""
        run = self.begin(plan, options, stages, notices)
        states: States | None = None
        for launched in one_ahead(self._launched(frames, run), run.transfer.ahead):
            outputs, states = self.finish(launched, states, run)
            yield from outputs

    def _launched(self, frames: Iterable[np.ndarray], run: Run) -> Iterator[Launched]:
        states: TileStates | None = None
        for chunk in self.chunks(frames, run):
            launched = self.launch(chunk, states, run)
            states = launched.states
            yield launched

    def _hold(self, precision: str) -> None:
        """Load the weights anew where they are held otherwise."""
        if precision != self.model.precision:
            assert self._load is not None, "a plan of another model"
            before = self.model.precision
            del self.model  # its memory, before the next one takes it
            try:
                self.model = self._load(precision)
            except Exception:
                self.model = self._load(before)  # for the next clip
                raise

    def _step_down(self, chunk: Chunk, states: TileStates, run: Run, marks: Marks) -> tuple[list[Arriving], TileStates]:
        """Restore a chunk; where memory runs out, it and those after it with less."""
        streams, plan = self.model.preset.transformer.streams, run.plan
        fitting = self._fitting.get(plan, plan)
        while True:
            if fitting != plan:
                _note(run.notices, f"memory ran out: {_how(fitting, streams)}")
            try:
                return self._in_calls(chunk, states, fitting, run, marks)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            release_memory(self.model.device)
            smaller = shorter_calls(fitting) if streams else step_down(fitting)
            if smaller is None:
                self._fitting.pop(plan, None)  # at another time there may be more
                hint = "a smaller `--tile` (512 is the least)" if streams else "a smaller `--chunk` or `--size`"
                elsewhere = "" if plan.device == "cpu" else ", or `--device cpu`"
                raise OutOfMemoryError(
                    f"out of {plan.device} memory with a chunk of {chunk.padded_length} frames",
                    hint=f"use {hint}{elsewhere}",
                )
            fitting = self._fitting[plan] = smaller

    def _in_calls(
        self, chunk: Chunk, states: TileStates, plan: Plan, run: Run, marks: Marks
    ) -> tuple[list[Arriving], TileStates]:
        if not self.model.preset.transformer.streams:
            return self._restore_chunk(chunk, (None,) * len(plan.tiles), plan, run, marks)
        arriving = []
        for call in chunk.calls(plan.chunk + (plan.overlap or 0)):
            parts, states = self._restore_chunk(call, states, plan, run, marks)
            arriving += parts
        return arriving, states

    @torch.inference_mode()
    def _restore_chunk(
        self, chunk: Chunk, states: TileStates, plan: Plan, run: Run, marks: Marks
    ) -> tuple[list[Arriving], TileStates]:
        """As the device sees it: nothing in it waits for results."""
        width, height = plan.target_size
        lq = to_floats(run.transfer.upload(chunk.padded_frames()))
        marks("copies")
        lq = resize_frames(lq, height, width)
        marks("resize")
        hq, next_states = self.restore_lq(lq, chunk.start, states, plan, run.options, marks.ending)
        marks("decode")
        color = run.options.color or self.model.preset.default_color
        arriving, left = [], len(chunk.frames)
        for part, lq_part in zip(hq.split(TEMPORAL_FACTOR, 2), lq.split(TEMPORAL_FACTOR, 2), strict=True):
            if left <= 0:  # what is left was padding
                break
            colored = transfer_color(part, lq_part, color)  # of a few frames, which bounds its memory
            marks("color")
            arriving.append(run.transfer.download(to_pixels(colored, chunk.frames[0].dtype)[:left]))
            left -= part.shape[2]
            marks("copies")
        return arriving, next_states

    def restore_lq(
        self,
        lq: Tensor,
        start: int,
        states: TileStates,
        plan: Plan,
        options: UpscaleOptions,
        watch: Watch | None = None,
    ) -> tuple[Tensor, TileStates]:
        """HQ frames, not clamped, of LQ frames (1, 3, T, H, W) at the target size; and the tiles' next states.

        `start`: how many frames after the scene's the first one is. `watch`: see `WatchedModel`.
        """
        model, (height, width) = self.model, lq.shape[3:]
        if watch is not None and isinstance(model, OneStepModel):
            model = WatchedModel(**{**vars(model), "watch": watch})
        padding = (0, plan.padded_size[0] - width, 0, plan.padded_size[1] - height, 0, 0)
        padded = F.pad(lq, padding, mode="replicate") if any(padding) else lq
        strength = model.preset.default_strength if options.strength is None else options.strength
        next_states: list[RestoreState | None] = []

        def restored() -> Iterator[Tensor]:
            for tile, state in zip(plan.tiles, states, strict=True):
                region = padded[..., tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
                origin = (start // TEMPORAL_FACTOR, tile.y, tile.x)
                if model.preset.transformer.streams:
                    part, state = model.restore(
                        region, state, seed=options.seed, strength=strength, origin=origin, scale=plan.scale
                    )
                else:
                    part = restore_clip(model, region, plan, seed=options.seed, strength=strength, origin=origin)
                next_states.append(state)
                yield part
                del part  # not while the next one is made

        hq = blend_tiles(restored(), plan.tiles, *plan.padded_size, TILE_OVERLAP)
        return hq[..., :height, :width], tuple(next_states)


def _how(plan: Plan, streams: bool) -> str:
    """How the work went on by a smaller plan, in words."""
    if streams:
        return f"the model went on with calls of {plan.chunk} frames"
    tiles = "" if len(plan.tiles) == 1 else f", {len(plan.tiles)} tiles of all"
    return f"the autoencoder went on with {plan.pieces}{tiles}"


def _note(notices: list[str], notice: str) -> None:
    """A step down, once."""
    if notice not in notices:
        notices.append(Remark(notice))


def _tail(outputs: list[np.ndarray]) -> Tail:
    return Tail(torch.from_numpy(np.array(outputs)))

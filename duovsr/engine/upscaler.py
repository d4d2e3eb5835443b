"""Doing: frames through the model in the chunks and tiles of a plan, and whole files from path to path."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.engine.blend import blend_tiles
from duovsr.engine.chunks import Chunk, cut_into_chunks
from duovsr.engine.color import transfer_color
from duovsr.engine.memory import free_memory, is_out_of_memory, keep_freed_memory, release_memory
from duovsr.engine.pipeline import BackgroundSink, prefetch
from duovsr.engine.plan import TEMPORAL_FACTOR, Plan, plan_clip
from duovsr.errors import InputError, OutOfMemoryError, UsageError
from duovsr.model.one_step import OneStepModel, RestoreState
from duovsr.model.resize import resize_frames
from duovsr.options import Progress, UpscaleOptions
from duovsr.video.info import VideoInfo, probe
from duovsr.video.output import atomic_output, check_space, check_target, container_format, verify_output
from duovsr.video.reader import Frame, VideoReader
from duovsr.video.writer import VideoWriter
from duovsr.weights import load_model

FrameArray = TypeVar("FrameArray", np.ndarray, Tensor)
States = tuple[RestoreState | None, ...]  # one a tile


@dataclass
class StageTimes:
    """Seconds spent by the model's thread; `decode` and `encode` are what it waited for the threads beside it."""

    decode: float = 0.0
    model: float = 0.0
    color: float = 0.0
    encode: float = 0.0


@dataclass(frozen=True)
class UpscaleReport:
    """What was done to one file."""

    frames: int
    seconds: float
    plan: Plan
    notices: tuple[str, ...]
    stages: StageTimes


class Upscaler:
    """A loaded one-step model. Streams hold their own state: several may run from one model."""

    def __init__(self, model: OneStepModel) -> None:
        self.model = model

    @classmethod
    def from_preset(cls, name: str = "tiny", *, device: str = "auto", dtype: str = "auto") -> Upscaler:
        """Load a shipped model. On Linux CPUs this also tells glibc, for the whole process, to keep freed memory.

        `device`: auto, cpu, cuda or mps; `dtype`: auto, float32, bfloat16 or float16. Raises UsageError for what this
        machine does not have, InputError for missing or altered model files.
        """
        chosen = choose_device(device)
        keep_freed_memory(chosen)
        return cls(load_model(name, chosen, choose_dtype(dtype, chosen)))

    def plan(self, width: int, height: int, options: UpscaleOptions) -> Plan:
        """The plan for a clip of `width` x `height` frames."""
        return plan_clip(
            width,
            height,
            options,
            device=self.model.device.type,
            dtype=str(self.model.dtype).removeprefix("torch."),
            dtype_bytes=self.model.dtype.itemsize,
            free_bytes=free_memory(self.model.device),
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
    ) -> UpscaleReport:
        """Upscale a video file; `destination` appears whole and verified, or not at all.

        Every frame keeps its pts; audio and other streams are copied. Raises UsageError, InputError, NoSpaceError or
        OutOfMemoryError (duovsr.errors); interrupting leaves nothing behind.
        """
        source, destination, options = Path(source), Path(destination), options or UpscaleOptions()
        info = probe(source)
        check_target(source, destination, options.overwrite)
        plan = self.plan(info.width, info.height, options)
        check_space(destination, _estimate_bytes(info, plan))
        notices: list[str] = []
        began, stages = time.monotonic(), StageTimes()
        with atomic_output(destination, options.overwrite) as partial:
            with (
                VideoReader(source) as reader,
                prefetch(reader, depth=2 * plan.chunk) as decoded,
                VideoWriter(
                    partial,
                    info,
                    *plan.target_size,
                    codec=options.codec,
                    crf=options.crf,
                    pix_fmt=options.pix_fmt,
                    format_name=container_format(destination),
                ) as writer,
                BackgroundSink(writer.write, depth=2 * plan.chunk) as sink,
            ):
                times: deque[Frame] = deque()  # of frames inside the model, without their pixels

                def pixels() -> Iterator[np.ndarray]:
                    for frame in decoded:
                        times.append(replace(frame, pixels=_NO_PIXELS))
                        yield frame.pixels

                pts: list[int] = []
                for output in self.restore(pixels(), plan, options, stages, notices):
                    frame = times.popleft()
                    pts.append(frame.pts)
                    waited = time.perf_counter()
                    sink.put(replace(frame, pixels=output))
                    stages.encode += time.perf_counter() - waited
                    if on_progress is not None:
                        on_progress(Progress(len(pts), info.num_frames))
                if not pts:
                    raise InputError(f"no video frame can be decoded: `{source}`")
            verify_output(partial, pts, info.time_base)
        notices = [*reader.notices, *writer.notices, *notices]
        return UpscaleReport(len(pts), time.monotonic() - began, plan, tuple(notices), stages)

    def restore(
        self, frames: Iterable[np.ndarray], plan: Plan, options: UpscaleOptions, stages: StageTimes, notices: list[str]
    ) -> Iterator[np.ndarray]:
        """(H, W, 3) arrays in, (target height, target width, 3) arrays of the same type out, as `plan` says.

        Adds to `stages` what it spends, and to `notices` every step down. Raises OutOfMemoryError after the last.
        """
        states: States = (None,) * len(plan.tiles)
        chunks = iter(cut_into_chunks(frames, plan.chunk, plan.overlap))
        while True:
            before = time.perf_counter()
            chunk = next(chunks, None)
            stages.decode += time.perf_counter() - before
            if chunk is None:
                return
            if chunk.fresh:
                states = (None,) * len(plan.tiles)
            outputs, states = self._step_down(chunk, states, plan, options, stages, notices)
            yield from outputs[chunk.warm_up : len(chunk.frames)]

    def _step_down(
        self, chunk: Chunk, states: States, plan: Plan, options: UpscaleOptions, stages: StageTimes, notices: list[str]
    ) -> tuple[list[np.ndarray], States]:
        """Restore a chunk; where memory runs out, in two halves (each half hands its state to the next)."""
        try:
            return self._restore_chunk(chunk, states, plan, options, stages)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory(self.model.device)
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
        began = time.perf_counter()
        width, height = plan.target_size
        padded_width, padded_height = plan.padded_size
        lq = resize_frames(_to_tensor(chunk.padded_frames(), self.model.device), height, width)
        padding = (0, padded_width - width, 0, padded_height - height, 0, 0)
        padded = F.pad(lq, padding, mode="replicate") if any(padding) else lq
        strength = self.model.preset.default_strength if options.strength is None else options.strength
        parts, next_states = [], []
        for tile, state in zip(plan.tiles, states, strict=True):
            region = padded[..., tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
            part, state = self.model.restore(
                region,
                state,
                seed=options.seed,
                strength=strength,
                origin=(chunk.start // TEMPORAL_FACTOR, tile.y, tile.x),
            )
            parts.append(part)
            next_states.append(state)
        hq = blend_tiles(parts, plan.tiles, padded_width, padded_height)[..., :height, :width]
        colored = time.perf_counter()
        hq = transfer_color(hq, lq, options.color)
        outputs = _to_arrays(hq, chunk.frames[0].dtype)
        stages.model += colored - began
        stages.color += time.perf_counter() - colored
        return outputs, tuple(next_states)


_NO_PIXELS = np.empty((0, 0, 3), np.uint8)
_FRAME_DTYPES = (np.uint8, np.uint16, np.float32)
_FRAME_HINT = "frames are (H, W, 3) arrays or tensors of uint8, uint16 or float32"


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


def _estimate_bytes(info: VideoInfo, plan: Plan) -> int:
    """A guess of the output's size, 0.2 bytes a pixel and frame: only a disk that is all but full is refused early."""
    return int((info.num_frames or 0) * plan.target_size[0] * plan.target_size[1] * 0.2)

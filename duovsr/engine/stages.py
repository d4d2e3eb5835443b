"""Where the time goes, stage by stage: by the host's clock, or by a GPU's own, which works on while it is read."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from duovsr.engine.memory import synchronize
from duovsr.model.one_step import OneStepModel
from duovsr.model.tiny_vae import VAEState
from duovsr.model.transformer import TransformerState


@dataclass
class StageTimes:
    """Seconds by stage: one after the other on a CPU, so that they add up; those of the device on a GPU.

    `reading` and `writing` are what the model's thread waited for the threads that decode and encode the video. A GPU
    works meanwhile: of what its host does, only that counts which left it idle.
    """

    reading: float = 0.0
    copies: float = 0.0  # frames to the device, to floating point, and back
    resize: float = 0.0
    encode: float = 0.0
    transformer: float = 0.0
    decode: float = 0.0  # with what follows it: blending of tiles
    color: float = 0.0
    writing: float = 0.0

    def add(self, stage: str, seconds: float) -> None:
        setattr(self, stage, getattr(self, stage) + seconds)


def new_clock(device: torch.device, stages: StageTimes) -> Clock:
    """What measures a clip's chunks on the device into `stages`."""
    return GpuClock(stages) if device.type == "cuda" else HostClock(stages, device)


class Marks(ABC):
    """A chunk's: each call ends a stage, which began where the one before ended."""

    @abstractmethod
    def __call__(self, stage: str) -> None: ...

    @abstractmethod
    def read(self) -> None:
        """Add the stages, once the chunk's results are there."""

    @contextmanager
    def ending(self, stage: str) -> Iterator[None]:
        """The stage ends with this context."""
        yield
        self(stage)


class HostMarks(Marks):
    """Each call adds its stage at once."""

    def __init__(self, stages: StageTimes, device: torch.device) -> None:
        self._stages, self._device = stages, device
        self._latest = time.perf_counter()

    def __call__(self, stage: str) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self._stages.add(stage, now - self._latest)
        self._latest = now

    def read(self) -> None:
        """Nothing is left to add."""


class HostClock:
    """Of a device that the host waits for."""

    def __init__(self, stages: StageTimes, device: torch.device) -> None:
        self._stages, self._device = stages, device

    @contextmanager
    def spent(self, stage: str) -> Iterator[None]:
        """What the host spends outside of chunks."""
        began = time.perf_counter()
        yield
        self._stages.add(stage, time.perf_counter() - began)

    def start(self) -> HostMarks:
        """A chunk begins."""
        return HostMarks(self._stages, self._device)


class GpuMarks(Marks):
    """Places in the GPU's stream of work. `after` is the last of the chunk before, if that was still at work; `spent`,
    what the host has spent since it launched that."""

    def __init__(self, clock: GpuClock, after: torch.cuda.Event | None, spent: dict[str, float]) -> None:
        self._clock, self._after, self._spent = clock, after, spent
        self._stages: list[str] = []
        self._events = [_recorded()]

    @property
    def latest(self) -> torch.cuda.Event:
        return self._events[-1]

    def __call__(self, stage: str) -> None:
        self._stages.append(stage)
        self._events.append(_recorded())

    def read(self) -> None:
        """Of what the host had spent, it adds as much as left the GPU idle."""
        self.latest.synchronize()  # the results that were waited for were on their way before it was made
        stages = self._clock.stages
        for stage, (begin, end) in zip(self._stages, pairwise(self._events), strict=True):
            stages.add(stage, begin.elapsed_time(end) / 1000)
        idle = self._after.elapsed_time(self._events[0]) / 1000 if self._after is not None else 0.0
        share = min(1.0, idle / total) if (total := sum(self._spent.values())) else 0.0
        for stage, seconds in self._spent.items():
            stages.add(stage, share * seconds)
        self._clock.running -= 1


class GpuClock:
    """Of a GPU, where a chunk may begin before the one ahead of it has ended."""

    def __init__(self, stages: StageTimes) -> None:
        self.stages = stages
        self.running = 0  # chunks that were not read
        self._marks: GpuMarks | None = None  # of the last chunk
        self._spent: dict[str, float] = defaultdict(float)  # since it was launched

    @contextmanager
    def spent(self, stage: str) -> Iterator[None]:
        """What the host spends outside of chunks."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        if self.running:
            self._spent[stage] += seconds
        else:
            self.stages.add(stage, seconds)

    def start(self) -> GpuMarks:
        """A chunk begins: all marks of the one before are made, if not read."""
        after = self._marks.latest if self._marks is not None and self.running else None
        self._marks = GpuMarks(self, after, self._spent)
        self._spent = defaultdict(float)
        self.running += 1
        return self._marks


Watch = Callable[[str], AbstractContextManager[None]]  # around a phase of the model: encode, transformer or decode
Clock = HostClock | GpuClock


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class WatchedModel(OneStepModel):
    """A model each of whose phases runs in the context `watch(phase)`."""

    watch: Watch

    def encode(self, lq: Tensor, state: VAEState | None = None) -> tuple[Tensor, VAEState]:
        with self.watch("encode"):
            return super().encode(lq, state)

    def generate(
        self, z_lq: Tensor, seed: int, place: tuple[int, int, int], state: TransformerState | None = None
    ) -> tuple[Tensor, TransformerState | None]:
        with self.watch("transformer"):
            return super().generate(z_lq, seed, place, state)

    def decode(
        self, latents: Tensor | None, lq: Tensor, state: VAEState | None = None, *, scale: float
    ) -> tuple[Tensor, VAEState]:
        with self.watch("decode"):
            return super().decode(latents, lq, state, scale=scale)

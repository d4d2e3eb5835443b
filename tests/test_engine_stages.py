"""Stages add up to the whole, on a CPU and, with the events of a GPU that is made up here, beside its host."""

from __future__ import annotations

import time
from dataclasses import asdict

import pytest
import torch

from duovsr import UpscaleOptions, Upscaler
from duovsr.engine import bench, stages
from duovsr.engine.stages import GpuClock, StageTimes
from tests.bicubic import bicubic


class Gpu:
    """Milliseconds of a GPU whose work is handed to it at `now`, the host's time."""

    def __init__(self) -> None:
        self.now = self.free_at = 0.0

    def work(self, milliseconds: float) -> None:
        self.free_at = max(self.free_at, self.now) + milliseconds

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def record(self) -> None:
        self._at = max(self._gpu.free_at, self._gpu.now)

    def synchronize(self) -> None:
        self._gpu.now = max(self._gpu.now, self._at)

    def elapsed_time(self, end: Event) -> float:
        assert max(self._at, end._at) <= self._gpu.now, "both events must be completed"
        return end._at - self._at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.now / 1000)
    return gpu


def wait(gpu: Gpu, clock: GpuClock, stage: str, milliseconds: float) -> None:
    with clock.spent(stage):
        gpu.now += milliseconds


def launch(gpu: Gpu, clock: GpuClock, milliseconds: float) -> stages.GpuMarks:
    marks = clock.start()
    gpu.work(milliseconds)
    marks("encode")
    gpu.work(2 * milliseconds)
    marks("decode")
    return marks


def rounded(times: StageTimes) -> dict[str, float]:
    return {stage: round(1000 * seconds, 6) for stage, seconds in asdict(times).items() if seconds}


def test_what_the_host_does_beside_a_busy_gpu_counts_nothing(gpu: Gpu) -> None:
    clock = GpuClock(times := StageTimes())
    wait(gpu, clock, "reading", 5)  # the GPU has nothing to do yet
    first = launch(gpu, clock, 10)
    wait(gpu, clock, "reading", 20)
    second = launch(gpu, clock, 10)
    gpu.now = 60
    first.read()
    wait(gpu, clock, "writing", 2)
    gpu.now = 70
    second.read()
    wait(gpu, clock, "writing", 3)  # it has nothing to do any more
    assert rounded(times) == {"reading": 5, "encode": 20, "decode": 40, "writing": 3}


def test_what_left_the_gpu_idle_counts_by_its_part(gpu: Gpu) -> None:
    """30 ms of work, then 60 ms of waiting for the decoder and 20 ms for the encoder: 50 ms idle."""
    clock = GpuClock(times := StageTimes())
    first = launch(gpu, clock, 10)
    wait(gpu, clock, "reading", 60)
    wait(gpu, clock, "writing", 20)
    second = launch(gpu, clock, 10)
    first.read()
    gpu.now = 200
    second.read()
    assert rounded(times) == {"reading": 37.5, "encode": 20, "decode": 40, "writing": 12.5}


def test_marks_that_the_gpu_has_not_reached_are_waited_for(gpu: Gpu) -> None:
    """The results may be there before the last mark, which was made after they were sent on their way."""
    clock = GpuClock(times := StageTimes())
    marks = launch(gpu, clock, 10)
    gpu.now = 29
    marks.read()
    assert rounded(times) == {"encode": 10, "decode": 20}


def test_stages_of_a_cpu_are_all_that_is_done(small_upscaler: Upscaler) -> None:
    upscaler, options = Upscaler(small_upscaler.model), UpscaleOptions(scale=2, chunk=4)
    began, plan = time.perf_counter(), upscaler.plan(64, 48, options)
    times = StageTimes()
    for _ in upscaler.restore(bench._moving_noise(64, 48, 33), plan, options, times, []):
        pass
    total = time.perf_counter() - began
    seconds = asdict(times)
    assert all(seconds[stage] > 0 for stage in seconds if stage != "writing")
    assert 0.5 * total < sum(seconds.values()) <= total


def test_a_model_without_phases_is_all_decoding() -> None:
    """What the engine knows of a model is `restore`."""
    times, upscaler = StageTimes(), bicubic()
    plan = upscaler.plan(32, 24, UpscaleOptions(scale=2))
    list(upscaler.restore(bench._moving_noise(32, 24, 5), plan, UpscaleOptions(scale=2), times, []))
    assert times.encode == times.transformer == 0
    assert times.decode > 0

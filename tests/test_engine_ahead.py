"""One chunk ahead, as a GPU is driven, here on a CPU: the same frames, the same files, and nothing done is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from duovsr import Progress, UpscaleOptions, Upscaler
from duovsr.engine import files
from duovsr.engine.pipeline import one_ahead, prefetch
from duovsr.engine.run import Launched
from duovsr.engine.transfer import Arriving, HostTransfer
from duovsr.errors import InputError
from duovsr.model.one_step import OneStepModel
from tests.clips import Clip, frame_hashes, write_clip

OPTIONS = UpscaleOptions(scale=2, chunk=8)


class Crash(Exception):
    """As sudden as an exception can be."""


def late(transfer: HostTransfer, pixels: Tensor) -> Arriving:
    """Results that are read no sooner than they are asked for."""
    return lambda: pixels.numpy()


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostTransfer, "ahead", True)
    monkeypatch.setattr(HostTransfer, "download", late)


def moving(count: int) -> list[np.ndarray]:
    """Blocks of texture that drift."""
    canvas = np.random.default_rng(0).integers(0, 256, (6, 8 + count // 4 + 1, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return [np.ascontiguousarray(canvas[:, i : i + 32]) for i in range(count)]


def test_each_comes_once_the_next_is_there() -> None:
    drawn: list[int] = []
    source = (drawn.append(n) or n for n in range(4))  # type: ignore[func-returns-value]
    assert [(n, len(drawn)) for n in one_ahead(source, True)] == [(0, 2), (1, 3), (2, 4), (3, 4)]
    drawn.clear()
    source = (drawn.append(n) or n for n in range(4))  # type: ignore[func-returns-value]
    assert [(n, len(drawn)) for n in one_ahead(source, False)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert list(one_ahead([], True)) == []


@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_comes_after_what_was_before_it(ahead: bool) -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise InputError("after three")

    items = one_ahead(source(), ahead)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="after three"):
        next(items)


@pytest.mark.parametrize("overlap", [None, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_frames_are_the_same(
    small_upscaler: Upscaler, request: pytest.FixtureRequest, dtype: type, overlap: int | None
) -> None:
    scale = 257 if dtype == np.uint16 else 1
    clip = [frame.astype(dtype) * dtype(scale) for frame in moving(41)]
    if dtype == np.float32:
        clip = [frame / np.float32(255) for frame in clip]
    options = UpscaleOptions(scale=2, chunk=8, overlap=overlap)
    plain = list(small_upscaler.stream(clip, options))
    request.getfixturevalue("ahead")
    held = list(small_upscaler.stream(clip, options))
    assert len(held) == len(clip)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype == dtype for a, b in zip(plain, held, strict=True))


def test_a_chunk_is_launched_before_the_one_ahead_of_it_is_finished(
    small_upscaler: Upscaler, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    launch, finish = Upscaler.launch, Upscaler.finish

    def launched(self: Upscaler, chunk: Any, *rest: Any) -> Launched:
        order.append(f"launch {chunk.start}")
        return launch(self, chunk, *rest)

    def finished(self: Upscaler, chunk: Launched, *rest: Any) -> Any:
        order.append(f"finish {chunk.chunk.start}")
        return finish(self, chunk, *rest)

    monkeypatch.setattr(Upscaler, "launch", launched)
    monkeypatch.setattr(Upscaler, "finish", finished)
    assert len(list(small_upscaler.stream(moving(25), OPTIONS))) == 25
    assert order == ["launch 0", "launch 9", "finish 0", "launch 17", "finish 9", "finish 17"]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 75 * 512, 512), audio=["aac"]))


@pytest.mark.parametrize("overlap", [None, 8])
@pytest.mark.parametrize("crash_after", [5, 30])
def test_jobs_go_on(
    small_upscaler: Upscaler,
    clip: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    overlap: int | None,
    crash_after: int,
) -> None:
    monkeypatch.setattr(files, "PIECE_FRAMES", 12)
    options = UpscaleOptions(scale=2, codec="h264", overlap=overlap)
    small_upscaler.upscale_file(clip, clip.with_name("whole.mp4"), options)
    request.getfixturevalue("ahead")
    done: list[int] = []

    def crash(progress: Progress) -> None:
        done.append(progress.done)
        if progress.done > crash_after:
            raise Crash

    with pytest.raises(Crash):
        small_upscaler.upscale_file(clip, clip.with_name("out.mp4"), options, crash)
    report = small_upscaler.upscale_file(clip, clip.with_name("out.mp4"), options)
    assert crash_after - 2 * 12 <= report.reused < done[-1]
    assert frame_hashes(clip.with_name("out.mp4")) == frame_hashes(clip.with_name("whole.mp4"))


def test_frames_before_one_that_does_not_fit_come_out(small_upscaler: Upscaler, ahead: None) -> None:
    frames = small_upscaler.stream([*moving(20), np.zeros((8, 8, 3), np.uint8)], OPTIONS)
    assert [next(frames).shape for _ in range(17)] == [(48, 64, 3)] * 17  # whole chunks
    with pytest.raises(InputError, match="frame 20 is"):
        next(frames)


def test_memory_that_runs_out_costs_no_frame(
    small_upscaler: Upscaler, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second chunk is launched again in calls of 4 frames, while the first is not finished."""
    restore, failed = OneStepModel.restore, []

    def failing(self: OneStepModel, lq: Tensor, state: Any, **settings: Any) -> Any:
        if state is not None and lq.shape[2] > 4:
            failed.append(lq.shape[2])
            torch.empty(2**60, dtype=torch.uint8)  # fails as torch itself fails
        return restore(self, lq, state, **settings)

    upscaler = Upscaler(small_upscaler.model)
    expected = np.stack(list(upscaler.stream(moving(25), OPTIONS))).astype(int)
    monkeypatch.setattr(OneStepModel, "restore", failing)
    outputs = np.stack(list(upscaler.stream(moving(25), OPTIONS))).astype(int)
    assert failed == [8]
    assert np.abs(outputs - expected).max() <= 1  # other lengths of a batch are other sums


def test_an_interrupt_on_leaving_waits_for_the_thread_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file would be closed under it."""
    read, join, calls = threading.Event(), threading.Thread.join, []

    def source() -> Iterator[int]:
        read.wait(10)
        yield 0

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        read.set()
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), prefetch(source(), depth=2):
        pass
    assert len(calls) == 2 and not calls[0].is_alive()

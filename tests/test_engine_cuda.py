"""Copies beside the computation, on a GPU: the frames of the plain path, no waiting within a chunk, true times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import cast

import numpy as np
import pytest
import torch

from duovsr import UpscaleOptions, Upscaler
from duovsr.engine import upscaler
from duovsr.engine.bench import _moving_noise
from duovsr.engine.stages import StageTimes
from duovsr.engine.transfer import HostTransfer, transfer_to
from duovsr.model.one_step import OneStepModel
from tests.bicubic import Bicubic
from tests.conftest import random_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

GPU = torch.device("cuda", 0)
OPTIONS = UpscaleOptions(scale=4, chunk=8)
FRAMES = 81  # ten chunks


class OnGpu(Bicubic):
    device = GPU


@pytest.fixture
def bicubic() -> Upscaler:
    return Upscaler(cast(OneStepModel, OnGpu()))


@pytest.fixture
def small() -> Upscaler:
    model = random_model()
    model.transformer.to(GPU)
    model.vae.to(GPU)
    return Upscaler(replace(model, prompt=model.prompt.to(GPU)))


def clip(dtype: type) -> Iterator[np.ndarray]:
    for frame in _moving_noise(160, 90, FRAMES):
        if dtype == np.float32:
            yield frame / np.float32(255)
        else:
            yield frame.astype(dtype) * dtype(257 if dtype == np.uint16 else 1)


@pytest.mark.parametrize("name", ["bicubic", "small"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_frames_are_those_of_the_plain_path(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, dtype: type, name: str
) -> None:
    """All are kept until the end: a buffer that is written twice would show."""
    model: Upscaler = request.getfixturevalue(name)
    kept = list(model.stream(clip(dtype), OPTIONS))
    monkeypatch.setattr(upscaler, "transfer_to", HostTransfer)
    plain = list(model.stream(clip(dtype), OPTIONS))
    assert len(kept) == len(plain) == FRAMES
    for a, b in zip(kept, plain, strict=True):
        assert a.dtype == b.dtype == dtype
        assert np.array_equal(a, b)
    assert not np.array_equal(kept[0], kept[40])


def test_runs_share_their_streams() -> None:
    """Of each new stream torch would keep the memory."""
    assert transfer_to(GPU) is transfer_to(GPU)


def test_outputs_are_no_page_locked_memory(bicubic: Upscaler) -> None:
    first = next(iter(bicubic.stream(clip(np.uint8), OPTIONS)))
    assert not torch.from_numpy(first).is_pinned()


def test_a_launch_waits_for_nothing(bicubic: Upscaler) -> None:
    run = bicubic.begin(bicubic.plan(160, 90, OPTIONS), OPTIONS, StageTimes(), [])
    chunks = bicubic.chunks(clip(np.uint8), run)
    first = bicubic.launch(next(chunks), None, run)  # may set up what is set up once
    try:
        torch.cuda.set_sync_debug_mode("error")
        second = bicubic.launch(next(chunks), first.states, run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for launched in (first, second):
        assert len(bicubic.finish(launched, None, run)[0]) == launched.chunk.shown


def test_stages_are_seconds_of_the_device(small: Upscaler) -> None:
    plan = small.plan(160, 90, OPTIONS)
    list(small.restore(clip(np.uint8), plan, OPTIONS, StageTimes(), []))  # kernels are chosen
    times, began = StageTimes(), time.perf_counter()
    list(small.restore(clip(np.uint8), plan, OPTIONS, times, []))
    total, seconds = time.perf_counter() - began, asdict(times)
    assert all(seconds[stage] > 0 for stage in ("copies", "resize", "encode", "transformer", "decode", "color"))
    assert sum(seconds.values()) <= total

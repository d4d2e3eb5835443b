"""The library: exact sizes and counts, streamed = whole, tiles and chunks without seams, memory that runs out."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from duovsr import Progress, UpscaleOptions, Upscaler
from duovsr.engine import pipeline
from duovsr.engine.plan import Plan
from duovsr.errors import InputError, OutOfMemoryError, UsageError
from duovsr.model.one_step import OneStepModel
from duovsr.video.reader import VideoReader
from tests.clips import Clip, write_clip


def moving(count: int, width: int = 63, height: int = 47) -> list[np.ndarray]:
    """Blocks of texture that drift, float32 in [0, 1]."""
    canvas = np.random.default_rng(0).random((height // 3 + 2, (width + count) // 3 + 2, 3), np.float32)
    canvas = canvas.repeat(3, 0).repeat(3, 1)
    return [np.ascontiguousarray(canvas[:height, i : i + width]) for i in range(count)]


@pytest.mark.parametrize("count", [33, 100])
def test_streamed_equals_whole(small_upscaler: Upscaler, count: int) -> None:
    clip = moving(count)
    whole = np.stack(list(small_upscaler.stream(clip, UpscaleOptions(scale=2, chunk=128))))
    for chunk in (4, 8, 12):
        streamed = np.stack(list(small_upscaler.stream(clip, UpscaleOptions(scale=2, chunk=chunk))))
        assert np.abs(streamed - whole).max() <= 1e-4


def test_independent_chunks_equal_the_whole_when_warmed_up_beyond_the_reach(small_upscaler: Upscaler) -> None:
    clip = moving(33)
    whole = np.stack(list(small_upscaler.stream(clip, UpscaleOptions(scale=2))))
    warm, cold = (
        np.stack(list(small_upscaler.stream(clip, UpscaleOptions(scale=2, chunk=8, overlap=n)))) for n in (20, 0)
    )
    assert np.abs(warm - whole).max() <= 1e-4
    assert np.abs(cold - whole).max() > 1e-3, "a cold start must show, or this test could not fail"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("scale", [1, 1.5, 2, 3, 4])
def test_one_frame_out_for_each_in_at_the_exact_size(small_upscaler: Upscaler, count: int, scale: float) -> None:
    outputs = list(small_upscaler.stream(moving(count, 21, 13), UpscaleOptions(scale=scale)))
    assert [frame.shape for frame in outputs] == [(int(13 * scale + 0.5), int(21 * scale + 0.5), 3)] * count


def test_one_pixel_goes_through(small_upscaler: Upscaler) -> None:
    (frame,) = small_upscaler.stream([np.full((1, 1, 3), 77, np.uint8)], UpscaleOptions(scale=4))
    assert frame.shape == (4, 4, 3)


def test_the_kind_of_the_frames_is_kept(small_upscaler: Upscaler) -> None:
    floats = moving(5, 32, 24)
    as_float = np.stack(list(small_upscaler.stream(floats, UpscaleOptions(scale=2))))
    for dtype in (np.uint8, np.uint16):
        top = np.iinfo(dtype).max
        inputs = [np.rint(frame * top).astype(dtype) for frame in floats]
        outputs = np.stack(list(small_upscaler.stream(inputs, UpscaleOptions(scale=2))))
        assert outputs.dtype == dtype
        # The input was rounded: at most half a level, seen through a random network.
        assert np.abs(outputs / top - as_float).max() < (0.05 if dtype == np.uint8 else 5e-4)
    tensors = list(small_upscaler.stream([torch.from_numpy(frame) for frame in floats], UpscaleOptions(scale=2)))
    assert all(isinstance(frame, torch.Tensor) for frame in tensors)
    assert np.array_equal(torch.stack(tensors).numpy(), as_float)


def test_frames_that_do_not_fit_are_refused(small_upscaler: Upscaler) -> None:
    good = np.zeros((8, 8, 3), np.uint8)
    for bad in (np.zeros((8, 9, 3), np.uint8), np.zeros((8, 8, 3), np.uint16)):
        with pytest.raises(InputError, match="frame 1 is"):
            list(small_upscaler.stream([good, bad]))
    for bad in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float64)):
        with pytest.raises(InputError, match="frame 0 is"):
            list(small_upscaler.stream([bad]))


def test_a_reused_buffer_gives_the_same_frames(small_upscaler: Upscaler) -> None:
    clip = moving(9, 32, 24)
    buffer = np.empty_like(clip[0])

    def reader() -> Iterator[np.ndarray]:
        for frame in clip:
            buffer[:] = frame
            yield buffer

    kept, reused = (list(small_upscaler.stream(frames, UpscaleOptions(scale=2))) for frames in (clip, reader()))
    assert np.array_equal(np.stack(kept), np.stack(reused))


def test_what_is_no_frame_is_refused(small_upscaler: Upscaler) -> None:
    for bad in (None, [[1]], "frame", np.zeros((0, 0, 3), np.uint8), torch.zeros(4, 4, 3, dtype=torch.bfloat16)):
        with pytest.raises(InputError, match="frame"):
            list(small_upscaler.stream([bad]))  # type: ignore[list-item]


def test_no_frames_in_no_frames_out(small_upscaler: Upscaler) -> None:
    assert list(small_upscaler.stream([])) == []


def test_tiles_show_no_seams(small_upscaler: Upscaler) -> None:
    clip = moving(5, 256, 144)
    whole = np.stack(list(small_upscaler.stream(clip, UpscaleOptions(scale=4, tile=0))))
    tiled = np.stack(list(small_upscaler.stream(clip, UpscaleOptions(scale=4, tile=512))))
    error = np.abs(tiled - whole)
    assert 0 < error.mean() < 2e-3
    steps = np.abs(np.diff(tiled, axis=2)).mean((0, 1, 3)) / np.abs(np.diff(whole, axis=2)).mean((0, 1, 3))
    borders = [x - 1 for x in (256, 512, 768)]
    assert steps[borders].max() <= 1.1 * np.median(steps)


def test_strength_zero_is_the_faithful_decode(small_upscaler: Upscaler) -> None:
    clip = moving(9, 32, 24)
    outputs = [
        np.stack(list(small_upscaler.stream(clip, UpscaleOptions(scale=2, strength=s, seed=seed, color="none"))))
        for s, seed in ((0.0, 0), (0.0, 1), (0.5, 0), (1.0, 0))
    ]
    assert np.array_equal(outputs[0], outputs[1]), "without generated detail there is no noise"
    inner = (outputs[0] > 0) & (outputs[0] < 1) & (outputs[3] > 0) & (outputs[3] < 1)
    assert_close(outputs[2][inner], ((outputs[0] + outputs[3]) / 2)[inner], rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_the_model_is_told_the_scale(
    small_upscaler: Upscaler, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, told = OneStepModel.decode, []

    def noted(self: OneStepModel, z: object, lq: object, state: object = None, *, scale: float) -> object:
        told.append(scale)
        return decode(self, z, lq, state, scale=scale)  # type: ignore[arg-type]

    monkeypatch.setattr(OneStepModel, "decode", noted)
    list(small_upscaler.stream(moving(9, 64, 48), UpscaleOptions(scale=1.5, strength=strength, chunk=4)))
    assert set(told) == {1.5} and len(told) > 1


def limited_memory(model: OneStepModel, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the model fail as torch's CPU allocator does for calls of more than `most` frames; returns the calls."""
    restore, calls = OneStepModel.restore, []

    def failing(self: OneStepModel, lq: torch.Tensor, *args: object, **kwargs: object) -> object:
        calls.append(lq.shape[2])
        if lq.shape[2] > most:
            torch.empty(2**60, dtype=torch.uint8)  # fails as torch itself fails
        return restore(self, lq, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(OneStepModel, "restore", failing)
    return calls


def test_out_of_memory_steps_down_and_changes_nothing(
    small_upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 512 * 40, 512)))
    options = UpscaleOptions(scale=2, codec="ffv1", chunk=12)
    upscaler = Upscaler(small_upscaler.model)
    upscaler.upscale_file(source, tmp_path / "whole.mkv", options)
    calls = limited_memory(upscaler.model, 5, monkeypatch)
    report = upscaler.upscale_file(source, tmp_path / "out.mkv", options)
    assert [length for length in calls if length > 5] == [13], "later chunks begin with what was found"
    assert report.notices == ("memory ran out: the model went on with calls of 4 frames",)
    assert report.warnings == ()
    monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=io.BytesIO()))
    piped = upscaler.upscale_file(source, "-", options)
    assert piped.notices == report.notices
    assert piped.warnings == ()
    with VideoReader(tmp_path / "whole.mkv") as first, VideoReader(tmp_path / "out.mkv") as second:
        for a, b in zip(first, second, strict=True):
            # Other lengths of a batch are other sums in a convolution: a value on the edge of two levels may fall over.
            difference = np.abs(a.pixels.astype(int) - b.pixels.astype(int))
            assert difference.max() <= 1 and difference.mean() < 1e-3


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCompile with",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when",
        "could not create a primitive",
        "MPS backend out of memory (MPS allocated: 5 GB",
    ],
)
def test_libraries_have_words_of_their_own(
    small_upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    restore, lengths = OneStepModel.restore, list[int]()

    def failing(self: OneStepModel, lq: torch.Tensor, *args: object, **kwargs: object) -> object:
        lengths.append(lq.shape[2])
        if lq.shape[2] > 5:
            raise RuntimeError(words)
        return restore(self, lq, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(OneStepModel, "restore", failing)
    frames = [np.zeros((24, 32, 3), np.uint8)] * 9
    assert len(list(Upscaler(small_upscaler.model).stream(frames, UpscaleOptions(scale=2, chunk=8)))) == 9
    assert lengths == [9, 5, 4]


def test_out_of_memory_after_every_step_down_is_an_error(
    small_upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited_memory(small_upscaler.model, 0, monkeypatch)
    with pytest.raises(OutOfMemoryError, match="out of cpu memory") as caught:
        small_upscaler.upscale_file(write_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4", UpscaleOptions(scale=2))
    assert caught.value.hint == "use a smaller `--tile` (512 is the least)"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


@pytest.mark.parametrize(("size", "scale"), [((63, 47), 2), ((321, 181), 1.5), ((64, 48), 3)])
@pytest.mark.parametrize("count", [1, 5, 33])
def test_a_file_keeps_count_size_times_and_sound(
    small_upscaler: Upscaler, tmp_path: Path, size: tuple[int, int], scale: float, count: int
) -> None:
    pts = [512 * i + (256 if i % 3 == 1 else 0) for i in range(count)]  # a variable rate
    source = write_clip(tmp_path / "in.mp4", Clip(pts=pts, size=size, audio=("aac",)))
    seen: list[Progress] = []
    report = small_upscaler.upscale_file(source, tmp_path / "out.mp4", UpscaleOptions(scale=scale), seen.append)
    assert report.frames == count
    done = [progress.done for progress in seen]
    assert done == sorted(set(done)), "a report a chunk"
    assert done[-1] == count
    with VideoReader(source) as before, VideoReader(tmp_path / "out.mp4") as after:
        times = [(frame.pts * frame.time_base) for frame in before]
        assert [(frame.pts * frame.time_base) for frame in after] == times
        assert (after.info.width, after.info.height) == UpscaleOptions(scale=scale).target_size(*size)
    assert audio_packets(source) == audio_packets(tmp_path / "out.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def audio_packets(path: Path) -> list[tuple[Fraction, bytes]]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return [(p.pts * p.time_base, bytes(p)) for p in container.demux(stream) if p.size and p.pts is not None]


def test_a_failing_model_leaves_no_file(
    small_upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OneStepModel, "restore", broken)
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 512 * 60, 512)))
    try:
        small_upscaler.upscale_file(source, tmp_path / "out.mp4", UpscaleOptions(scale=2))
    except KeyboardInterrupt:  # while its traceback still holds every frame of the stack
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("duovsr")]
    assert threads == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4"]


def test_prefetch_hands_over_items_and_errors_in_order() -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise ValueError("after five")

    with pipeline.prefetch(source(), depth=2) as items:
        assert [next(items) for _ in range(5)] == list(range(5))
        with pytest.raises(ValueError, match="after five"):
            next(items)


def test_an_interrupt_while_the_thread_starts_leaves_the_items_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []

    def interrupted(self: threading.Thread) -> None:
        started.append(self)
        raise KeyboardInterrupt

    def consume() -> None:
        with pipeline.prefetch((taken.append(n) for n in range(5)), depth=2):
            raise AssertionError("the interrupt comes before")

    taken: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            consume()
    started[0].start()  # it comes to life when the file is closed already
    started[0].join()
    assert taken == []


def test_sink_raises_what_its_thread_raised() -> None:
    def refuse(item: int) -> None:
        raise OSError(f"refused {item}")

    def put_all() -> None:
        with pipeline.BackgroundSink(refuse, depth=1) as sink:
            for item in range(100):
                sink.put(item)

    with pytest.raises(OSError, match="refused 0"):
        put_all()


def test_unknown_devices_dtypes_and_models_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown device: `tpu`"):
        Upscaler.from_preset("tiny", device="tpu")
    with pytest.raises(UsageError, match="unknown dtype: `int4`"):
        Upscaler.from_preset("tiny", device="cpu", dtype="int4")
    with pytest.raises(UsageError, match="unknown model: `huge`"):
        Upscaler.from_preset("huge", device="cpu")


def test_the_plan_is_recorded_in_the_report(small_upscaler: Upscaler, tmp_path: Path) -> None:
    report = small_upscaler.upscale_file(write_clip(tmp_path / "in.mp4"), tmp_path / "o.mp4", UpscaleOptions(scale=2))
    assert isinstance(report.plan, Plan)
    assert report.plan.dtype == "float32"
    assert report.stages.transformer > 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_the_clip(tmp_path: Path) -> None:
    """Peak memory of two processes, 200 and 2,000 frames: at most 5 % apart."""
    script = (
        "import sys; from duovsr import Upscaler, UpscaleOptions; from duovsr.engine.bench import peak_rss\n"
        "Upscaler.from_preset('tiny', device='cpu').upscale_file(*sys.argv[1:], UpscaleOptions(scale=2))\n"
        "print(peak_rss())"
    )
    peaks = []
    for count in (200, 2000):
        source = write_clip(tmp_path / f"{count}.mp4", Clip(pts=range(0, 512 * count, 512)))
        command = [sys.executable, "-c", script, str(source), str(tmp_path / f"{count}_out.mp4")]
        peaks.append(int(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout))
    assert peaks[1] <= 1.05 * peaks[0]

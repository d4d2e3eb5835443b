"""Deciding in integers: sizes, tiles, chunks and cuts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from weakref import ReferenceType, ref

import numpy as np
import pytest
import torch

from duovsr.engine.blend import blend_tiles
from duovsr.engine.chunks import cut_into_chunks
from duovsr.engine.plan import (
    TILE_ALIGN,
    TILE_OVERLAP,
    Plan,
    Precision,
    Tile,
    WeightBytes,
    plan_clip,
    plan_tiles,
    planned_bytes,
)
from duovsr.engine.scenes import CutDetector
from duovsr.errors import UsageError
from duovsr.options import PRESETS, UpscaleOptions


def plan(width: int, height: int, options: UpscaleOptions, free_bytes: int = 2**40) -> Plan:
    return plan_clip(
        width,
        height,
        options,
        PRESETS["tiny"],
        device="cuda",
        precisions=[Precision("float32", 4, WeightBytes(0, 0), free_bytes)],
    )


@pytest.mark.parametrize(
    ("source", "scale", "target"),
    [((63, 47), 2, (126, 94)), ((321, 181), 1.5, (482, 272)), ((5, 7), 2.5, (13, 18)), ((1, 1), 4, (4, 4))],
)
def test_target_is_scale_times_source_rounded_half_up(
    source: tuple[int, int], scale: float, target: tuple[int, int]
) -> None:
    planned = plan(*source, UpscaleOptions(scale=scale))
    assert planned.target_size == target
    assert planned.scale == pytest.approx(scale, rel=0.05)
    assert all(p % 16 == 0 and 0 <= p - t < 16 for p, t in zip(planned.padded_size, target, strict=True))


@pytest.mark.parametrize("side", [512, 768, 1024])
@pytest.mark.parametrize(("width", "height"), [(1280, 720), (512, 512), (2048, 528), (1296, 1808), (3840, 2160)])
def test_tiles_cover_the_frame_and_overlap(width: int, height: int, side: int) -> None:
    tiles = plan_tiles(width, height, side)
    covered = np.zeros((height, width), bool)
    for tile in tiles:
        assert tile.x % TILE_ALIGN == tile.y % TILE_ALIGN == 0
        assert tile.width <= side
        assert tile.height <= side
        assert tile.x + tile.width <= width
        assert tile.y + tile.height <= height
        covered[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] = True
    assert covered.all()
    columns = sorted({(tile.x, tile.width) for tile in tiles})
    for (x, w), (following, _) in pairwise(columns):
        assert x + w - following >= TILE_OVERLAP


def test_the_scale_of_a_stretched_picture_is_the_mean_of_its_sides() -> None:
    assert plan(100, 80, UpscaleOptions(size=(400, 80))).scale == 2


def test_less_memory_means_shorter_chunks_then_smaller_tiles() -> None:
    ample, tight, tiny = (plan(960, 540, UpscaleOptions(), free_bytes=n * 2**30) for n in (64, 12, 2))
    assert (len(ample.tiles), ample.chunk) == (1, 16)
    assert (len(tight.tiles), tight.chunk) == (1, 4)
    assert len(tiny.tiles) > 1
    assert tiny.memory_bytes < tight.memory_bytes < ample.memory_bytes


def test_asked_tile_and_chunk_are_kept() -> None:
    planned = plan(480, 270, UpscaleOptions(tile=700, chunk=18, overlap=6))
    assert max(tile.width for tile in planned.tiles) == 512
    assert (planned.chunk, planned.overlap) == (16, 8)
    assert len(plan(480, 270, UpscaleOptions(tile=0), free_bytes=0).tiles) == 1


@pytest.mark.parametrize("overlap", [4, 48])
def test_frames_of_an_overlap_take_memory_too(overlap: int) -> None:
    longer, warmed = (
        plan(480, 270, UpscaleOptions(chunk=c, overlap=o)) for c, o in ((8 + overlap, None), (8, overlap))
    )
    assert warmed.memory_bytes == longer.memory_bytes


def precisions(free_bf16: float, free_int8: float) -> list[Precision]:
    return [
        Precision(name, 2, WeightBytes(weight, 250 * 2**20), int(free * 2**30))
        for name, weight, free in (("bfloat16", 2840 * 10**6, free_bf16), ("int8", 1450 * 10**6, free_int8))
    ]


@pytest.mark.parametrize(
    ("free", "dtype"), [((60, 60), "bfloat16"), ((6, 60), "bfloat16"), ((4.2, 4.2), "int8"), ((0, 0), "int8")]
)
def test_weights_of_8_bits_are_for_what_nothing_else_makes_fit(free: tuple[int, int], dtype: str) -> None:
    """Shorter clips, tiles and offload come before."""
    preset = PRESETS["1.3b"]
    chosen = plan_clip(480, 270, UpscaleOptions(), preset, device="cuda", precisions=precisions(*free))
    assert chosen.dtype == dtype
    if free[0]:
        assert chosen.memory_bytes <= free[dtype == "int8"] * 2**30
    if dtype == "int8":
        smallest = plan_clip(480, 270, UpscaleOptions(), preset, device="cuda", precisions=precisions(0, 0)[:1])
        assert smallest.offload and smallest.memory_bytes > free[0] * 2**30


@pytest.mark.parametrize("free", [4.5, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24])
def test_as_many_frames_at_a_time_as_fit(free: float) -> None:
    """Beside the largest tiles that fit with few: twice as many would not."""
    preset, (bfloat16,) = PRESETS["1.3b"], precisions(free, 0)[:1]
    chosen = plan_clip(480, 270, UpscaleOptions(), preset, device="cuda", precisions=[bfloat16])
    assert chosen.memory_bytes <= bfloat16.free_bytes
    more = replace(chosen, vae_frames=2 * chosen.vae_frames)
    assert chosen.vae_frames == 8 or planned_bytes(more, preset, 2, bfloat16.weights) > bfloat16.free_bytes


def test_calls_that_no_kernel_can_index_are_refused() -> None:
    for options in (UpscaleOptions(tile=0), UpscaleOptions(chunk=4000)):
        with pytest.raises(UsageError, match="model calls too large"):
            plan_clip(1920, 1080, options, PRESETS["1.3b"], device="cuda", precisions=precisions(60, 60))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": 4.5}, "scale: `4.5`"),
        ({"scale": 4.0000001}, "scale: `4.0000001`"),
        ({"scale": float("nan")}, "scale: `nan`"),
        ({"size": (0, 5)}, "size: `0x5`"),
        ({"seed": -1}, "seed"),
        ({"strength": 1.1}, "strength"),
        ({"chunk": 0}, "chunk"),
        ({"overlap": -1}, "overlap"),
        ({"tile": -256}, "tile: `-256`"),
        ({"color": "lab"}, "color"),
        ({"crf": 70}, "crf"),
    ],
)
def test_options_refuse_what_cannot_be(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        UpscaleOptions(**settings)  # type: ignore[arg-type]


def test_impossible_size_and_tile_are_refused() -> None:
    with pytest.raises(UsageError, match="500x40"):
        plan(100, 50, UpscaleOptions(size=(500, 40)))
    with pytest.raises(UsageError, match="tile: `100`"):
        plan(100, 50, UpscaleOptions(tile=100))


def frames(*values: int) -> list[np.ndarray]:
    return [np.full((30, 40, 3), value, np.uint8) for value in values]


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 8, 9, 10, 13, 14, 17, 21, 22, 33])
@pytest.mark.parametrize(
    ("overlap", "fades"), [(None, False), (0, False), (4, False), (12, False), (4, True), (12, True)]
)
def test_every_frame_is_shown_once_and_in_order(total: int, overlap: int | None, fades: bool) -> None:
    clip = frames(*range(total))
    fade = (overlap or 0) + 1 if fades else 0
    shown: list[int] = []
    before: list[int] = []  # what the last chunk kept back
    for chunk in cut_into_chunks(clip, 8, overlap, fade=fade):
        assert len(chunk.padded_frames()) == chunk.padded_length
        assert chunk.padded_length % 4 == (1 if chunk.fresh else 0)
        assert not chunk.fresh or chunk.start % 4 == 0
        numbers = [int(frame[0, 0, 0]) for frame in chunk.frames]
        assert numbers[0] == chunk.start
        assert numbers[: chunk.fade] == before, "the same frames are cross-faded"
        end = chunk.warm_up + chunk.shown
        shown, before = shown + numbers[chunk.warm_up : end], numbers[end:]
        assert chunk.continues == (chunk.start > 0 and (overlap is None or fades))
    assert shown == list(range(total)) and before == []


@pytest.mark.parametrize("length", [4, 8, 12])
@pytest.mark.parametrize("overlap", [None, 4])
def test_a_chunk_in_several_calls_is_the_same_work(length: int, overlap: int | None) -> None:
    for chunk in cut_into_chunks(frames(*range(23)), 12, overlap):
        calls = list(chunk.calls(length))
        assert [f[0, 0, 0] for call in calls for f in call.frames] == [f[0, 0, 0] for f in chunk.frames]
        assert [call.fresh for call in calls] == [chunk.fresh] + [False] * (len(calls) - 1)
        assert [call.start for call in calls] == [int(call.frames[0][0, 0, 0]) for call in calls]
        assert max(call.padded_length for call in calls) <= length + chunk.fresh


@pytest.mark.parametrize("first", [3, 9, 13, 14, 20, 21, 22])
def test_nothing_fades_over_a_cut(first: int) -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.integers(0, 255, (30, 40, 3), np.uint8).repeat(4, 0).repeat(4, 1) // k for k in (4, 1))
    clip = [np.roll(one, i, axis=1) for i in range(first)] + [np.roll(two, i, axis=1) for i in range(15)]
    chunks = list(cut_into_chunks(clip, 8, 4, fade=5))
    (second,) = (n for n, chunk in enumerate(chunks) if n and chunk.start == 0)
    assert sum(chunk.shown for chunk in chunks[:second]) == first
    assert (chunks[second - 1].kept, chunks[second].fade, chunks[-1].kept) == (0, 0, 0)
    assert chunks[second].kept == chunks[second + 1].fade == 5


def test_a_cut_starts_a_new_scene() -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.integers(0, 255, (30, 40, 3), np.uint8).repeat(4, 0).repeat(4, 1) // k for k in (4, 1))
    clip = [np.roll(one, i, axis=1) for i in range(6)] + [np.roll(two, i, axis=1) for i in range(7)]
    chunks = list(cut_into_chunks(clip, 4, None))
    assert [(len(c.frames), c.start, c.fresh) for c in chunks] == [
        (5, 0, True),
        (1, 5, False),
        (5, 0, True),
        (2, 5, False),
    ]


def test_motion_and_fades_are_no_cuts() -> None:
    rng = np.random.default_rng(1)
    texture = rng.integers(0, 255, (20, 60, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    pan = [texture[:, 6 * i : 6 * i + 240] for i in range(30)]
    fade = [(texture[:, :240] * (1 - i / 30)).astype(np.uint8) for i in range(30)]
    for clip in (pan, fade):
        detector = CutDetector()
        found = [detector.is_cut(frame) for frame in clip]  # all of them: each call sees the frame before
        assert not any(found)


def test_cuts_close_together_are_found() -> None:
    rng = np.random.default_rng(2)
    shots = [
        np.full((30, 40, 3), level, np.uint8) // 2 + rng.integers(0, 9, (30, 40, 3), np.uint8) for level in (0, 250)
    ]
    clip = [shots[i // 3 % 2] for i in range(12)]
    detector = CutDetector()
    assert [n for n, frame in enumerate(clip) if detector.is_cut(frame)] == [3, 6, 9]


def test_a_cut_into_fast_motion_is_one_cut() -> None:
    """The calm shot before it is no measure of the motion after it."""
    shades = [0.1] * 4 + [0.6, 0.75] * 4
    detector = CutDetector()
    found = [detector.is_cut(np.full((30, 40, 3), shade, np.float32)) for shade in shades]
    assert [n for n, cut in enumerate(found) if cut] == [4]


def test_tiles_fade_into_each_other_evenly() -> None:
    """From one to the other in equal steps, the middle of which is the middle of what they have in common."""
    tiles = Tile(0, 0, 12, 4), Tile(8, 0, 12, 4)
    parts = (torch.full((1, 1, 1, 4, 12), value) for value in (0.0, 1.0))
    merged = blend_tiles(parts, tiles, 20, 4, 4)
    expected = torch.tensor([0.0] * 8 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 8)
    torch.testing.assert_close(merged, expected.expand(1, 1, 1, 4, 20))


def test_no_tile_is_kept_while_the_next_one_is_made() -> None:
    made: list[ReferenceType[torch.Tensor]] = []

    def part() -> torch.Tensor:
        assert not any(earlier() is not None for earlier in made)
        tensor = torch.ones(1, 1, 1, 4, 12)
        made.append(ref(tensor))
        return tensor

    tiles = tuple(Tile(8 * n, 0, 12, 4) for n in range(4))
    blend_tiles((part() for _ in tiles), tiles, 36, 4, 4)
    assert len(made) == len(tiles)

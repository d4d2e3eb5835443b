"""Deciding in integers: sizes, tiles, chunks and cuts."""

from __future__ import annotations

import numpy as np
import pytest

from duovsr.engine.chunks import cut_into_chunks
from duovsr.engine.plan import TILE_ALIGN, TILE_OVERLAP, Plan, WeightBytes, plan_clip, plan_tiles
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
        dtype="float32",
        dtype_bytes=4,
        free_bytes=free_bytes,
        weights=WeightBytes(0, 0),
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
    for (x, w), (following, _) in zip(columns, columns[1:], strict=False):
        assert x + w - following >= TILE_OVERLAP


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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": 4.5}, "scale: `4.5`"),
        ({"scale": float("nan")}, "scale: `nan`"),
        ({"size": (0, 5)}, "size: `0x5`"),
        ({"seed": -1}, "seed"),
        ({"strength": 1.1}, "strength"),
        ({"chunk": 0}, "chunk"),
        ({"overlap": -1}, "overlap"),
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


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 8, 9, 10, 17, 33])
@pytest.mark.parametrize("overlap", [None, 0, 4, 12])
def test_every_frame_is_shown_once_and_in_order(total: int, overlap: int | None) -> None:
    clip = frames(*range(total))
    shown: list[int] = []
    for chunk in cut_into_chunks(clip, 8, overlap):
        assert len(chunk.padded_frames()) == chunk.padded_length
        assert chunk.padded_length % 4 == (1 if chunk.fresh else 0)
        assert not chunk.fresh or chunk.start % 4 == 0
        assert chunk.frames[0][0, 0, 0] == chunk.start
        shown += [int(frame[0, 0, 0]) for frame in chunk.frames[chunk.warm_up :]]
    assert shown == list(range(total))


def test_a_split_chunk_is_the_same_work() -> None:
    (chunk,) = cut_into_chunks(frames(*range(9)), 8, None)
    first, rest = chunk.split(5)
    assert [f[0, 0, 0] for f in first.frames + rest.frames] == list(range(9))
    assert (first.fresh, rest.fresh, rest.start) == (True, False, 5)


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

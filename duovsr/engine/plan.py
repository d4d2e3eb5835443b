"""Deciding, in pure integers: sizes, padding, temporal chunks, spatial tiles, memory. Knows no models and no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from duovsr.errors import UsageError
from duovsr.options import UpscaleOptions

TEMPORAL_FACTOR = 4  # frames a latent
PAD_MULTIPLE = 16  # pixels a token: 8 by the autoencoder, 2 by the patch
TILE_ALIGN = 256  # twice a window of 8 tokens: a tile then sees the windows that the whole frame would
TILE_OVERLAP = 256
MIN_TILE = 2 * TILE_OVERLAP
DEFAULT_CHUNK = {"cpu": 4, "cuda": 16, "mps": 8}  # a CPU is faster on what its caches hold

# Upper bounds of what `benchmarks/memory.py` measured on a CPU (results/memory_cpu.json); elsewhere unmeasured.
# What the process holds at all; per pixel of the whole frame (the video's reader and writer), per such pixel and frame
# of a chunk (the LQ and the result),
# and per pixel of a tile and frame in the model, by bytes of the dtype.
BASE_BYTES = 540 * 2**20
BYTES_PER_PIXEL = 420
BYTES_PER_PIXEL_AND_FRAME = 24
MODEL_BYTES = {2: 110, 4: 130}


@dataclass(frozen=True)
class Tile:
    """A rectangle of the padded output frame, in pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Plan:
    """How a clip is worked on. The same plan gives the same pixels; it is what `--dry-run` prints."""

    source_size: tuple[int, int]  # (width, height)
    target_size: tuple[int, int]
    padded_size: tuple[int, int]
    chunk: int  # frames a model call, a multiple of 4 (one more at a scene's start)
    overlap: int | None  # warm-up frames of independent chunks; None: state is carried from chunk to chunk
    tiles: tuple[Tile, ...]
    device: str
    dtype: str
    memory_bytes: int  # estimated peak

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_clip(
    width: int, height: int, options: UpscaleOptions, *, device: str, dtype: str, dtype_bytes: int, free_bytes: int
) -> Plan:
    """Plan a clip of `width` x `height` frames for a device with `free_bytes` to spend.

    Raises UsageError where `options` ask for the impossible.
    """
    target = options.target_size(width, height)
    padded = (_round_up(target[0], PAD_MULTIPLE), _round_up(target[1], PAD_MULTIPLE))
    chunk = max(TEMPORAL_FACTOR, (options.chunk or DEFAULT_CHUNK[device]) // TEMPORAL_FACTOR * TEMPORAL_FACTOR)
    overlap = None if options.overlap is None else _round_up(options.overlap, TEMPORAL_FACTOR)

    def memory(tile: int, frames: int) -> int:
        frame_pixels = padded[0] * padded[1]
        tile_pixels = min(tile or padded[0], padded[0]) * min(tile or padded[1], padded[1])
        whole = frame_pixels * (BYTES_PER_PIXEL + BYTES_PER_PIXEL_AND_FRAME * frames)
        return BASE_BYTES + whole + tile_pixels * (frames + 1) * MODEL_BYTES[dtype_bytes]

    tile = options.tile
    if tile is None:  # auto: whole frames if they fit, shorter chunks before smaller tiles (tiles cost overlap)
        tile = 0
        if options.chunk is None and memory(0, chunk) > free_bytes:
            chunk = TEMPORAL_FACTOR
        if memory(0, chunk) > free_bytes:
            sides = range(_round_up(max(padded), TILE_ALIGN), MIN_TILE - 1, -TILE_ALIGN)
            tile = next((side for side in sides if memory(side, chunk) <= free_bytes), MIN_TILE)
    elif tile != 0 and tile < MIN_TILE:
        raise UsageError(f"unsupported tile: `{tile}`", hint=f"use `auto`, `off` or {MIN_TILE} pixels and more")
    else:
        tile = tile // TILE_ALIGN * TILE_ALIGN
    return Plan(
        source_size=(width, height),
        target_size=target,
        padded_size=padded,
        chunk=chunk,
        overlap=overlap,
        tiles=plan_tiles(*padded, tile),
        device=device,
        dtype=dtype,
        memory_bytes=memory(tile, chunk),
    )


def plan_tiles(width: int, height: int, side: int) -> tuple[Tile, ...]:
    """Tiles of `side` (a multiple of TILE_ALIGN; 0: the whole frame) with TILE_OVERLAP pixels in common."""
    columns, rows = _tile_spans(width, side), _tile_spans(height, side)
    return tuple(Tile(x, y, w, h) for y, h in rows for x, w in columns)


def _tile_spans(length: int, side: int) -> list[tuple[int, int]]:
    """(start, length) of tiles along an axis: starts are multiples of TILE_ALIGN, the last ends with the frame."""
    if side == 0 or length <= side:
        return [(0, length)]
    spans, start = [], 0
    while start + side < length:
        spans.append((start, side))
        start += side - TILE_OVERLAP
    return [*spans, (start, length - start)]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

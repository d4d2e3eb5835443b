"""Deciding, in pure integers: sizes, padding, temporal chunks, spatial tiles, memory. Knows no models and no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from duovsr.errors import UsageError
from duovsr.options import Preset, UpscaleOptions, WanVAEConfig

TEMPORAL_FACTOR = 4  # frames a latent
PAD_MULTIPLE = 16  # pixels a token: 8 by the autoencoder, 2 by the patch
TILE_ALIGN = 256  # twice a window of 8 tokens: a tile then sees the windows that the whole frame would
TILE_OVERLAP = 256
MIN_TILE = 2 * TILE_OVERLAP
DEFAULT_CHUNK = {"cpu": 4, "cuda": 16, "mps": 8}  # a CPU is faster on what its caches hold

# A model that does not stream restores clips of 21 frames, on which the paper times its own: 16 new ones, and 5 that
# the clip before ended with: one latent's 4 frames, and the frame that the autoencoder's start holds alone. Over these
# 5 the results of the two clips are cross-faded.
CLIP_CHUNKS, CLIP_OVERLAP = (16, 8), 4

# Its autoencoder works in tiles of its own, on which the transformer does not depend. TinyVAE takes a few latents a
# call; Wan2.1's takes the clip, and a few frames at a time at full size, which costs less than tiles do.
VAE_TILES = (1536, 1152, 1024, 768, 640, 512, 384, 256)  # output pixels a side
VAE_TILE_OVERLAP = 128
VAE_LATENTS = 2  # a call, or 1 where memory is short
VAE_FRAMES = 8  # at a time, or half as many where memory is short, down to 1
FEW_FRAMES = 4  # with fewer, each convolution copies more of the frames before them than taking turns moves of weights
MOST_ELEMENTS = 2**31 - 1  # of a tensor: convolutions index with 32 bits

# Upper bounds of what `benchmarks/memory.py` measured on a CPU (results/memory_cpu.json); elsewhere unmeasured.
# What the process holds at all; per pixel of the whole frame (the video's reader and writer), per such pixel and frame
# of a chunk (the LQ and the result),
# and per pixel of a tile and frame in the model, by bytes of the dtype.
BASE_BYTES = 540 * 2**20
BYTES_PER_PIXEL = 420
BYTES_PER_PIXEL_AND_FRAME = 24
MODEL_BYTES = {2: 110, 4: 185}

# Upper bounds of what tests/test_wan_work.py counts on the meta device. Of Wan2.1's autoencoder, whose decoder takes
# more than its encoder, in elements of the dtype per pixel of a tile, as multiples of its narrowest width: what it
# remembers, and what each of the frames takes on which it works at a time. Of a clip, in bytes per pixel and frame: the
# LQ and the LQ padded; a result, which there is of the frame and of each kind of tile.
WAN_DECODE = (27, 5)
CLIP_BYTES, RESULT_BYTES = 24, 12


@dataclass(frozen=True)
class Tile:
    """A rectangle of the padded output frame, in pixels."""

    x: int
    y: int
    width: int
    height: int

    def reduced(self, factor: int) -> Tile:
        """The same part of a picture with 1 / `factor` of the sides."""
        return Tile(self.x // factor, self.y // factor, self.width // factor, self.height // factor)


@dataclass(frozen=True)
class WeightBytes:
    """What a model's two large parts hold."""

    transformer: int
    vae: int


@dataclass(frozen=True)
class Precision:
    """A way to hold the weights, and what a plan may spend with them so held."""

    name: str  # a dtype, or 8 bits of the transformer's
    value_bytes: int  # of the dtype that is computed with
    weights: WeightBytes
    free_bytes: int  # the weights' own included


@dataclass(frozen=True)
class Plan:
    """How a clip is worked on. The same plan gives the same pixels; it is what `--dry-run` prints."""

    source_size: tuple[int, int]  # (width, height)
    target_size: tuple[int, int]
    padded_size: tuple[int, int]
    chunk: int  # frames a model call, a multiple of 4 (one more at a scene's start)
    overlap: int | None  # warm-up frames of chunks that start anew; None: state is carried from chunk to chunk
    fade: int  # frames at a chunk's start that are cross-faded with the end of the chunk before; 0: none
    tiles: tuple[Tile, ...]
    device: str
    dtype: str  # how the weights are held: `Precision.name`
    memory_bytes: int  # estimated peak
    vae_tile: int = 0  # output pixels a side of the autoencoder's own tiles; 0: those of the model
    vae_latents: int = 0  # of a call of the autoencoder, of a model that does not stream; 0: the whole clip
    vae_frames: int = 0  # that Wan2.1's autoencoder works on at a time at full size; 0: all of a call
    offload: bool = False  # the transformer and the autoencoder take turns on the device

    @property
    def scale(self) -> float:
        """By how much a picture grows, along a side; the mean where the two differ."""
        (width, height), (new_width, new_height) = self.source_size, self.target_size
        return math.sqrt(new_width * new_height / (width * height))

    @property
    def independent(self) -> bool:
        """Whether a chunk takes nothing over from the one before."""
        return self.overlap is not None and not self.fade

    @property
    def pieces(self) -> str:
        """How the autoencoder of a model that does not stream works, in words."""
        tiles = f"tiles of {self.vae_tile} pixels" if self.vae_tile else "whole frames"
        count, unit = (self.vae_frames, "frame") if self.vae_frames else (self.vae_latents, "latent")
        turns = ", in turns with the transformer" if self.offload else ""
        return f"{count} {unit}{'s' * (count > 1)} at a time, {tiles}{turns}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote, through JSON."""
        sizes = {name: tuple(record[name]) for name in ("source_size", "target_size", "padded_size")}
        return cls(**{**record, **sizes, "tiles": tuple(Tile(**tile) for tile in record["tiles"])})


def plan_clip(
    width: int,
    height: int,
    options: UpscaleOptions,
    preset: Preset,
    *,
    device: str,
    precisions: Sequence[Precision],
) -> Plan:
    """Plan a clip of `width` x `height` frames.

    Of the ways to work with the first of `precisions`, the best and fastest that fits; else of those with the next; or
    the smallest with the last. Raises UsageError where `options` ask for the impossible.
    """
    target = options.target_size(width, height)
    if options.tile is not None and 0 < options.tile < MIN_TILE:
        raise UsageError(f"unsupported tile: `{options.tile}`", hint=f"use `auto`, `off` or {MIN_TILE} pixels and more")
    streams = preset.transformer.streams
    overlap = CLIP_OVERLAP if options.overlap is None and not streams else options.overlap
    overlap = None if overlap is None else _round_up(overlap, TEMPORAL_FACTOR)
    plan = Plan(
        source_size=(width, height),
        target_size=target,
        padded_size=(_round_up(target[0], PAD_MULTIPLE), _round_up(target[1], PAD_MULTIPLE)),
        chunk=TEMPORAL_FACTOR,
        overlap=overlap,
        fade=0 if overlap is None or streams else overlap + 1,
        tiles=(),
        device=device,
        dtype="",
        memory_bytes=0,
    )
    chosen = None
    for precision in precisions:
        for way in _stream_ways(plan, options) if streams else _clip_ways(plan, options, preset):
            chosen = _priced(way, preset, precision)
            if chosen.memory_bytes <= precision.free_bytes:
                return _filled(chosen, preset, precision)
    if chosen is None:
        raise UsageError(
            f"model calls too large to compute: {target[0]}x{target[1]} in whole frames or tiles as asked for",
            hint="use a smaller `--tile` or `--chunk`, or leave them out",
        )
    return chosen


def _priced(way: Plan, preset: Preset, precision: Precision) -> Plan:
    memory = planned_bytes(way, preset, precision.value_bytes, precision.weights)
    return replace(way, dtype=precision.name, memory_bytes=memory)


def _filled(plan: Plan, preset: Preset, precision: Precision) -> Plan:
    """With as many frames at a time as fit: tiles and turns may have made more room than they had to."""
    if 0 < plan.vae_frames < VAE_FRAMES:
        more = _priced(replace(plan, vae_frames=2 * plan.vae_frames), preset, precision)
        if more.memory_bytes <= precision.free_bytes and _largest_tensor(more, preset) <= MOST_ELEMENTS:
            return _filled(more, preset, precision)
    return plan


def _stream_ways(plan: Plan, options: UpscaleOptions) -> Iterator[Plan]:
    """Whole frames, then shorter chunks before smaller tiles (tiles cost overlap)."""
    *longer, shortest = _chunks(options, (DEFAULT_CHUNK[plan.device], TEMPORAL_FACTOR))
    whole, *smaller = _tile_sides(plan, options)
    for chunk, side in [*((chunk, whole) for chunk in longer), *((shortest, side) for side in (whole, *smaller))]:
        yield replace(plan, chunk=chunk, tiles=plan_tiles(*plan.padded_size, side))


def _clip_ways(plan: Plan, options: UpscaleOptions, preset: Preset) -> Iterator[Plan]:
    """Smaller pieces for the autoencoder, then shorter clips, then smaller tiles for the transformer, too."""
    wan = isinstance(preset.vae, WanVAEConfig)
    plan = replace(plan, vae_frames=VAE_FRAMES) if wan else replace(plan, vae_latents=VAE_LATENTS)
    for side in _tile_sides(plan, options):
        for chunk in _chunks(options, CLIP_CHUNKS):
            way: Plan | None = replace(plan, chunk=chunk, tiles=plan_tiles(*plan.padded_size, side))
            while way is not None:
                if _largest_tensor(way, preset) <= MOST_ELEMENTS:
                    yield way
                way = with_smaller_pieces(way)


def with_smaller_pieces(plan: Plan) -> Plan | None:
    """The same clips and tiles for the transformer, with less memory; None where nothing less is left."""
    can_offload = plan.device == "cuda" and not plan.offload
    if plan.vae_frames > (FEW_FRAMES if can_offload else 1):
        return replace(plan, vae_frames=plan.vae_frames // 2)
    if plan.vae_latents > 1:
        return replace(plan, vae_latents=1)
    if can_offload:
        return replace(plan, offload=True)
    side = max(plan.tiles[0].width, plan.tiles[0].height)
    smaller = [tile for tile in VAE_TILES if tile < min(plan.vae_tile or side, side)]
    return replace(plan, vae_tile=smaller[0]) if smaller else None


def step_down(plan: Plan) -> Plan | None:
    """What to do where clips of the plan's length did not fit after all; None where nothing is left to do."""
    side = max(plan.tiles[0].width, plan.tiles[0].height)
    smaller = max(MIN_TILE, (side - 1) // 2 // TILE_ALIGN * TILE_ALIGN)
    tiles = replace(plan, tiles=plan_tiles(*plan.padded_size, smaller)) if smaller < side else None
    return with_smaller_pieces(plan) or tiles


def shorter_calls(plan: Plan) -> Plan | None:
    """`step_down` for a model that streams: a chunk is done in several calls, each with the state of the one before."""
    length = plan.chunk + (plan.overlap or 0)
    shorter = max(TEMPORAL_FACTOR, length // 2 // TEMPORAL_FACTOR * TEMPORAL_FACTOR)
    return replace(plan, chunk=shorter, overlap=None) if shorter < length else None


def planned_bytes(plan: Plan, preset: Preset, dtype_bytes: int, weights: WeightBytes) -> int:
    """The peak that the plan leads to."""
    frame = plan.padded_size[0] * plan.padded_size[1]
    tile = plan.tiles[0].width * plan.tiles[0].height
    frames = plan.chunk + (plan.overlap or 0) + 1
    if preset.transformer.streams:
        whole = frame * (BYTES_PER_PIXEL + BYTES_PER_PIXEL_AND_FRAME * (frames - 1))
        return BASE_BYTES + whole + tile * frames * MODEL_BYTES[dtype_bytes]
    transformer = _tokens(plan) * (2 * preset.transformer.ffn_dim + 5 * preset.transformer.dim) * dtype_bytes
    if isinstance(preset.vae, WanVAEConfig):
        remembered, each = WAN_DECODE
        vae = _vae_pixels(plan) * preset.vae.dim * (remembered + each * plan.vae_frames) * dtype_bytes
    else:
        vae = _vae_pixels(plan) * (TEMPORAL_FACTOR * plan.vae_latents + 1) * MODEL_BYTES[dtype_bytes]
    host = frame * BYTES_PER_PIXEL if plan.device == "cpu" else 0
    results = sum({frame, tile, _vae_pixels(plan)})  # of equal sizes are one
    around = BASE_BYTES + host + frames * (frame * CLIP_BYTES + results * RESULT_BYTES)
    if plan.offload:
        return around + max(weights.transformer + transformer, weights.vae + vae)
    return around + weights.transformer + weights.vae + max(transformer, vae)


def _vae_pixels(plan: Plan) -> int:
    sides = plan.tiles[0].width, plan.tiles[0].height
    width, height = (min(plan.vae_tile or side, side) for side in sides)
    return width * height


def _largest_tensor(plan: Plan, preset: Preset) -> int:
    """Elements: of the feed-forward layers; of Wan2.1's autoencoder the frames at a time and the two before them."""
    transformer = _tokens(plan) * preset.transformer.ffn_dim
    if not isinstance(preset.vae, WanVAEConfig):
        return transformer
    return max(transformer, _vae_pixels(plan) * preset.vae.dim * (plan.vae_frames + 2))


def _tokens(plan: Plan) -> int:
    frames = plan.chunk + (plan.overlap or 0) + 1
    return plan.tiles[0].width * plan.tiles[0].height // PAD_MULTIPLE**2 * ((frames - 1) // TEMPORAL_FACTOR + 1)


def _chunks(options: UpscaleOptions, usual: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths to try: that which is asked for, or the usual ones."""
    if options.chunk is None:
        return usual
    return (max(TEMPORAL_FACTOR, options.chunk // TEMPORAL_FACTOR * TEMPORAL_FACTOR),)


def _tile_sides(plan: Plan, options: UpscaleOptions) -> list[int]:
    """Sides of tiles to try, from the whole frame (0) down; only that which is asked for."""
    if options.tile is not None:
        return [options.tile // TILE_ALIGN * TILE_ALIGN]
    return [0, *range(_round_up(max(plan.padded_size), TILE_ALIGN) - TILE_ALIGN, MIN_TILE - 1, -TILE_ALIGN)]


def plan_tiles(width: int, height: int, side: int, overlap: int = TILE_OVERLAP) -> tuple[Tile, ...]:
    """Tiles of `side` (a multiple of `overlap`; 0: the whole frame) with `overlap` pixels in common."""
    columns, rows = _tile_spans(width, side, overlap), _tile_spans(height, side, overlap)
    return tuple(Tile(x, y, w, h) for y, h in rows for x, w in columns)


def _tile_spans(length: int, side: int, overlap: int) -> list[tuple[int, int]]:
    """(start, length) of tiles along an axis: starts are multiples of `overlap`, the last ends with the frame."""
    if side == 0 or length <= side:
        return [(0, length)]
    spans, start = [], 0
    while start + side < length:
        spans.append((start, side))
        start += side - overlap
    return [*spans, (start, length - start)]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""Pools of training windows -> pairs of frames or latents that belong to a sample's random numbers.

What a sample shows is a function of its `Draws` alone: resume needs no loader state, and neither the number of
processes nor of micro-batches changes what is seen.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, is_dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Generator, Tensor
from torch.nn import functional as F

from duovsr.errors import InputError
from duovsr.model.resize import resize_frames
from duovsr.train.degradation import DegradationConfig
from duovsr.train.degradation_batched import degrade_batch
from duovsr.train.draws import Draws
from duovsr.train.sources import identity_of
from duovsr.video.output import check_space

LATENTS, SHARPNESS, ENCODED_BY = "latents.npy", "sharpness.npy", "autoencoder.sha256"
SOURCES = "sources.json"  # of latents: what their windows were cut from
PAIRS, PAIRS_RECORD = "pairs.npy", "pairs.json"


class Frames(NamedTuple):
    """HQ and enlarged LQ (B, 3, T, H, W) in [-1, 1], and by how much each LQ was enlarged (B,)."""

    hq: Tensor
    lq: Tensor
    scale: Tensor


class Latents(NamedTuple):
    """Of HQ and LQ (B, C, T, h, w), and the sharpness of the HQ frames (B,), see `sharpness`."""

    z0: Tensor
    z_lq: Tensor
    sharpness: Tensor


@dataclass(frozen=True)
class _Window:
    """Where a crop lies: pool, row, first frame, top, left, and what is done to it."""

    pool: int
    row: int
    t: int
    y: int
    x: int
    flips: tuple[int, ...] = ()
    transpose: bool = False


class Pool:
    """Random crops of one or more pools of equal window size (see `pool.build_pool` for their files).

    In a pool without `lq.npy` the LQ is made on the training device, new for every batch; codec passes, which cannot
    run there, come from the other pools.
    """

    def __init__(self, folders: list[Path]) -> None:
        for folder in folders:
            if not (folder / "scale.npy").is_file():
                raise InputError(f"not a finished training pool: `{folder}`", hint="make it with `duovsr train pool`")
        self.folder = folders[0]
        self.hq = [read_array(folder / "hq.npy") for folder in folders]
        self.lq = [read_array(folder / "lq.npy") if (folder / "lq.npy").is_file() else None for folder in folders]
        self.scale = [read_array(folder / "scale.npy") for folder in folders]
        records = [_record_of(folder) for folder in folders]
        self.degradation = [degradation for degradation, _ in records]
        self.sources = frozenset[str]().union(*(sources for _, sources in records))
        of_each = [[(i, int(row)) for row in np.flatnonzero(scale)] for i, scale in enumerate(self.scale)]
        self.usable = list(chain.from_iterable(of_each))
        self.in_turn = [window for turn in zip_longest(*of_each) for window in turn if window is not None]
        if not self.usable:
            raise InputError(f"no usable window in training pool: `{folders[0]}`", hint="see its pool.json")
        self.length, self.side = self.hq[0].shape[1:3]
        for folder, hq in zip(folders, self.hq, strict=True):
            if hq.shape[1:3] != (self.length, self.side):
                raise InputError(
                    f"windows of another size than those of `{folders[0]}`: `{folder}`",
                    hint="pools of one run need the same `side` and `frames`",
                )

    def require(self, crop: int, frames: int) -> None:
        """Raises InputError where the windows are smaller than what a stage asks for."""
        if crop > self.side or frames > self.length:
            raise InputError(
                f"the stage asks for {frames} frames of {crop} pixels,"
                f" `{self.folder}` has {self.length} of {self.side}",
                hint="set `crop` and `frames`, or make a pool with other `side` and `frames`",
            )

    def frames(self, draws: Draws, crop: int, frames: int) -> Frames:
        """(B, 3, frames, crop, crop), cropped, flipped and turned at random."""
        return self._load([self._draw(g, crop, frames) for g in draws.generators], draws, crop, frames)

    def fixed(self, rows: range, crop: int, frames: int, device: torch.device) -> Frames:
        """The centre crops of the usable windows `rows`, always the same; the pools take turns."""
        start = (self.side - crop) // 2
        places = [self.in_turn[row % len(self.in_turn)] for row in rows]
        windows = [_Window(pool, row, 0, start, start) for pool, row in places]
        draws = Draws.of(rows, seed=0, step=0, part=0, device=device)
        return self._load(windows, draws, crop, frames)

    def _draw(self, generator: Generator, crop: int, frames: int) -> _Window:
        def below(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        pool, row = self.usable[below(len(self.usable))]
        t, y, x = below(self.length - frames + 1), below(self.side - crop + 1), below(self.side - crop + 1)
        flips = tuple(axis for axis in (1, 2, 3) if below(2))  # time, height, width of (3, T, H, W)
        return _Window(pool, row, t, y, x, flips, bool(below(2)))

    def _load(self, windows: list[_Window], draws: Draws, crop: int, frames: int) -> Frames:
        whole = [_to_float(self.hq[w.pool][w.row, w.t : w.t + frames], draws.device) for w in windows]
        pairs = []
        for window, hq, lq in zip(windows, whole, self._lq(windows, whole, draws), strict=True):
            lq = resize_frames(lq[None], self.side, self.side)[0]
            pair = torch.stack([hq, lq])[..., window.y : window.y + crop, window.x : window.x + crop]
            pair = pair.flip([axis + 1 for axis in window.flips]) if window.flips else pair
            pairs.append(pair.transpose(3, 4) if window.transpose else pair)
        scale = torch.tensor([float(self.scale[w.pool][w.row]) for w in windows], device=draws.device)
        hq_batch, lq_batch = torch.stack(pairs, dim=1)
        return Frames(hq_batch, lq_batch, scale)

    def _lq(self, windows: list[_Window], whole: list[Tensor], draws: Draws) -> list[Tensor]:
        """LQ of whole HQ windows (3, T, side, side): (3, T, h, w) each, in [-1, 1]."""
        lq: dict[int, Tensor] = {}
        live: dict[tuple[int, int], list[int]] = {}  # by pool and the LQ's side: those are degraded as one batch
        for i, window in enumerate(windows):
            small = round(self.side / float(self.scale[window.pool][window.row]))
            stored = self.lq[window.pool]
            if stored is None:
                live.setdefault((window.pool, small), []).append(i)
            else:
                T = whole[i].shape[1]
                lq[i] = _to_float(stored[window.row, window.t : window.t + T, :small, :small], draws.device)
        for (pool, small), members in live.items():
            hq = torch.stack([(whole[i].transpose(0, 1) + 1) / 2 for i in members])
            generators = [draws.generators[i] for i in members]
            degraded = degrade_batch(hq, small, small, self.degradation[pool], generators)
            lq |= {i: one.transpose(0, 1) * 2 - 1 for i, one in zip(members, degraded, strict=True)}
        return [lq[i] for i in range(len(windows))]


class LatentPool:
    """Latents that `cache.cache_latents` wrote once: for an autoencoder that costs more than the stage itself."""

    def __init__(self, folder: Path) -> None:
        if not (folder / SHARPNESS).is_file():  # written last
            raise InputError(f"no finished latents in `{folder}`", hint="make them with `duovsr train latents`")
        self.folder = folder
        self.pairs = read_array(folder / LATENTS)
        self.sharpness = read_array(folder / SHARPNESS)
        self.encoded_by = (folder / ENCODED_BY).read_text()
        sources = folder / SOURCES
        noted = json.loads(sources.read_text()) if sources.is_file() else ()  # older ones lack it
        self.sources = frozenset[str](noted)

    def latents(self, draws: Draws) -> Latents:
        rows = [int(torch.randint(len(self.pairs), (), generator=g)) for g in draws.generators]
        pairs = torch.from_numpy(self.pairs[rows]).to(draws.device).float()
        sharp = torch.from_numpy(self.sharpness[rows]).to(draws.device)
        return Latents(pairs[:, 0], pairs[:, 1], sharp)


class PairPool:
    """Pairs that `stage3.build_pairs` wrote."""

    def __init__(self, folder: Path) -> None:
        record = folder / PAIRS_RECORD
        if not record.is_file():  # written last
            raise InputError(f"no finished preference pairs in `{folder}`", hint="make them with `duovsr train prefs`")
        self.folder = folder
        try:
            noted = json.loads(record.read_text())
            count, self.encoded_by = noted["pairs"], str(noted["autoencoder"])
            self.sources = frozenset[str](noted.get("sources", ()))  # which older ones lack
        except _DAMAGED as error:
            raise InputError(f"damaged preference pairs: `{record}`", hint="make them again") from error
        self.pairs = read_array(folder / PAIRS)[:count]

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """LQ, chosen and rejected latents (B, C, T, h, w), float32."""
        rows = [int(torch.randint(len(self.pairs), (), generator=g)) for g in draws.generators]
        z_lq, chosen, rejected = torch.from_numpy(self.pairs[rows]).to(draws.device).float().unbind(1)
        return z_lq, chosen, rejected


def sharpness(frames: Tensor) -> Tensor:
    """Variance of the Laplacian of the first frame's grey levels: (B, 3, T, H, W) in [-1, 1] -> (B,), of 0..255."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=frames.device).view(1, 3, 1, 1)
    grey = ((frames[:, :, 0] + 1) * 127.5 * weights).sum(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=frames.device)
    return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), kernel[None, None]).var((1, 2, 3))


def new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A float16 array on the disk. Raises NoSpaceError where it would not fit: a mapped file that runs out kills."""
    check_space(path, 2 * math.prod(shape))
    return open_memmap(path, "w+", np.float16, shape)


_DAMAGED = (OSError, ValueError, EOFError, KeyError, TypeError, BadZipFile)


def read_array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except _DAMAGED as error:
        raise InputError(f"damaged training data: `{path}`", hint="make it again") from error
    return array


def _record_of(folder: Path) -> tuple[DegradationConfig, frozenset[str]]:
    """What a pool's `pool.json` says of its degradation, which a live pool goes on with, and of its sources."""
    path = folder / "pool.json"
    if not path.is_file():
        return DegradationConfig(), frozenset()
    try:
        record = json.loads(path.read_text())
        sources = (identity_of(name, record.get("directory", ".")) for name in record["sources"])
        return _filled(DegradationConfig(), record["config"]["degradation"]), frozenset(sources)
    except _DAMAGED as error:
        raise InputError(f"damaged training data: `{path}`", hint="make it again") from error


def _filled(config: Any, values: dict[str, Any]) -> Any:
    """A configuration with the values that were written as JSON."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if not hasattr(config, name):
            continue  # of an older release
        current = getattr(config, name)
        nested = is_dataclass(current) and isinstance(value, dict)
        changes[name] = _filled(current, value) if nested else tuple(value) if isinstance(value, list) else value
    return replace(config, **changes)


def _to_float(frames: np.ndarray, device: torch.device) -> Tensor:
    """(T, H, W, 3) uint8 -> (3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames.copy()).to(device).permute(3, 0, 1, 2).float() / 127.5 - 1

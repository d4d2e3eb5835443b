"""Training pairs: clips and stills -> a pool of degraded windows on disk -> batches by step number.

Codec passes are slow, so windows are degraded once into a pool and cropped, flipped and reversed at random from
there. A batch is a pure function of (seed, step): resume needs no loader state.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Generator, Tensor
from torch.nn import functional as F
from tqdm import tqdm

from duovsr.errors import InputError, TrainError, UsageError
from duovsr.model.resize import resize_frames
from duovsr.train.degradation import DegradationConfig, chance, degrade, uniform
from duovsr.video.reader import VideoReader

SCALES = (4, 3, 2)
VALIDATION_PART = 12  # one source in so many is held out


@dataclass(frozen=True)
class PoolConfig:
    """A pool of `samples` windows of `frames` x `side` x `side` HQ pixels with their LQ."""

    samples: int = 3000
    frames: int = 9
    side: int = 192
    seed: int = 0
    validation: bool = False  # from the held-out sources instead of the others
    stills: float = 0.55  # part of the samples made from stills by synthetic camera motion
    scale_weights: tuple[float, float, float] = (0.7, 0.1, 0.2)  # of SCALES
    degradation: DegradationConfig = DegradationConfig()

    def __post_init__(self) -> None:
        if self.side % 24:
            raise UsageError(f"unsupported side: `{self.side}`", hint="a multiple of 24 keeps the LQ's sides even")


@dataclass(frozen=True)
class Source:
    path: Path
    still: bool
    weight: float
    validation: bool


def find_sources(folders: list[Path]) -> list[Source]:
    """Every clip and still named by the folders' `manifest.csv`; held-out sources are chosen by a hash of their
    origin, so that two cuts of one recording never fall on different sides."""
    sources = []
    for folder in folders:
        manifest = folder / "manifest.csv"
        if not manifest.is_file():
            raise InputError(f"no manifest.csv in `{folder}`", hint="see duovsr/train/data.py for its columns")
        with manifest.open(newline="") as file:
            for row in csv.DictReader(file):
                # Sharper sources teach more; above 2500 the measure is sharpening and noise. Generated clips carry
                # their generator's texture.
                weight = math.sqrt(min(float(row["lapvar"]), 2500.0))
                weight *= {"ai-generated": 0.3, "animation": 0.7}.get(row["kind"], 1.0)
                digest = hashlib.sha256(f"{row['repo']}/{row['path']}".encode()).digest()
                held_out = digest[0] % VALIDATION_PART == 0
                sources.append(Source(folder / row["file"], row["kind"] == "still", weight, held_out))
    return sources


def read_frames(path: Path) -> Tensor:
    """All frames of a clip or image as (T, 3, H, W) uint8."""
    with VideoReader(path) as reader:
        return torch.stack([torch.from_numpy(frame.pixels).permute(2, 0, 1) for frame in reader])


def camera_move(still: Tensor, frames: int, side: int, generator: Generator) -> Tensor:
    """A window that pans, zooms and turns over a still (1, 3, H, W) in [0, 1] -> (frames, 3, side, side)."""
    H, W = still.shape[2:]
    zoom = uniform(1.0, min(2.2, min(H, W) / (side * 1.15)), generator) if min(H, W) > side * 1.15 else 1.0
    still = F.interpolate(still, scale_factor=1 / zoom, mode="bicubic", antialias=True).clamp(0, 1)
    H, W = still.shape[2:]
    span = torch.linspace(-0.5, 0.5, frames) * (frames - 1)
    speed, heading = uniform(0, 3.0, generator) ** 2 / 3.0, uniform(-math.pi, math.pi, generator)
    shake = torch.cumsum(torch.randn(frames, 2, generator=generator) * uniform(0, 0.4, generator), 0)
    reach = side / 2 + speed * frames / 2 + 4
    x = uniform(min(reach, W / 2), max(W - reach, W / 2), generator) + speed * math.cos(heading) * span + shake[:, 0]
    y = uniform(min(reach, H / 2), max(H - reach, H / 2), generator) + speed * math.sin(heading) * span + shake[:, 1]
    angle = uniform(-0.3, 0.3, generator) + uniform(-0.006, 0.006, generator) * span
    scale = 1 + uniform(-0.006, 0.006, generator) * span
    cos, sin = torch.cos(angle) * scale * side, torch.sin(angle) * scale * side
    theta = torch.stack(
        [
            torch.stack([cos / W, -sin / W, 2 * x / W - 1], dim=1),
            torch.stack([sin / H, cos / H, 2 * y / H - 1], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [frames, 3, side, side], align_corners=False)
    moved = F.grid_sample(
        still.expand(frames, -1, -1, -1), grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return moved.clamp(0, 1)


def crop_clip(clip: Tensor, frames: int, side: int, generator: Generator) -> Tensor:
    """A random window of a clip (T, 3, H, W) uint8 -> (frames, 3, side, side) in [0, 1]; short clips are mirrored."""
    if clip.shape[0] < frames:
        clip = torch.cat([clip, clip.flip(0)] * math.ceil(frames / clip.shape[0]))
    room = (clip.shape[0] - frames, clip.shape[2] - side, clip.shape[3] - side)
    t, y, x = (int(torch.randint(r + 1, (), generator=generator)) for r in room)
    return clip[t : t + frames, :, y : y + side, x : x + side].float() / 255


def build_pool(folders: list[Path], out: Path, config: PoolConfig) -> None:
    """Write `hq.npy` (N, T, side, side, 3) uint8, `lq.npy` (N, T, side / 2, side / 2, 3) uint8 (the LQ in its top left
    corner), `scale.npy` (N,) and `pool.json`. Unreadable sources are skipped and counted in `pool.json`."""
    sources = [s for s in find_sources(folders) if s.validation == config.validation]
    generator = torch.Generator().manual_seed(config.seed + config.validation)
    is_still = torch.rand(config.samples, generator=generator) < config.stills
    choice = torch.full((config.samples,), -1)
    for still in (True, False):
        weights = torch.tensor([s.weight * (s.still == still) for s in sources])
        if not weights.any():
            continue
        chosen = torch.multinomial(weights, config.samples, replacement=True, generator=generator)
        choice = torch.where(is_still == still, chosen, choice)
    if (choice < 0).any():
        missing = "clips" if is_still.all() or not any(not s.still for s in sources) else "stills"
        raise TrainError(
            f"the sources have no {missing}", hint="set the part of the stills with `--set stills=0` or `1`"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "scale.npy").unlink(missing_ok=True)  # written last: a pool with it is finished
    N, T, side = config.samples, config.frames, config.side
    hq = open_memmap(out / "hq.npy", "w+", np.uint8, (N, T, side, side, 3))
    lq = open_memmap(out / "lq.npy", "w+", np.uint8, (N, T, side // 2, side // 2, 3))
    scales = np.zeros(N, np.int64)
    skipped: list[str] = []
    current, loaded = None, None
    place = torch.randperm(N, generator=generator)  # one source is read once, its windows lie scattered
    for index in tqdm(choice.argsort().tolist(), desc="pool", disable=None):
        source = sources[int(choice[index])]
        generator.manual_seed(config.seed * 1_000_003 + index * 2 + config.validation)
        if source is not current:
            current, loaded = source, _load(source, side, skipped)
        if loaded is None:
            continue
        if source.still:
            window = camera_move(loaded.float() / 255, T, side, generator)
        else:
            window = crop_clip(loaded, T, side, generator)
        scale = SCALES[int(torch.multinomial(torch.tensor(config.scale_weights), 1, generator=generator))]
        small = degrade(window, side // scale, side // scale, config.degradation, generator)
        row = int(place[index])
        hq[row] = (window * 255).round().byte().permute(0, 2, 3, 1).numpy()
        lq[row, :, : side // scale, : side // scale] = (small * 255).round().byte().permute(0, 2, 3, 1).numpy()
        scales[row] = scale
    if not scales.any():
        raise TrainError("no usable training source", hint="check the folders given with `--data`")
    np.save(out / "scale.npy", scales)
    record = {"config": asdict(config), "sources": len(sources), "skipped": skipped}
    (out / "pool.json").write_text(json.dumps(record, indent=1))


def _load(source: Source, side: int, skipped: list[str]) -> Tensor | None:
    try:
        frames = read_frames(source.path)
    except InputError as error:
        skipped.append(str(error))
        return None
    if min(frames.shape[2:]) < side:
        skipped.append(f"smaller than {side} pixels: `{source.path.name}`")
        return None
    return frames


class Pool:
    """Random crops of one or more pools of equal window size. `batch(step)` depends on (seed, step) alone."""

    def __init__(self, folders: list[Path], seed: int) -> None:
        for folder in folders:
            if not (folder / "scale.npy").is_file():
                raise InputError(f"not a finished training pool: `{folder}`", hint="make it with `duovsr train pool`")
        self.hq = [np.load(folder / "hq.npy", mmap_mode="r") for folder in folders]
        self.lq = [np.load(folder / "lq.npy", mmap_mode="r") for folder in folders]
        self.scale = [np.load(folder / "scale.npy") for folder in folders]
        self.usable = [(i, int(row)) for i, scale in enumerate(self.scale) for row in np.flatnonzero(scale)]
        self.seed = seed

    def batch(self, step: int, size: int, crop: int, frames: int, *, augment: bool = True) -> tuple[Tensor, Tensor]:
        """HQ and upsampled LQ (size, 3, frames, crop, crop) in [-1, 1]. Without `augment`: centre crops in order."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        n = len(self.usable)
        rows = torch.randint(n, (size,), generator=generator) if augment else (torch.arange(size) + step * size) % n
        pairs = [self._pair(*self.usable[int(row)], crop, frames, generator, augment) for row in rows]
        hq, lq = (torch.stack(side) for side in zip(*pairs, strict=True))
        return hq, lq

    def _pair(
        self, pool: int, row: int, crop: int, frames: int, generator: Generator, augment: bool
    ) -> tuple[Tensor, Tensor]:
        length, side = self.hq[pool].shape[1:3]
        small = side // int(self.scale[pool][row])
        t, y, x = 0, (side - crop) // 2, (side - crop) // 2
        if augment:
            room = (length - frames, side - crop, side - crop)
            t, y, x = (int(torch.randint(r + 1, (), generator=generator)) for r in room)
        hq = _to_float(self.hq[pool][row, t : t + frames, y : y + crop, x : x + crop])
        lq = _to_float(self.lq[pool][row, t : t + frames, :small, :small])
        lq = resize_frames(lq[None], side, side)[0, :, :, y : y + crop, x : x + crop]
        pair = torch.stack([hq, lq])
        if augment:
            axes = [axis for axis in (2, 3, 4) if chance(0.5, generator)]  # time, height, width
            pair = pair.flip(axes) if axes else pair
            pair = pair.transpose(3, 4) if chance(0.5, generator) else pair
        return pair[0], pair[1]


def _to_float(frames: np.ndarray) -> Tensor:
    """(T, H, W, 3) uint8 -> (3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2).float() / 127.5 - 1

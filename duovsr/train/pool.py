"""A pool of training windows on disk, cut from any footage and degraded once, because codec passes are slow.

The windows of a pool are a pure function of its configuration and sources, whatever the number of processes.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Generator, Tensor
from torch.nn import functional as F
from tqdm import tqdm

from duovsr.errors import InputError, UsageError
from duovsr.train.degradation import chance, degrade, uniform
from duovsr.train.options import PoolConfig
from duovsr.train.sources import Source, find_sources, measure, open_footage
from duovsr.video.output import check_space
from duovsr.weights import atomic_file

SCALES = (4.0, 3.0, 2.0, 1.5)
HQ, LQ, SCALE, RECORD = "hq.npy", "lq.npy", "scale.npy", "pool.json"
_PARTIAL = "scale.partial.npy"
_TASK_ROWS = 16  # windows cut from one reading of a photo

Task = tuple[Source, list[int]]  # rows to cut from a source
Each = Callable[[Callable[[Any], Any], list[Any]], Iterator[Any]]


def camera_move(still: Tensor, frames: int, side: int, fastest: float, generator: Generator) -> Tensor:
    """A window that pans, zooms and turns over a still (1, 3, H, W) in [0, 1] -> (frames, 3, side, side) in [0, 1]."""
    short = min(still.shape[2:])
    room = short / (side * 1.15)
    if room > 1:
        # A large photo is shrunk more, so that windows show scenes instead of the camera's blur.
        zoom = uniform(1, min(room, max(2.2, _scene_zoom(short, side))), generator)
        still = F.interpolate(still, scale_factor=1 / zoom, mode="bicubic", antialias=True).clamp(0, 1)
    height, width = still.shape[2:]
    return view(still, camera_path(height, width, frames, side, fastest, generator), side)


def _scene_zoom(short: int, side: int) -> float:
    """What to shrink a short side by for three windows to cover it."""
    return short / (3 * side)


def camera_path(height: int, width: int, frames: int, side: int, fastest: float, generator: Generator) -> Tensor:
    """(frames, 4): the window's centre x and y in pixels, `fastest` a frame at most, angle in radians, and scale."""
    span = torch.linspace(-0.5, 0.5, frames) * (frames - 1)
    speed, heading = uniform(0, fastest, generator) ** 2 / fastest, uniform(-math.pi, math.pi, generator)
    shake = torch.cumsum(torch.randn(frames, 2, generator=generator) * uniform(0, 0.4, generator), 0)
    reach = side / 2 + speed * frames / 2 + 4
    x, y = (uniform(min(reach, size / 2), max(size - reach, size / 2), generator) for size in (width, height))
    angle = uniform(-0.3, 0.3, generator) + uniform(-0.006, 0.006, generator) * span
    scale = 1 + uniform(-0.006, 0.006, generator) * span
    move_x, move_y = speed * math.cos(heading) * span, speed * math.sin(heading) * span
    return torch.stack([x + move_x + shake[:, 0], y + move_y + shake[:, 1], angle, scale], dim=1)


def view(still: Tensor, path: Tensor, side: int) -> Tensor:
    """What a window on a path (frames, 4) of `camera_path` sees of (1, 3, H, W) in [0, 1]: (frames, 3, side, side)."""
    frames, (height, width) = len(path), still.shape[2:]
    x, y, angle, scale = path.unbind(1)
    cos, sin = torch.cos(angle) * scale * side, torch.sin(angle) * scale * side
    to_x = torch.stack([cos / width, -sin / width, 2 * x / width - 1], dim=1)
    to_y = torch.stack([sin / height, cos / height, 2 * y / height - 1], dim=1)
    grid = F.affine_grid(torch.stack([to_x, to_y], dim=1), [frames, 3, side, side], align_corners=False)
    seen = F.grid_sample(
        still.expand(frames, -1, -1, -1), grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return seen.clamp(0, 1)


def crop_clip(clip: Tensor, frames: int, side: int, generator: Generator) -> Tensor:
    """A random window of a clip (T, 3, H, W) uint8 -> (frames, 3, side, side) in [0, 1]. A short clip runs back and
    forth; a much larger picture is shrunk at random, as `camera_move` does."""
    T, _, H, W = clip.shape
    there_and_back = [*range(T), *range(T - 2, 0, -1)]
    clip = clip[[there_and_back[t % len(there_and_back)] for t in range(frames)]]
    zoom = uniform(1, max(1, _scene_zoom(min(H, W), side)), generator)
    cut = round(side * zoom)
    y, x = (int(torch.randint(size - cut + 1, (), generator=generator)) for size in (H, W))
    window = clip[..., y : y + cut, x : x + cut].float() / 255
    if cut == side:
        return window
    return F.interpolate(window, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def build_pool(folders: list[Path], out: Path, config: PoolConfig, *, split: bool = True) -> None:
    """Cut the windows of a pool into folder `out`, of one side of the validation split or of all sources. The same call
    resumes a pool that was interrupted.

    `hq.npy` (N, T, side, side, 3) uint8; `lq.npy` (N, T, side * 2 // 3, side * 2 // 3, 3) uint8, the LQ in its top left
    corner (absent in a `live` pool); `scale.npy` (N,) float32, 0 for rows without a window, which is written last;
    `pool.json` with the configuration, the sources with their sharpness, the directory that their names are relative
    to, and what was skipped and why. Raises InputError as `find_sources` does and where nothing is usable, UsageError
    where `out` has another pool.
    """
    out.mkdir(parents=True, exist_ok=True)
    data = sorted(map(str, folders))
    known = _read_record(out, config, data)
    if known and (out / SCALE).is_file():
        return
    found = [source for source in find_sources(folders) if not split or source.validation == config.validation]
    if known and {source.name for source in found} != known["sources"].keys() | known["skipped"].keys():
        raise UsageError(f"`{out}` was begun with other sources", hint="give another folder, or delete this one")
    with _processes(config.workers) as each:
        record = known or {"data": data, "directory": str(Path.cwd()), **_survey(found, config, each)}
        sources = [replace(s, sharpness=record["sources"][s.name]) for s in found if s.name in record["sources"]]
        if not sources:
            reasons = "; ".join(list(record["skipped"].values())[:3]) or "none is on this side of the validation split"
            hint = f"give footage of at least {config.side}x{config.side} pixels, and more than a few files of it"
            raise InputError(f"no usable training source in {len(found)}: {reasons}", hint=hint)
        if not known:  # from here on the folder is this pool's
            for name in (SCALE, _PARTIAL, HQ, LQ):
                (out / name).unlink(missing_ok=True)
            _write_record(out, record)
        scales = _open_arrays(out, config)
        tasks = _tasks(_draw(sources, config), sources, np.flatnonzero(scales == 0).tolist())
        with tqdm(desc="pool", total=config.samples, initial=int((scales > 0).sum()), disable=None) as bar:
            for done, reasons in each(partial(_make_rows, out, config), tasks):
                scales[list(done)] = list(done.values())
                record["skipped"] |= reasons
                bar.update(len(done))
    _write_record(out, record)
    if not scales.any():
        raise InputError("no usable training source", hint=f"the reasons are in `{out / RECORD}`")
    scales.flush()
    del scales  # Windows renames no file that is mapped
    os.replace(out / _PARTIAL, out / SCALE)


def _read_record(out: Path, config: PoolConfig, data: list[str]) -> dict[str, Any] | None:
    """The `pool.json` of a pool that was begun before. Raises UsageError if it had another configuration, or others'
    `data`, InputError where it cannot be read."""
    if not (out / RECORD).is_file():
        return None
    settings = _settings(config)
    try:
        record: dict[str, Any] = json.loads((out / RECORD).read_text())
        noted = record["config"]
        changed = [key for key in noted.keys() | settings if noted.get(key) != settings.get(key)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"damaged record of a pool: `{out / RECORD}`", hint="give another folder") from error
    if record.get("data", data) != data:
        raise UsageError(f"`{out}` was begun with other sources", hint="give another folder, or delete this one")
    if changed:
        raise UsageError(
            f"`{out}` has a pool with other settings: {', '.join(sorted(changed))}",
            hint="give another folder, or delete this one",
        )
    return record


def _write_record(out: Path, record: dict[str, Any]) -> None:
    with atomic_file(out / RECORD) as partial_record:
        partial_record.write_text(json.dumps(record, indent=1, sort_keys=True))


def _settings(config: PoolConfig) -> dict[str, Any]:
    """What decides on the pool's content, as JSON has it."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    del settings["workers"]
    return settings


def _survey(found: list[Source], config: PoolConfig, each: Each) -> dict[str, Any]:
    """The first `pool.json`: every source by name with its sharpness, which is measured where no manifest has it."""
    measured: dict[str, float | str] = {s.name: s.sharpness for s in found if s.sharpness is not None}
    unknown = [source for source in found if source.sharpness is None]
    results = each(partial(_measure, config.side), unknown)
    measured.update(tqdm(results, desc="sources", total=len(unknown), disable=None if unknown else True))
    return {
        "config": _settings(config),
        "sources": {s.name: measured[s.name] for s in found if not isinstance(measured[s.name], str)},
        "skipped": {s.name: measured[s.name] for s in found if isinstance(measured[s.name], str)},
    }


def _measure(side: int, source: Source) -> tuple[str, float | str]:
    """The source's name, and its sharpness or why it cannot be used."""
    try:
        return source.name, measure(source, side)
    except InputError as error:
        return source.name, str(error)


def _open_arrays(out: Path, config: PoolConfig) -> np.memmap[Any, Any]:
    """The scales of the rows, 0 where still to do; made with all arrays if there are none."""
    if not (out / _PARTIAL).is_file():
        N, T, side = config.samples, config.frames, config.side
        shapes = {HQ: (N, T, side, side, 3)}
        if not config.live:
            shapes[LQ] = (N, T, side * 2 // 3, side * 2 // 3, 3)
        check_space(out / HQ, sum(math.prod(shape) for shape in shapes.values()))
        for name, shape in shapes.items():
            open_memmap(out / name, "w+", np.uint8, shape)
        open_memmap(out / _PARTIAL, "w+", np.float32, (N,))
    scales: np.memmap[Any, Any] = np.load(out / _PARTIAL, mmap_mode="r+")
    return scales


def _draw(sources: list[Source], config: PoolConfig) -> list[int]:
    """The source of every row by its place in `sources`."""
    generator = Generator().manual_seed(config.seed * 2 + config.validation)
    from_still = torch.rand(config.samples, generator=generator) < config.stills
    choice = torch.empty(config.samples, dtype=torch.long)
    for still in (True, False):
        rows = from_still == still
        of_kind, all_kinds = [s.weight * (s.still == still) for s in sources], [s.weight for s in sources]
        # Clips only, or stills only; or pictures that are flat, all of them.
        weights = next(each for each in (of_kind, all_kinds, [s.preference for s in sources]) if any(each))
        drawn = torch.multinomial(
            torch.tensor(weights, dtype=torch.float64), config.samples, replacement=True, generator=generator
        )
        choice[rows] = drawn[rows]
    return choice.tolist()


def _tasks(choice: list[int], sources: list[Source], rows: list[int]) -> list[Task]:
    rows_of: dict[int, list[int]] = {}
    for row in rows:
        rows_of.setdefault(choice[row], []).append(row)
    return [
        (sources[index], own[first : first + _TASK_ROWS])
        for index, own in sorted(rows_of.items())
        for first in range(0, len(own), _TASK_ROWS)
    ]


def _make_rows(out: Path, config: PoolConfig, task: Task) -> tuple[dict[int, float], dict[str, str]]:
    """Write the rows of a task. Returns their scales, 0 where there is no window, and why for the source's name."""
    source, rows = task
    hq = np.load(out / HQ, mmap_mode="r+")
    lq = None if config.live else np.load(out / LQ, mmap_mode="r+")
    scales, skipped = dict.fromkeys(rows, 0.0), {}
    photo: Tensor | None = None
    for row in rows:
        generator = Generator().manual_seed(config.seed * 1_000_003 + row * 2 + config.validation)
        try:
            if source.still:
                photo = _read_photo(source, config.side) if photo is None else photo
                window = camera_move(photo, config.frames, config.side, config.speed, generator)
            else:
                window = _clip_window(source, config, generator)
        except InputError as error:
            skipped[source.name] = str(error)
            continue
        hq[row] = _to_bytes(window)
        scales[row] = SCALES[int(torch.multinomial(torch.tensor(config.scale_weights), 1, generator=generator))]
        if lq is not None:
            small = round(config.side / scales[row])
            lq[row, :, :small, :small] = _to_bytes(degrade(window, small, small, config.degradation, generator))
    return scales, skipped


def _read_photo(source: Source, side: int) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    with open_footage(source, side) as footage:
        return footage.read(0, 1).float() / 255


def _clip_window(source: Source, config: PoolConfig, generator: Generator) -> Tensor:
    """(frames, 3, side, side) in [0, 1] from a random time and place: every frame, or every `skip`th one."""
    with open_footage(source, config.side) as footage:
        skipping = chance(config.skip_frames, generator) and footage.length > config.skip * (config.frames - 1)
        step = config.skip if skipping else 1
        last = max(0, footage.length - 1 - step * (config.frames - 1))
        clip = footage.read(int(torch.randint(last + 1, (), generator=generator)), config.frames, step)
    return crop_clip(clip, config.frames, config.side, generator)


def _to_bytes(frames: Tensor) -> np.ndarray:
    """(T, 3, H, W) in [0, 1] -> (T, H, W, 3) uint8."""
    return (frames * 255).round().byte().permute(0, 2, 3, 1).numpy()


@contextmanager
def _processes(workers: int) -> Iterator[Each]:
    """`each(function, tasks)`: the results in any order, from processes with one thread each, as sums depend on it."""
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield map
        finally:
            torch.set_num_threads(threads)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as executor:
        try:
            yield lambda function, tasks: (
                f.result() for f in as_completed([executor.submit(function, t) for t in tasks])
            )
        finally:
            executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt ends the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Also where the parent is killed: the executor's workers would wait for it forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

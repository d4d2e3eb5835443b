"""Cached latents: what an autoencoder makes of a pool's windows, encoded once (`duovsr train latents`)."""

from __future__ import annotations

import json
import os

import numpy as np
import torch
from numpy.lib.format import open_memmap
from tqdm import tqdm

from duovsr.train.data import ENCODED_BY, LATENTS, SHARPNESS, SOURCES, new_array, read_array
from duovsr.train.draws import Draws
from duovsr.train.loop import Run
from duovsr.train.options import LatentsConfig
from duovsr.train.roles import EncodedFrames, Inputs, digest
from duovsr.weights import atomic_file

_PARTIAL = "sharpness.partial.npy"  # of the rows that are on the disk
_SAVE_EVERY = 64  # rows


def cache_latents(run: Run, config: LatentsConfig, inputs: Inputs) -> None:
    """Write `latents.npy` (samples, 2, C, T, h, w) float16, HQ then LQ, of random crops, the autoencoder's digest, and
    what the windows were cut from; `sharpness.npy` last.

    The same call resumes. A row is a function of the seed and its number, whatever was interrupted.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    if (run.out / SHARPNESS).is_file():
        return
    partial = run.out / _PARTIAL
    vae = inputs.autoencoder(run)
    pool = inputs.frames(config)
    source = EncodedFrames(pool, vae, run)
    (run.out / ENCODED_BY).write_text(digest(vae))
    (run.out / SOURCES).write_text(json.dumps(sorted(pool.sources), indent=1))
    sharpness = np.zeros(config.samples, np.float32)
    done = read_array(partial) if partial.is_file() else sharpness[:0]
    sharpness[: len(done)] = done
    pairs = open_memmap(run.out / LATENTS, "r+") if len(done) else None
    rows = range(len(done), config.samples)
    for row in tqdm(rows, desc=run.out.name, initial=len(done), total=config.samples, disable=None):
        draws = Draws.of(range(row, row + 1), seed=config.seed, step=0, part=0, device=run.device)
        z0, z_lq, sharp = source.latents(draws)
        if pairs is None:
            pairs = new_array(run.out / LATENTS, (config.samples, 2, *z0.shape[1:]))
        pairs[row] = torch.cat([z0, z_lq]).cpu().numpy().astype(np.float16)
        sharpness[row] = float(sharp)
        if row % _SAVE_EVERY == _SAVE_EVERY - 1 or row == rows[-1]:
            pairs.flush()
            with atomic_file(partial) as path, path.open("wb") as file:
                np.save(file, sharpness[: row + 1])
    os.replace(partial, run.out / SHARPNESS)

"""Cached latents: what an autoencoder makes of a pool's windows, encoded once (`duovsr train latents`)."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import torch
from numpy.lib.format import open_memmap
from tqdm import tqdm

from duovsr.train.data import LATENTS, SHARPNESS
from duovsr.train.draws import Draws
from duovsr.train.loop import Run
from duovsr.train.options import LatentsConfig
from duovsr.train.roles import EncodedFrames, Inputs


def cache_latents(run: Run, config: LatentsConfig, inputs: Inputs) -> None:
    """Write `latents.npy` (samples, 2, C, T, h, w) float16, HQ then LQ, of random crops; `sharpness.npy` last."""
    vae = inputs.autoencoder(run)
    source = EncodedFrames(inputs.frames(config), vae, run)
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / SHARPNESS).unlink(missing_ok=True)  # written last: latents with it are finished
    pairs: np.memmap | None = None
    sharpness = np.zeros(config.samples, np.float32)
    for row in tqdm(range(config.samples), desc=run.out.name, disable=None):
        draws = Draws.of(range(row, row + 1), seed=config.seed, step=0, part=0, device=run.device)
        z0, z_lq, sharp = source.latents(draws)
        if pairs is None:
            shape = (config.samples, 2, *z0.shape[1:])
            pairs = open_memmap(run.out / LATENTS, "w+", np.float16, shape)
        pairs[row] = torch.cat([z0, z_lq]).cpu().numpy().astype(np.float16)
        sharpness[row] = float(sharp)
    (run.out / "latents.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    np.save(run.out / SHARPNESS, sharpness)

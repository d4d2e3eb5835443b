"""Scores on held-out windows while training, and the picture strips of a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from duovsr.metrics.fidelity import psnr_y, ssim_y
from duovsr.train.data import Frames, Pool
from duovsr.train.draws import Draws
from duovsr.train.loop import Run, Scores
from duovsr.train.roles import Inputs

STRIPS = "samples"
_STRIP_ROWS = 4

Restore = Callable[[Frames, Draws], Tensor]  # LQ frames and random numbers -> restored frames


class Validation:
    """Restores the same windows every time, with the same noise.

    With a held-out pool: `psnr` and `ssim` of luma, `detail` (the high band's energy over the truth's: below 1 is
    blur, above it is grain) and `score`, the loss where the stage has a meaningful one, else 1 - ssim. Without:
    pictures only.
    """

    def __init__(
        self,
        run: Run,
        pool: Pool,
        held_out: Pool | None,
        restore: Restore,
        loss: Callable[[Draws], Tensor] | None = None,
    ) -> None:
        """`restore` makes frames like the LQ (B, 3, T, H, W) it gets; `loss` is taken on the held-out pool."""
        self.run, self.pool, self.scored = run, held_out or pool, held_out is not None
        self.restore, self.loss = restore, loss

    @classmethod
    def maybe(
        cls, run: Run, inputs: Inputs, restore: Restore, loss: Callable[[Draws], Tensor] | None = None
    ) -> Validation | None:
        """None where there are no frames at all: training on cached latents without a held-out pool."""
        pool = inputs.held_out or inputs.data
        return cls(run, pool, inputs.held_out, restore, loss) if isinstance(pool, Pool) else None

    @torch.no_grad()
    def __call__(self, done: int) -> Scores:
        config = self.run.config
        count = config.validation_samples if self.scored else _STRIP_ROWS
        rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for row in range(count):
            frames = self.pool.fixed(range(row, row + 1), config.crop, config.frames, self.run.device)
            draws = Draws.of(range(row, row + 1), seed=0, step=0, part=1, device=self.run.device)
            output = self.restore(frames, draws)
            rows.append((_pixels(frames.lq), _pixels(output), _pixels(frames.hq)))
        if self.run.world.first:
            write_strip(self.run.out / STRIPS / f"step_{done:06d}.png", rows[:_STRIP_ROWS])
        if not self.scored:
            return {}
        scores = {
            "psnr": fmean(psnr_y(output, hq) for _, output, hq in rows),
            "ssim": fmean(ssim_y(output, hq) for _, output, hq in rows),
            "detail": fmean(_high_band(output) for _, output, _ in rows) / fmean(_high_band(hq) for _, _, hq in rows),
        }
        scores["score"] = 1 - scores["ssim"]
        if self.loss is not None:
            batches = [Draws.of(range(i, i + 1), seed=0, step=0, part=2, device=self.run.device) for i in range(count)]
            scores["score"] = fmean(self.loss(draws).item() for draws in batches)
        return scores


def write_strip(path: Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """A PNG of rows of equal pictures side by side: LQ, output, truth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)).save(path)


def _pixels(frames: Tensor) -> np.ndarray:
    """The last frame of (1, 3, T, H, W) in [-1, 1] as (H, W, 3) uint8."""
    frame = ((frames[0, :, -1].float() + 1) * 127.5).round().clamp(0, 255).byte()
    pixels: np.ndarray = frame.permute(1, 2, 0).cpu().numpy()
    return pixels


def _high_band(pixels: np.ndarray) -> float:
    """Mean squared difference of neighbours in a row."""
    return float(np.square(np.diff(pixels.astype(np.float32), axis=1)).mean())

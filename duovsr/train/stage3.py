"""Stage III, preference-guided refinement (paper sections 3.5 and 7.2): ranked pairs of candidates, then flow DPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from duovsr.errors import InputError, TrainError
from duovsr.metrics.meter import Unmeasurable
from duovsr.model import flow
from duovsr.train.data import PAIRS, PAIRS_RECORD, Frames, new_array
from duovsr.train.draws import Draws
from duovsr.train.loop import Metrics, Run, Trained, run_loop
from duovsr.train.options import DPOConfig, PrefsConfig
from duovsr.train.rankers import make_rankers, rank_sum
from duovsr.train.roles import Inputs, decode, diffusion_model, digest, encode, ode_restore, one_step, placed_model
from duovsr.train.validation import Validation
from duovsr.weights import atomic_file

_PARTIAL = "pairs.partial.json"
_SAVE_EVERY = 8  # clips
_CLIPS_A_PAIR = 4  # looked at before there may be fewer pairs

Clip = dict[str, object]  # of the record: scores, what was chosen and rejected, or why it gave no pair


def build_pairs(run: Run, config: PrefsConfig, inputs: Inputs) -> None:
    """For each LQ window, `config.candidates` outputs of the student from different noise; the best and the worst by
    rank-sum over the rankers are a pair. Clips on which they tie, or that cannot be measured, are replaced by others.

    Writes `pairs.npy` (pairs, 3, C, T, h, w) float16, latents of LQ, chosen and rejected; then `pairs.json`, which
    names the autoencoder and the rankers, holds every score, and counts the pairs: the rows that are used. The same
    call resumes. Raises TrainError where no clip gave a pair.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    if (run.out / PAIRS_RECORD).is_file():
        return
    judge = _Judge(run, config, inputs)
    clips, count = _resumed(run.out / _PARTIAL)
    pairs = open_memmap(run.out / PAIRS, "r+") if count else None
    most = _CLIPS_A_PAIR * config.pairs
    with tqdm(desc=run.out.name, initial=count, total=config.pairs, disable=None) as bar:
        while count < config.pairs and len(clips) < most:
            clip, triple = judge(len(clips))
            clips.append(clip)
            if triple is not None:
                if pairs is None:
                    pairs = new_array(run.out / PAIRS, (config.pairs, *triple.shape))
                pairs[count] = triple.cpu().numpy().astype(np.float16)
                count += 1
                bar.update()
            if len(clips) % _SAVE_EVERY == 0:
                _save(run.out / _PARTIAL, pairs, {"pairs": count, "clips": clips})
    if count == 0:
        reasons = "; ".join(sorted({str(clip["skipped"]) for clip in clips})[:3])
        measured = any("scores" in clip for clip in clips)
        hint = "the student may ignore its noise" if measured else "use other rankers, or larger or longer windows"
        raise TrainError(f"none of {most} clips gave a pair: {reasons}", hint=hint)
    notice = f"{most} clips gave only {count} of {config.pairs} pairs" if count < config.pairs else None
    _save(run.out / PAIRS_RECORD, pairs, {**judge.describe(), "notice": notice, "pairs": count, "clips": clips})
    (run.out / _PARTIAL).unlink(missing_ok=True)


def _resumed(path: Path) -> tuple[list[Clip], int]:
    """The clips that were looked at, and the number of their pairs."""
    if not path.is_file():
        return [], 0
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        return record["clips"], record["pairs"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"damaged: `{path}`", hint="choose another `--out`") from error


def _save(path: Path, pairs: np.memmap | None, record: dict[str, object]) -> None:
    """Note what was done, once its pairs are on the disk."""
    if pairs is not None:
        pairs.flush()
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


class _Judge:
    """Candidates for one clip after the other, and their ranks."""

    def __init__(self, run: Run, config: PrefsConfig, inputs: Inputs) -> None:
        self.run, self.config, self.preset, self.pool = run, config, inputs.preset, inputs.frames(config)
        self.vae = inputs.autoencoder(run)
        self.student = diffusion_model(self.preset, inputs.weights("model"), run, trained=False).to(run.device)
        self.rankers = make_rankers(config.rankers, run.device)

    def describe(self) -> dict[str, object]:
        return {
            "autoencoder": digest(self.vae),
            "sources": sorted(self.pool.sources),
            "rankers": {ranker.name: ranker.describe() for ranker in self.rankers},
            "combination": "sum of ranks over the rankers, lowest is best",
            "candidates": self.config.candidates,
        }

    def __call__(self, n: int) -> tuple[Clip, Tensor | None]:
        """The record of clip n, and LQ, chosen and rejected latents (3, C, T, h, w), if they make a pair."""
        config = self.config
        draws = Draws.of(range(n, n + 1), seed=config.seed, step=0, part=0, device=self.run.device)
        frames = self.pool.frames(draws, config.crop, config.frames)
        z_lq = encode(self.vae, frames.lq, self.run)
        try:
            latents, scores = self._candidates(frames, z_lq, draws)
        except Unmeasurable as error:  # such as NIQE of a black clip
            return {"skipped": str(error)}, None
        ranks = rank_sum(scores, self.rankers)
        clip: Clip = {"scores": scores, "rank_sum": ranks}
        best, worst = int(np.argmin(ranks)), int(np.argmax(ranks))
        if ranks[best] == ranks[worst]:
            return {**clip, "skipped": "the rankers see no difference"}, None
        return {**clip, "chosen": best, "rejected": worst}, torch.cat([z_lq, latents[best], latents[worst]])

    @torch.no_grad()
    def _candidates(self, frames: Frames, z_lq: Tensor, draws: Draws) -> tuple[list[Tensor], list[dict[str, float]]]:
        """Their latents and scores."""
        latents, scores = [], []
        for _ in range(self.config.candidates):
            with self.run.autocast():
                z0 = one_step(self.student, draws.normal_like(z_lq, self.preset.shared_noise), z_lq)
                output = decode(self.vae, z0, frames)
            latents.append(z0)
            scores.append({ranker.name: ranker(output.float(), frames.hq) for ranker in self.rankers})
        return latents, scores


def flow_dpo_loss(chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """Eq. 9 on velocity errors (B,), each (student, reference) and averaged over a sample's elements.

    Returns the loss and the margin (B,): where it is above 0, the student prefers the chosen one.
    """
    margin = -0.5 * beta * ((chosen[0] - chosen[1]) - (rejected[0] - rejected[1]))
    return -F.logsigmoid(margin).mean(), margin


def velocity_error(velocity: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    return (velocity - flow.velocity_target(x0, eps)).square().mean((1, 2, 3, 4))


def train_dpo(run: Run, config: DPOConfig, inputs: Inputs) -> None:
    """Flow DPO with shared noise and timestep in a pair. Leaves `vae` and `model`."""
    vae, preset = inputs.autoencoder(run), inputs.preset
    pairs = inputs.pairs(vae)
    reference = placed_model(preset, inputs.weights("model"), run, trained=False)
    student = placed_model(preset, inputs.weights("model"), run, trained=True)
    optimizer = run.adam(student, config.learning_rate)

    def loss_of(draws: Draws) -> tuple[Tensor, Metrics]:
        z_lq, chosen, rejected = pairs.batch(draws)
        eps = draws.normal_like(chosen, preset.shared_noise)
        sigma = flow.shift_sigma(torch.sigmoid(draws.normal()), config.shift)
        if config.only_noise:
            sigma = torch.ones_like(sigma)
        both = torch.cat([flow.add_noise(chosen, eps, sigma), flow.add_noise(rejected, eps, sigma)])
        conditions = torch.cat([z_lq, z_lq]), torch.cat([sigma, sigma])
        with run.autocast():
            mine = student(both, *conditions)
            with torch.no_grad():
                theirs = reference(both, *conditions)
        errors = [
            [velocity_error(v, x0, eps) for v, x0 in zip(velocities.chunk(2), (chosen, rejected), strict=True)]
            for velocities in (mine, theirs)
        ]
        loss, margin = flow_dpo_loss((errors[0][0], errors[1][0]), (errors[0][1], errors[1][1]), config.beta)
        return loss, {"loss": loss, "accuracy": (margin > 0).float().mean(), "chosen_error": errors[0][0].mean()}

    def step(n: int) -> Metrics:
        return run.update([optimizer], loss_of, n)

    validate = Validation.maybe(run, inputs, ode_restore(run, preset, vae, student, steps=1, shift=config.shift))
    trained = Trained({"model": student}, {"model": optimizer}, ("model",), {"vae": vae}, validate)
    run_loop(run, trained, step)

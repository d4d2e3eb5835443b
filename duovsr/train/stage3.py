"""Stage III, preference-guided refinement (paper sections 3.4 and 7.2): ranked pairs of candidates, then flow DPO."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from duovsr.errors import TrainError
from duovsr.metrics.meter import Unmeasurable
from duovsr.model import flow
from duovsr.train.data import PAIRS
from duovsr.train.distributed import place
from duovsr.train.draws import Draws
from duovsr.train.loop import Metrics, Run, Trained, run_loop
from duovsr.train.options import DPOConfig, PrefsConfig
from duovsr.train.rankers import Ranker, make_rankers, rank_sum
from duovsr.train.roles import Autoencoder, Inputs, decode, diffusion_model, encode, ode_restore, one_step
from duovsr.train.validation import Validation

RECORD = "pairs.json"


def build_pairs(run: Run, config: PrefsConfig, inputs: Inputs) -> None:
    """For each LQ window, `config.candidates` outputs of the student from different noise; the best and the worst by
    rank-sum over the rankers are kept, as latents. Writes `pairs.npz` (float16) and `pairs.json`, which names the
    rankers and holds every score.
    """
    pool, preset = inputs.frames(config), inputs.preset
    vae = inputs.autoencoder(run)
    student = diffusion_model(preset, inputs.weights("model"), run, trained=False).to(run.device)
    rankers = make_rankers(config.rankers, run.device)
    kept: list[np.ndarray] = []
    record: list[dict[str, object]] = []
    for n in tqdm(range(config.pairs), desc=run.out.name, disable=None):
        draws = Draws.of(range(n, n + 1), seed=config.seed, step=0, part=0, device=run.device)
        hq, lq = pool.frames(draws, config.crop, config.frames)
        z_lq = encode(vae, lq, run)
        try:
            latents, scores = _candidates(
                run, config, preset.shared_noise, student, vae, (hq, lq, z_lq), draws, rankers
            )
        except Unmeasurable as error:  # such as NIQE of a black clip
            record.append({"skipped": str(error)})
            continue
        ranks = rank_sum(scores, rankers)
        best, worst = int(np.argmin(ranks)), int(np.argmax(ranks))
        record.append({"scores": scores, "rank_sum": ranks, "chosen": best, "rejected": worst})
        if ranks[best] == ranks[worst]:
            continue  # the rankers see no difference
        triple = torch.cat([z_lq, latents[best], latents[worst]])
        kept.append(triple.cpu().numpy().astype(np.float16))
    if not kept:
        raise TrainError("no LQ had candidates that differ", hint="the student may ignore its noise")
    _write(run.out, np.stack(kept), record, rankers, config)


@torch.no_grad()
def _candidates(
    run: Run,
    config: PrefsConfig,
    shared_noise: float,
    student: torch.nn.Module,
    vae: Autoencoder,
    clip: tuple[Tensor, Tensor, Tensor],
    draws: Draws,
    rankers: list[Ranker],
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Latents and scores of the candidates for (HQ, LQ, LQ latents) of one clip."""
    hq, lq, z_lq = clip
    latents, scores = [], []
    for _ in range(config.candidates):
        with run.autocast():
            z0 = one_step(student, draws.normal_like(z_lq, shared_noise), z_lq)
            frames = decode(vae, z0, lq)
        latents.append(z0)
        scores.append({ranker.name: ranker(frames.float(), hq) for ranker in rankers})
    return latents, scores


def _write(
    out: Path, kept: np.ndarray, record: list[dict[str, object]], rankers: list[Ranker], config: PrefsConfig
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    described = {
        "rankers": {ranker.name: ranker.describe() for ranker in rankers},
        "combination": "sum of ranks over the rankers, lowest is best",
        "candidates": config.candidates,
        "pairs": len(kept),
        "clips": record,
    }
    (out / RECORD).write_text(json.dumps(described, indent=1) + "\n")
    partial = out / "pairs.part.npz"
    np.savez(partial, z_lq=kept[:, 0], chosen=kept[:, 1], rejected=kept[:, 2])
    os.replace(partial, out / PAIRS)


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
    vae, preset, pairs = inputs.autoencoder(run), inputs.preset, inputs.pairs()
    reference = place(diffusion_model(preset, inputs.weights("model"), run, trained=False), run.world, config.dtype)
    student = place(diffusion_model(preset, inputs.weights("model"), run, trained=True), run.world, config.dtype)
    optimizer = torch.optim.AdamW(
        student.parameters(), config.learning_rate, (config.beta1, config.beta2), weight_decay=config.weight_decay
    )

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

"""Models on windows of held-out sources, to choose by: never the evaluation set.

    python -m benchmarks.held_out MODEL ... --pool POOL --niqe NIQE.npz [--share 0.25 0.5] [--strength 0 0.5]
        [--frames 21]

MODEL is a model folder or a run of `duovsr train`; POOL is made by `duovsr train pool --set validation=true`. Each
`--share` adds a blend of the first two models, so much of the second (as `duovsr train export --set blend=`), each
`--strength` the first model as `upscale --strength` runs it. Prints a line for each, and for the truth: means over the
windows. `bias` is by how much the luma is too bright, of 219. `e_warp` above the truth's is flicker, `net` a pattern
that repeats every 8, 4 or 2 pixels (see `net`). VMAF is of the offline ranker, on five frames: compare within a table
only. What goes on getting worse with time shows in long windows alone. (Needs OpenCV.)
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch.nn import functional as F

from duovsr.metrics.fidelity import luma
from duovsr.metrics.meter import Unmeasurable
from duovsr.metrics.warping import DisFlow, WarpingMeter
from duovsr.model.tiny_vae import SPATIAL_FACTOR, TinyVAE
from duovsr.options import PRESETS
from duovsr.train.data import Frames, Pool
from duovsr.train.distributed import World
from duovsr.train.draws import Draws
from duovsr.train.loop import Run
from duovsr.train.options import BaseConfig
from duovsr.train.rankers import Ranker, make_rankers
from duovsr.train.roles import Inputs, diffusion_model, ode_restore
from duovsr.train.runs import Weights, blend, load_weights
from duovsr.train.validation import Restore

CPU = torch.device("cpu")
SIDE = 192


def restorer(weights: Weights, pool: Pool, strength: float = 1.0, steps: int = 1) -> Restore:
    """Below a strength of 1 the way from the latent-free decode to the whole one, as `upscale --strength` goes."""
    preset, config = PRESETS["tiny"], BaseConfig()
    run = Run(Path(), config, World(0, 1, CPU))
    inputs = Inputs(preset, pool, None, weights, Path())
    student, vae = diffusion_model(preset, inputs.weights("model"), run, trained=False), inputs.autoencoder(run)
    full = ode_restore(run, preset, vae, student, steps, config.shift if steps > 1 else 1.0)
    if strength == 1:
        return full
    assert isinstance(vae, TinyVAE)

    def restore(frames: Frames, draws: Draws) -> torch.Tensor:
        with run.autocast():
            plain, _ = vae.decode(None, frames.lq, scale=frames.scale)
        return torch.lerp(plain.float(), full(frames, draws).float(), strength)

    return restore


@torch.no_grad()
def scores(
    restore: Restore | None, pool: Pool, rankers: list[Ranker], windows: int, frames: int = 5
) -> dict[str, float]:
    """Means over the first `windows` of the pool, of the truth where there is no `restore`; what cannot be measured is
    passed over.
    """
    spectra = []
    found: dict[str, list[float]] = {name: [] for name in (*(ranker.name for ranker in rankers), "bias", "e_warp")}
    for row in range(windows):
        window = pool.fixed(range(row, row + 1), SIDE, frames, CPU)
        draws = Draws.of(range(row, row + 1), seed=0, step=0, part=1, device=CPU)
        output = window.hq if restore is None else restore(window, draws).float()
        meter = WarpingMeter(DisFlow())
        for frame, truth in zip(pixels(output), pixels(window.hq), strict=True):
            meter.update(frame, truth)
            found["bias"].append((luma(frame) - luma(truth)).mean().item())
            spectra.append(power(luma(frame)))
        with suppress(Unmeasurable):
            found["e_warp"].append(meter.mean())
        for ranker in rankers:
            with suppress(Unmeasurable):
                found[ranker.name].append(ranker(output, window.hq))
    means = {name: fmean(values) for name, values in found.items() if values}
    return {**means, "net": net(torch.stack(spectra).mean(0))}


def net(spectrum: torch.Tensor) -> float:
    """Pictures' mean power (SIDE, SIDE) at multiples of 1/8 cycle a pixel, over the median of what lies 3 to 6 steps
    of frequency around each: the mean of the 63 ratios. 1 where nothing repeats with the pixels that the autoencoder
    computes together.
    """
    step, near = SIDE // SPATIAL_FACTOR, torch.arange(-6, 7)
    around = torch.maximum(near[:, None].abs(), near.abs()) > 2
    ratios = []
    for y in range(0, SIDE, step):
        for x in range(0, SIDE, step):
            patch = spectrum[(y + near)[:, None] % SIDE, (x + near) % SIDE]
            ratios.append((spectrum[y, x] / patch[around].median()).item())
    return fmean(ratios[1:])  # the first is the mean of the picture itself


def power(picture: torch.Tensor) -> torch.Tensor:
    """Of the picture's contrast with its surroundings of 7 x 7, in units of theirs: nets show in flat parts."""
    mean, square = F.avg_pool2d(torch.stack((picture, picture.square())), 7, stride=1, padding=3)
    picture = (picture - mean) / ((square - mean.square()).clamp(min=0).sqrt() + 1)
    fade = torch.hann_window(SIDE, dtype=picture.dtype)
    return torch.fft.fft2(picture * fade[:, None] * fade).abs().square()


def pixels(frames: torch.Tensor) -> list[np.ndarray]:
    """(1, 3, T, H, W) in [-1, 1] -> T of (H, W, 3) uint8."""
    return list(((frames[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--niqe", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=28)
    parser.add_argument("--share", type=float, nargs="*", default=[])
    parser.add_argument("--strength", type=float, nargs="*", default=[])
    parser.add_argument("--frames", type=int, default=5, help="4k + 1, of each window")
    args = parser.parse_args()
    if args.share and len(args.models) < 2:
        parser.error("--share blends two models")
    pool = Pool([args.pool])
    rankers = make_rankers(("psnr", "ssim", "vmaf", "detail", "steady", f"niqe:{args.niqe}"), CPU)
    candidates = {str(path): load_weights(path) for path in args.models}
    for share in args.share:
        first, second, *_ = candidates.values()
        parts = {name: blend(first[name], second[name], share) for name in ("model", "vae")}
        candidates[f"{share:g} of the second"] = parts
    restorers: dict[str, Restore | None] = {name: restorer(weights, pool) for name, weights in candidates.items()}
    for strength in args.strength:
        restorers[f"strength {strength:g} of the first"] = restorer(candidates[str(args.models[0])], pool, strength)
    for name, restore in {**restorers, "truth": None}.items():
        found = scores(restore, pool, rankers, args.windows, args.frames)
        print(f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in found.items())}", flush=True)


if __name__ == "__main__":
    main()

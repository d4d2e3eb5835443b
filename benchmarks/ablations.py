"""Tables 3 to 5 of the paper in small: stages on and off, streams and features of stage II, at equal budgets.

    python benchmarks/ablations.py --init MODEL --data POOL ... --validation POOL --niqe NIQE.npz --out runs/ablations

The autoencoder is MODEL's; its transformer is trained as a base model, once. Every row then starts from the same runs,
with the same data and seed, and the rows of stage II have the same number of student updates. The joint row has a
second seed: what lies within the two is noise. Every student is scored with one step, the base with 50; beside them
MODEL, and the autoencoder with the truth's latents and with none. The same command resumes; it writes
`results/ablations.json`. Some three quarters of an hour of one core. (Needs OpenCV and vmaf-torch.)
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from held_out import CPU, restorer, scores
from measuring import RESULTS, describe, write_json
from torch import Tensor

from duovsr.model.one_step import Autoencoder
from duovsr.model.tiny_vae import TinyVAE
from duovsr.options import PRESETS
from duovsr.train.data import Frames, Pool
from duovsr.train.distributed import World
from duovsr.train.draws import Draws
from duovsr.train.loop import Run
from duovsr.train.options import BaseConfig
from duovsr.train.rankers import make_rankers
from duovsr.train.roles import Inputs, encode
from duovsr.train.runs import load_weights
from duovsr.train.stages import Job, resolve, run_job
from duovsr.train.validation import Restore

RESULT = RESULTS / "ablations.json"
PRESET = PRESETS["tiny"]
BASE_STEPS = 50  # of the paper's base row
WINDOWS = 28
COMMON = ("threads=1", "crop=96", "frames=9")
SETTINGS = {  # of every run of a stage
    "latents": ("samples=3000", *COMMON),
    "base": ("steps=1200", "learning_rate=3e-4", "ema=0.995", "sharpness=300", *COMMON),
    "cfg": ("steps=100", *COMMON),
    "progressive": ("steps=60", *COMMON),
    "dual": ("steps=80", "batch=4", *COMMON),
    "prefs": ("pairs=60", *COMMON),
    "dpo": ("steps=60", *COMMON),
}


@dataclass(frozen=True)
class Row:
    """A run: its folder's name, its stage, the run it starts from, and what differs from SETTINGS."""

    name: str
    stage: str
    init: str | None = None  # None: the model
    data: str | None = None  # None: the pools
    settings: tuple[str, ...] = ()
    scored: bool = True


ROWS = (
    Row("latents", "latents", scored=False),
    Row("base", "base", data="latents"),
    Row("cfg", "cfg", "base", "latents", scored=False),
    Row("I", "progressive", "cfg", "latents"),
    Row("I+II", "dual", "I", "latents"),
    Row("I+II, second seed", "dual", "I", "latents", ("seed=1",)),
    Row("II without I", "dual", "cfg", "latents"),
    Row("prefs", "prefs", "I+II", scored=False),
    Row("I+II+III", "dpo", "I+II", "prefs"),
    Row("DMD only", "dual", "I", "latents", ("streams=dmd",)),
    Row("GAN only", "dual", "I", "latents", ("streams=gan",)),
    Row("sequential", "dual", "I", "latents", ("streams=sequential",)),
    Row("features of the real score", "dual", "I", "latents", ("features=real",)),
    Row("features of the fake score", "dual", "I", "latents", ("features=fake",)),
)


def train(row: Row, out: Path, model: Path, pools: tuple[Path, ...]) -> float:
    """Run a row, or what is left of it; the CPU seconds of the start that finished it, not of those before."""
    noted = out / row.name / "cpu_seconds.json"
    if not noted.exists():
        job = Job(
            row.stage,
            out / row.name,
            data=pools if row.data is None else (out / row.data,),
            init=model if row.init is None else out / row.init,
        )
        began = time.process_time()
        run_job(job, resolve(job, [*SETTINGS[row.stage], *row.settings]))
        noted.write_text(json.dumps(time.process_time() - began))
    seconds: float = json.loads(noted.read_text())
    return seconds


def bounds(folder: Path, pool: Pool) -> dict[str, Restore]:
    """Beside every student of this autoencoder: the LQ itself, the decode without latents and with the truth's."""
    run = Run(Path(), BaseConfig(), World(0, 1, CPU))
    vae = Inputs(PRESET, pool, None, load_weights(folder), folder).autoencoder(run)

    def without(frames: Frames, draws: Draws) -> Tensor:
        return decode_with(vae, None, frames, run)

    def with_true(frames: Frames, draws: Draws) -> Tensor:
        return decode_with(vae, encode(vae, frames.hq, run), frames, run)

    return {"LQ": lambda frames, draws: frames.lq, "no latents": without, "the truth's latents": with_true}


def decode_with(vae: Autoencoder, latents: Tensor | None, frames: Frames, run: Run) -> Tensor:
    assert isinstance(vae, TinyVAE)
    with run.autocast():
        return vae.decode(latents, frames.lq, scale=frames.scale)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--niqe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool = Pool([args.validation])
    rankers = make_rankers(("psnr", "ssim", "vmaf", "detail", f"niqe:{args.niqe}"), CPU)
    rows: dict[str, dict[str, float]] = {}
    for row in ROWS:
        seconds = train(row, args.out, args.init, tuple(args.data))
        if row.scored:
            steps = BASE_STEPS if row.stage == "base" else 1
            restore = restorer(load_weights(args.out / row.name), pool, steps=steps)
            rows[row.name] = {**scores(restore, pool, rankers, WINDOWS), "cpu_seconds": seconds}
            print(row.name, ", ".join(f"{name} {value:.4g}" for name, value in rows[row.name].items()), flush=True)
    for name, restore in {"MODEL": restorer(load_weights(args.init), pool), **bounds(args.init, pool)}.items():
        rows[name] = scores(restore, pool, rankers, WINDOWS)
        print(name, rows[name], flush=True)
    rows["truth"] = scores(None, pool, rankers, WINDOWS)
    record = {
        "benchmark": "ablations",
        "machine": describe(CPU),
        "settings": SETTINGS,
        "windows": WINDOWS,
        "rows": rows,
    }
    write_json(RESULT, record)


if __name__ == "__main__":
    main()

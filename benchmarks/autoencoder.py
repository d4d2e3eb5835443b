"""What TinyVAE alone can do: the truth through encode and decode, beside the LQ, which bounds the whole model.

    python benchmarks/autoencoder.py EVAL_FOLDER [--model weights/tiny] [--frames 9]

PSNR-Y and SSIM-Y on the first frames of EVAL_FOLDER/gt, for the LQ of each set: of the decode with the truth's latents
and the LQ, of the latent-free decode, of the truth's latents beside plain grey, which the decoder never saw in
training, and of the resized LQ itself. Writes `results/autoencoder.json`.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from held_out import pixels
from measuring import RESULTS, describe, write_json
from torch import Tensor

from duovsr import Upscaler
from duovsr.metrics.fidelity import psnr_y, ssim_y
from duovsr.model.resize import resize_frames
from duovsr.model.tiny_vae import TinyVAE
from duovsr.video.reader import VideoReader

RESULT = RESULTS / "autoencoder.json"
SETS = ("real", "bi")
SCALE = 4.0  # of both


def frames_of(path: Path, count: int) -> Tensor:
    """(1, 3, count, H, W) in [-1, 1]."""
    with VideoReader(path) as reader:
        pixels = np.stack([frame.pixels for frame in islice(reader, count)])
    return torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@torch.inference_mode()
def decodes(vae: TinyVAE, truth: Tensor, lq: Tensor) -> dict[str, Tensor]:
    dtype = next(vae.parameters()).dtype
    latents, _ = vae.encode(truth.to(dtype))
    grey = torch.zeros_like(lq)
    return {
        "truth's latents and LQ": vae.decode(latents.to(dtype), lq, scale=SCALE)[0],
        "LQ alone": vae.decode(None, lq, scale=SCALE)[0],
        "truth's latents alone": vae.decode(latents.to(dtype), grey, scale=SCALE)[0],
        "resized LQ": lq,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eval_folder", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, default=9, help="of each clip, 4k + 1")
    arguments = parser.parse_args()
    vae = Upscaler.from_preset(arguments.model, device="cpu").model.vae
    assert isinstance(vae, TinyVAE)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name in SETS:
        found: dict[str, list[tuple[float, float]]] = {}
        for path in sorted((arguments.eval_folder / "gt").iterdir()):
            clip = next((arguments.eval_folder / name).glob(f"{path.stem}.*"))
            truth = frames_of(path, arguments.frames)
            lq = resize_frames(frames_of(clip, arguments.frames), *truth.shape[3:])
            references = pixels(truth)
            for way, output in decodes(vae, truth, lq).items():
                pairs = list(zip(pixels(output), references, strict=True))
                found.setdefault(way, []).append(
                    (fmean(psnr_y(*pair) for pair in pairs), fmean(ssim_y(*pair) for pair in pairs))
                )
        rows[name] = {
            way: {"psnr_y": fmean(psnr for psnr, _ in values), "ssim_y": fmean(ssim for _, ssim in values)}
            for way, values in found.items()
        }
        print(name, json.dumps(rows[name], indent=1), flush=True)
    machine = describe(torch.device("cpu"))
    write_json(RESULT, {"benchmark": "autoencoder", "machine": machine, "frames": arguments.frames, "rows": rows})


if __name__ == "__main__":
    main()

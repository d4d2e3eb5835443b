"""The Wan2.1 autoencoder beside `diffusers`' on the same random weights: the same results, in how much of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measuring import PeakMemory, milliseconds
from torch import Tensor

from duovsr.engine.memory import release_memory
from duovsr.engine.plan import VAE_FRAMES
from duovsr.model.key_maps import to_original
from duovsr.model.layers import channels_last
from duovsr.model.wan_vae import WanVAE
from duovsr.options import WanVAEConfig


@torch.inference_mode()
def measure(
    config: WanVAEConfig, device: torch.device, dtype: torch.dtype, size: tuple[int, int], frames: int, repeat: int
) -> dict[str, Any]:
    """Encoding and decoding `frames` frames of `size` (width, height). Raises ImportError without diffusers."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    with device:
        theirs = AutoencoderKLWan(base_dim=config.dim, z_dim=config.latent_channels).to(dtype).eval()
    with torch.device("meta"):
        ours = WanVAE(config)
    weights = {name: tensor.clone() for name, tensor in to_original(theirs.state_dict()).items()}
    ours.load_state_dict(weights, assign=True)
    ours = channels_last(ours.requires_grad_(False).eval())
    ours.frames_at_once = VAE_FRAMES
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1) for values in (config.latent_mean, config.latent_std)
    )
    clip = torch.rand(1, 3, frames, *size[::-1], device=device).mul_(2).sub_(1).to(dtype)
    latents = ours.encode(clip)[0]
    raw = (latents * std + mean).to(dtype)
    ways: dict[str, dict[str, Callable[[], Tensor]]] = {
        "encode": {
            "ours": lambda: ours.encode(clip)[0],
            "diffusers": lambda: theirs.encode(clip).latent_dist.mode(),
        },
        "decode": {
            "ours": lambda: ours.decode(latents)[0],
            "diffusers": lambda: theirs.decode(raw).sample,
        },
    }
    expected = (ways["encode"]["diffusers"]().float() - mean) / std
    error = float((latents.float() - expected).norm() / expected.norm())
    row: dict[str, Any] = {"frames": frames, "size": size, "dtype": str(dtype), "error_of_latents": error}
    del expected
    for phase, both in ways.items():
        row[phase] = {}
        for name, compute in both.items():
            release_memory(device)
            peak = PeakMemory(device)
            row[phase][name] = {
                "milliseconds": milliseconds(compute, device, repeat, warm_up=1),
                "peak_gib": peak.bytes() / 2**30,
            }
    times = {name: sum(row[phase][name]["milliseconds"]["median"] for phase in ways) for name in ("ours", "diffusers")}
    return {**row, "speed_relative_to_diffusers": times["diffusers"] / times["ours"]}

"""What a stage will take: parameters, samples, and memory of each device, counted from the real modules on meta."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duovsr.options import PRESETS, Preset, TransformerConfig
from duovsr.train.options import DualConfig, ProgressiveConfig, StageConfig
from duovsr.train.rfs_gan import Heads
from duovsr.train.roles import DiffusionModel
from duovsr.train.stages import Job

_TRAINED_BYTES = 4 + 4 + 8 + 4  # float32 weight, gradient, Adam's two moments, EMA
_FROZEN_BYTES = 4
_ACTIVATION_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Roles:
    """How many diffusion models a stage trains and keeps frozen, and how many graphs its largest update holds."""

    trained: int
    frozen: int
    graphs: int
    samples: int = 1  # latents a sample: a preference pair has two


ROLES = {
    "base": Roles(1, 0, 1),
    "cfg": Roles(1, 1, 1),
    "progressive": Roles(1, 2, 1),
    "dual": Roles(2, 1, 3),  # the student's gradient passes through both score models
    "dpo": Roles(1, 1, 1, samples=2),
}


def describe(job: Job, config: Any, devices: int) -> dict[str, Any]:
    """The resolved configuration of a job and its plan; of a recipe, stage by stage."""
    if config is None:
        return {}
    if isinstance(config, dict):
        return {stage: describe(_at(job, stage), each, devices) for stage, each in config.items()}
    settings = asdict(config)
    if not isinstance(config, StageConfig):
        return settings
    return {**settings, "plan": plan(job.stage, PRESETS[job.preset], config, devices)}


def _at(job: Job, stage: str) -> Job:
    from dataclasses import replace

    from duovsr.train.options import RECIPES

    assert job.name is not None
    return replace(job, stage=stage, preset=RECIPES[job.name].preset)


def plan(stage: str, preset: Preset, config: StageConfig, devices: int) -> dict[str, Any]:
    """Steps, samples, and for the diffusion stages parameters and GiB a device with weights sharded over `devices`."""
    steps, updates = config.steps, 1
    if isinstance(config, ProgressiveConfig):
        steps *= config.rounds
    if isinstance(config, DualConfig):
        updates += config.auxiliary
    planned: dict[str, Any] = {"steps": steps, "samples": steps * updates * config.batch, "devices": devices}
    if stage not in ROLES:
        return planned
    roles = ROLES[stage]
    with torch.device("meta"):
        model = DiffusionModel(preset)
        heads = Heads(2 * preset.transformer.dim, 256, 3) if stage == "dual" else nn.Identity()
    size, head_size = (sum(p.numel() for p in module.parameters()) for module in (model, heads))
    block = sum(p.numel() for p in model.transformer.blocks[0].parameters())
    weights = roles.trained * size * _TRAINED_BYTES + roles.frozen * size * _FROZEN_BYTES + head_size * _TRAINED_BYTES
    gathered = 0 if devices == 1 else 2 * block * _ACTIVATION_BYTES + (size - len(model.transformer.blocks) * block) * 4
    local_samples = max(1, config.batch // config.accumulate // devices) * roles.samples
    activations = roles.graphs * local_samples * activation_bytes(preset.transformer, config)
    total = weights / devices + gathered + activations
    return planned | {
        "parameters": {"diffusion_model": size, "heads": head_size, "trained": roles.trained * size + head_size},
        "memory_gib_a_device": {
            "weights_gradients_optimizer_ema": round(weights / devices / 2**30, 2),
            "gathered_blocks": round(gathered / 2**30, 2),
            "activations": round(activations / 2**30, 2),
            "total": round(total / 2**30, 2),
            "not_counted": "the autoencoder's work, the allocator's gaps",
        },
    }


def activation_bytes(config: TransformerConfig, stage: StageConfig) -> int:
    """Bytes that autograd keeps for one sample's pass through the transformer, in bfloat16.

    Counted by running blocks of the real class on meta with few tokens, where attention's quadratic part is
    negligible (the kernels used in training do not store it), and scaled by the number of tokens.
    """
    tokens = ((stage.frames - 1) // 4 + 1) * (stage.crop // 16) ** 2
    one, two = (_saved_bytes(config, layers) for layers in (1, 2))
    block, rest = (two - one) / _PROBE_TOKENS, (2 * one - two) / _PROBE_TOKENS
    if stage.checkpointing:  # each block's input, and one block while it is recomputed
        return int(tokens * (config.layers * config.dim * _ACTIVATION_BYTES + block + rest))
    return int(tokens * (config.layers * block + rest))


_PROBE_TOKENS = 16


def _saved_bytes(config: TransformerConfig, layers: int) -> int:
    from dataclasses import replace

    from duovsr.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(replace(config, layers=layers, window=None, text_length=1)).to(torch.bfloat16)
        latents = torch.empty(1, config.latent_channels, 1, 8, 8, dtype=torch.bfloat16)  # 16 tokens
        text = torch.empty(1, 1, config.text_dim, dtype=torch.bfloat16)
        timestep = torch.empty(1)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: Mapping[int, int] = {}
    seen: dict[int, int] = dict(kept)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(latents, latents, timestep, text)[0]
    size = sum(seen.values())
    del output
    return size

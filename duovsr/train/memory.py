"""What a stage will take: parameters, samples, and memory of each device, counted from the real modules on meta."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from duovsr.model.transformer import Transformer
from duovsr.options import PRESETS, Preset, TransformerConfig
from duovsr.train.options import CFGConfig, DualConfig, LatentsConfig, PrefsConfig, ProgressiveConfig, StageConfig
from duovsr.train.rfs_gan import Heads, feature_channels
from duovsr.train.roles import DiffusionModel
from duovsr.train.stages import Job

_TRAINED_BYTES = 4 + 4 + 8 + 4  # float32 weight, gradient, Adam's two moments, EMA
_FROZEN_BYTES = 4
_ACTIVATION_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Roles:
    """How many diffusion models a stage trains and keeps frozen, how many graphs its largest update holds, and its
    passes a sample and step: forward ones without gradient, trained ones, and those that only pass the gradient on."""

    trained: int
    frozen: int
    graphs: int
    forward: float
    backward: float
    through: float = 0
    samples: int = 1  # latents a sample: a preference pair has two


def roles_of(stage: str, config: StageConfig) -> Roles | None:
    if isinstance(config, DualConfig):
        return _dual_roles(config)
    guided = isinstance(config, CFGConfig) and config.guidance != 0
    return {
        "base": Roles(1, 0, graphs=1, forward=0, backward=1),
        "cfg": Roles(1, 1, graphs=1, forward=1 + guided, backward=1),
        "progressive": Roles(1, 2, graphs=1, forward=2, backward=1),
        "dpo": Roles(1, 1, graphs=1, forward=1, backward=1, samples=2),
    }.get(stage)


def _dual_roles(config: DualConfig) -> Roles:
    """N updates of the fake score and the heads, and one of the student (`stage2.DualStream`)."""
    N, guided = config.auxiliary, int(config.guidance != 0)
    clean = 2 * (config.discriminator_input == "clean")  # both scores once more, for the sample as it is
    dmd = N + 2 + guided  # the student's sample; what both scores say of it
    gan = N * (4 + clean) + 2 + clean + guided  # and of the truth, and the real score's features of the sample
    share = {"dmd": 0.0, "sequential": 0.5}.get(config.streams, 1.0)  # of the steps that have a GAN
    graphs = 1 if share == 0 else 3
    return Roles(2, 1, graphs, (1 - share) * dmd + share * gan, N + 1, through=2 * share)


def describe(job: Job, config: Any, devices: int) -> dict[str, Any]:
    """The resolved configuration of a job and its plan; of a recipe, stage by stage."""
    if isinstance(config, dict):
        of_stage = {stage: replace(job, stage=stage, preset=job.preset_name) for stage in config}
        return {stage: describe(of_stage[stage], each, devices) for stage, each in config.items()}
    settings = asdict(config)
    if not isinstance(config, StageConfig):
        return settings
    return {**settings, "plan": plan(job.stage, PRESETS[job.preset_name], config, devices)}


def plan(stage: str, preset: Preset, config: StageConfig, devices: int) -> dict[str, Any]:
    """Steps, samples, and for the diffusion stages parameters and GiB a device with weights sharded over `devices`."""
    if isinstance(config, LatentsConfig):
        return {"samples": config.samples}
    if isinstance(config, PrefsConfig):
        return {"samples": config.pairs * config.candidates}
    steps, updates = config.steps, 1
    if isinstance(config, ProgressiveConfig):
        steps *= config.rounds
    if isinstance(config, DualConfig):
        updates += config.auxiliary
        steps = steps if config.count == "student" else max(1, steps // updates)
    planned: dict[str, Any] = {"steps": steps, "samples": steps * updates * config.batch, "devices": devices}
    roles = roles_of(stage, config)
    if roles is None:
        return planned
    with torch.device("meta"):
        model = DiffusionModel(preset)
        heads = _heads(preset, config) if isinstance(config, DualConfig) else nn.Identity()
    size, head_size = (sum(p.numel() for p in module.parameters()) for module in (model, heads))
    block = sum(p.numel() for p in model.transformer.blocks[0].parameters())
    weights = roles.trained * size * _TRAINED_BYTES + roles.frozen * size * _FROZEN_BYTES + head_size * _TRAINED_BYTES
    gathered = 0 if devices == 1 else 2 * block * _ACTIVATION_BYTES + (size - len(model.transformer.blocks) * block) * 4
    local_samples = max(1, config.batch // config.accumulate // devices) * roles.samples
    activations = roles.graphs * local_samples * activation_bytes(preset.transformer, config)
    total = weights / devices + gathered + activations
    # A trained pass is one forward and two backward, one more where activations are recomputed.
    again = int(config.checkpointing)
    passes = roles.samples * (roles.forward + (3 + again) * roles.backward + (2 + again) * roles.through)
    return planned | {
        "petaflop": round(steps * config.batch * passes * forward_flops(preset.transformer, config) / 1e15, 3),
        "parameters": {"diffusion_model": size, "heads": head_size, "trained": roles.trained * size + head_size},
        "memory_gib_a_device": {
            "weights_gradients_optimizer_ema": round(weights / devices / 2**30, 2),
            "gathered_blocks": round(gathered / 2**30, 2),
            "activations": round(activations / 2**30, 2),
            "total": round(total / 2**30, 2),
            "not_counted": "the autoencoder's work, the allocator's gaps",
        },
    }


def _heads(preset: Preset, config: DualConfig) -> Heads:
    return Heads(feature_channels(preset.transformer.dim, config.features), config.head_width)


def tokens(stage: StageConfig) -> tuple[int, int]:
    """Latent frames, and tokens of one."""
    return (stage.frames - 1) // 4 + 1, (stage.crop // 16) ** 2


def forward_flops(config: TransformerConfig, stage: StageConfig) -> float:
    """Of one sample's pass through the transformer: 2 per multiplication."""
    T, S = tokens(stage)
    d, seen = config.dim, T * S
    if config.window is not None:
        frames = T if config.window.past is None else config.window.past + 1
        seen = min(S, config.window.height * config.window.width) * frames
    a_token = 12 * d**2 + 4 * d * config.ffn_dim + 4 * d * (config.text_length + seen)
    return config.layers * T * S * float(a_token)


def activation_bytes(config: TransformerConfig, stage: StageConfig) -> int:
    """Bytes that autograd keeps for one sample's pass through the transformer, in bfloat16.

    Counted by running blocks of the real class on meta with few tokens, where attention's quadratic part is
    negligible (the kernels used in training do not store it), and scaled by the number of tokens.
    """
    T, S = tokens(stage)
    one, two = (_saved_bytes(config, layers) for layers in (1, 2))
    block, rest = (two - one) / _PROBE_TOKENS, (2 * one - two) / _PROBE_TOKENS
    if stage.checkpointing:  # each block's input, and one block while it is recomputed
        return int(T * S * (config.layers * config.dim * _ACTIVATION_BYTES + block + rest))
    return int(T * S * (config.layers * block + rest))


_PROBE_TOKENS = 16


def _saved_bytes(config: TransformerConfig, layers: int) -> int:
    with torch.device("meta"):
        model = Transformer(replace(config, layers=layers, window=None, text_length=1)).to(torch.bfloat16)
        latents = torch.empty(1, config.latent_channels, 1, 8, 8, dtype=torch.bfloat16)  # 16 tokens
        text = torch.empty(1, 1, config.text_dim, dtype=torch.bfloat16)
        timestep = torch.empty(1)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, int] = {}

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

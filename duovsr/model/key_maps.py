"""Wan2.1 checkpoints as found in the wild, brought to the original key names, which are duovsr's own.

Two layouts exist of the transformer and of the VAE: Wan2.1's own and that of `diffusers` (`WanTransformer3DModel`,
`AutoencoderKLWan`); shapes are equal. Training code wraps either in prefixes and nested dictionaries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from duovsr.errors import InputError

# Where trainers put the weights among the rest of their state; averaged weights before those still in training.
NESTS = ("generator_ema", "generator", "state_dict", "model")
PREFIXES = {"model", "module", "diffusion_model"}
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # these may stand inside a name too
PARAMETERS = {"weight", "bias", "gamma"}
PATCH_EMBEDDING = "patch_embedding.weight"

TRANSFORMER_NAMES = {  # diffusers: original
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
BLOCK_NAMES = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",  # the only norm of the three that has parameters
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
ATTENTION_NAMES = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
CODER_NAMES = {
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "mid_block.attentions.0.norm": "middle.1.norm",
    "mid_block.attentions.0.to_qkv": "middle.1.to_qkv",
    "mid_block.attentions.0.proj": "middle.1.proj",
}
RES_BLOCK_NAMES = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
RESAMPLE_NAMES = {"resample.1": "resample.1", "time_conv": "time_conv"}


def to_original(checkpoint: Mapping[str, object]) -> dict[str, Tensor]:
    """The state dict of a `Transformer` or a `WanVAE`, from a checkpoint in either layout, wrapped or not.

    Raises InputError, which names the key, for a key of neither layout and for a value that is no tensor.
    """
    state = _unwrap(checkpoint)
    names = _names(state)
    return {_rename(key, names): tensor for key, tensor in state.items()}


def latent_channels(state: Mapping[str, Tensor]) -> int:
    """How many channels a transformer (original names) gives out. Raises InputError where the state is of none."""
    patch = _of_transformer(state, PATCH_EMBEDDING).shape[2:]
    return _of_transformer(state, "head.head.bias").numel() // patch.numel()


def takes_only_noise(state: Mapping[str, Tensor]) -> bool:
    """Whether a transformer (original names) takes no more than it gives: noisy latents, and none of the LQ."""
    return _of_transformer(state, PATCH_EMBEDDING).shape[1] == latent_channels(state)


def widen_patch_embedding(state: Mapping[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """Give a text-to-video transformer (original names) the input channels of the LQ latents, after the noisy ones.

    The new channels' weights are zero, so that training starts from the text-to-video model's own output. A state that
    has `in_channels` already stays as it is. Raises InputError for any other number, and where there is no such weight.
    """
    weight = _of_transformer(state, PATCH_EMBEDDING)
    stored = weight.shape[1]
    if stored == in_channels:
        return dict(state)
    if stored != in_channels // 2:
        raise InputError(
            f"unsupported input channels of `{PATCH_EMBEDDING}`: {stored}",
            hint=f"use a Wan2.1 text-to-video checkpoint ({in_channels // 2}) or one of duovsr's own ({in_channels})",
        )
    return {**state, PATCH_EMBEDDING: torch.cat([weight, torch.zeros_like(weight)], dim=1)}


def _of_transformer(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise InputError(f"not a transformer's checkpoint: it has no `{name}`")
    return state[name]


def _unwrap(checkpoint: Mapping[str, object]) -> dict[str, Tensor]:
    """The innermost dictionary of tensors, without its keys' prefixes."""
    for name in NESTS:
        nested = checkpoint.get(name)
        if isinstance(nested, Mapping):
            return _unwrap(nested)
    state: dict[str, Tensor] = {}
    for key, value in checkpoint.items():
        if not isinstance(value, Tensor):
            raise InputError(f"not a tensor in the checkpoint: `{key}`")
        parts = [part for part in key.split(".") if part not in WRAPPERS]
        while parts and parts[0] in PREFIXES:
            del parts[0]
        name = ".".join(parts)
        if name in state:
            raise InputError(f"key twice in the checkpoint, with and without a prefix: `{key}`")
        state[name] = value
    return state


def _names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """{name in the state's layout: original name} for the model that the state is of. Raises InputError."""
    layers = len({found[1] for key in state if (found := re.match(r"blocks\.(\d+)\.", key))})
    if "blocks.0.attn1.to_q.weight" in state:
        return _transformer_names(layers)
    if "blocks.0.self_attn.q.weight" in state:
        return {name: name for name in _transformer_names(layers).values()}
    if "encoder.conv_in.weight" in state:
        return _vae_names()
    if "encoder.conv1.weight" in state:
        return {name: name for name in _vae_names().values()}
    raise InputError(
        f"neither a Wan2.1 transformer nor a Wan2.1 VAE: its first key is `{next(iter(state), '')}`",
        hint="use a checkpoint in Wan2.1's or in diffusers' layout",
    )


def _rename(key: str, names: Mapping[str, str]) -> str:
    """Tables name modules, and the few parameters that stand alone."""
    if key in names:
        return names[key]
    module, _, parameter = key.rpartition(".")
    if module not in names or parameter not in PARAMETERS:
        raise InputError(f"unknown key in the checkpoint: `{key}`")
    return f"{names[module]}.{parameter}"


def _under(diffusers: str, original: str, names: Mapping[str, str]) -> dict[str, str]:
    """The table `names` moved below a module."""
    return {f"{diffusers}.{theirs}": f"{original}.{ours}" for theirs, ours in names.items()}


def _transformer_names(layers: int) -> dict[str, str]:
    names = dict(TRANSFORMER_NAMES)
    for i in range(layers):
        names |= _under(f"blocks.{i}", f"blocks.{i}", BLOCK_NAMES)
        names |= _under(f"blocks.{i}.attn1", f"blocks.{i}.self_attn", ATTENTION_NAMES)
        names |= _under(f"blocks.{i}.attn2", f"blocks.{i}.cross_attn", ATTENTION_NAMES)
    return names


def _vae_names() -> dict[str, str]:
    names = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    for coder in ("encoder", "decoder"):
        names |= _under(coder, coder, CODER_NAMES)
        names |= _under(f"{coder}.mid_block.resnets.0", f"{coder}.middle.0", RES_BLOCK_NAMES)
        names |= _under(f"{coder}.mid_block.resnets.1", f"{coder}.middle.2", RES_BLOCK_NAMES)
    for i in range(11):  # four stages of two residual blocks, and a halving after the first three
        layer = RESAMPLE_NAMES if i % 3 == 2 else RES_BLOCK_NAMES
        names |= _under(f"encoder.down_blocks.{i}", f"encoder.downsamples.{i}", layer)
    for i in range(15):  # four stages of three residual blocks, and a doubling after the first three
        stage, place = divmod(i, 4)
        block, layer = (f"resnets.{place}", RES_BLOCK_NAMES) if place < 3 else ("upsamplers.0", RESAMPLE_NAMES)
        names |= _under(f"decoder.up_blocks.{stage}.{block}", f"decoder.upsamples.{i}", layer)
    return names

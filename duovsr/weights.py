"""Weights: strict loading on the meta device, and saving. `duovsr.repository` says which files a model has.

Wan2.1's checkpoints are read as they are published: the original repository's files or those of `diffusers`.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from duovsr.errors import InputError, UsageError
from duovsr.hub import find_model
from duovsr.model import key_maps
from duovsr.model.layers import channels_last
from duovsr.model.one_step import OneStepModel
from duovsr.model.prompt import Prompt
from duovsr.model.tiny_vae import TinyVAE
from duovsr.model.transformer import Transformer
from duovsr.model.wan_vae import WanVAE
from duovsr.options import Preset, WanVAEConfig
from duovsr.repository import CONFIG, FILES, MANIFEST, TINY_VAE, Model, describe, write_manifest

WanPart = Literal["transformer", "vae"]
WAN_FILES: dict[WanPart, tuple[str, ...]] = {  # in a folder: our own name, diffusers', the original repository's
    "transformer": (
        FILES[0],
        "transformer/*.index.json",
        "transformer/*.safetensors",
        "*.index.json",
        "diffusion_pytorch_model*.safetensors",
    ),
    "vae": (FILES[1], "vae/*.safetensors", "Wan2.1_VAE.*", "diffusion_pytorch_model*.safetensors"),
}

Module = TypeVar("Module", bound=nn.Module)


def load_model(name: str, device: torch.device, dtype: torch.dtype, vae: str | None = None) -> OneStepModel:
    """Load the model that `name` names (`find_model`) with the autoencoder `vae`, whole or not at all.

    Weights of a model that does not stream stay in host memory, until a plan says where they fit (`restore_clip`).
    Raises UsageError for an unknown name and for a model that ignores the LQ, InputError for a missing or altered file.
    """
    model = find_model(name)
    folder = model.folder
    if not (folder / MANIFEST).is_file() and find_wan(folder, "transformer") is not None and is_text_to_video(folder):
        raise _ignores_lq(folder)
    model.require_verified()
    own, preset = model.preset, model.preset.with_vae(vae)
    file = FILES[1] if preset == own else TINY_VAE
    if file not in model.files:
        raise _no_tiny_vae(model)
    home = device if preset.transformer.streams else torch.device("cpu")
    transformer = load_transformer(folder / FILES[0], preset, home, dtype)
    if not transformer.patch_embedding.weight[:, preset.transformer.latent_channels :].any():
        raise _ignores_lq(folder)
    autoencoder = _load_vae(folder / file, preset, home, dtype)
    with torch.device("meta"):
        prompt = Prompt(preset.transformer)
    prompt = load_strict(prompt, folder / FILES[2], device, dtype)
    return OneStepModel(preset, transformer, channels_last(autoencoder), prompt.tokens(1), model.digest)


def _load_vae(path: Path, preset: Preset, device: torch.device, dtype: torch.dtype) -> TinyVAE | WanVAE:
    if isinstance(preset.vae, WanVAEConfig):
        return load_wan_vae(path, preset.vae, device, dtype)
    with torch.device("meta"):
        vae = TinyVAE(preset.vae)
    return load_strict(vae, path, device, dtype)


def _no_tiny_vae(model: Model) -> InputError:
    preset = f"--preset {model.preset.name} --init {model.folder}"
    hint = f"train it: duovsr train vae {preset} --data POOL --out RUN, then duovsr train export {preset}"
    return InputError(
        f"no TinyVAE was trained for model `{model.name}`: no `{TINY_VAE}`",
        hint=f"{hint} --set tiny_vae=RUN --out NEW",
    )


def _ignores_lq(folder: Path) -> UsageError:
    hint = f"train it first: duovsr train recipe paper --init {folder} --data POOL --out RUN, then duovsr train export"
    return UsageError(f"a text-to-video model, which ignores the video to upscale: `{folder}`", hint=hint)


def load_strict(module: Module, path: Path, device: torch.device, dtype: torch.dtype) -> Module:
    """Fill a module built on the meta device: every key, and no other. Frozen, in evaluation mode."""
    return _filled(module, read_safetensors(path), path, device, dtype)


def _filled(
    module: Module, state: Mapping[str, Tensor], path: Path, device: torch.device, dtype: torch.dtype
) -> Module:
    placed = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    try:
        module.load_state_dict(placed, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"not weights of this model: `{path}` ({' '.join(str(error).split())[:160]})") from error
    return module.requires_grad_(False).eval()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file. Raises InputError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read model file: `{path}` ({error})") from error


def load_transformer(path: Path, preset: Preset, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The preset's transformer from a file, an index of shards or a folder, in Wan2.1's layout or that of diffusers.

    A text-to-video checkpoint is widened by zeros: it ignores the LQ until it is trained (`is_text_to_video`). Raises
    InputError.
    """
    with torch.device("meta"):
        transformer = Transformer(preset.transformer)
    return _filled(transformer, read_transformer(path), path, device, dtype)


def load_wan_vae(path: Path, config: WanVAEConfig, device: torch.device, dtype: torch.dtype) -> WanVAE:
    """The Wan2.1 VAE from a file, an index of shards or a folder, in either layout. Raises InputError."""
    with torch.device("meta"):
        vae = WanVAE(config)
    return _filled(vae, read_wan(path, "vae"), path, device, dtype)


def is_text_to_video(path: Path) -> bool:
    """Whether a transformer's checkpoint has no input for the LQ: it can start a training, but not upscale."""
    state = read_wan(path, "transformer")
    with _naming(path):
        return key_maps.takes_only_noise(state)


def read_transformer(path: Path) -> dict[str, Tensor]:
    """The state dict of a transformer's checkpoint, original names, with input channels for the LQ latents."""
    state = read_wan(path, "transformer")
    with _naming(path):
        return key_maps.widen_patch_embedding(state, 2 * key_maps.latent_channels(state))


def read_wan(path: Path, part: WanPart) -> dict[str, Tensor]:
    """The state dict, original names, of a file, an index of shards, or a folder that holds one of them."""
    file = find_wan(path, part)
    if file is None:
        raise InputError(f"no {part} of Wan2.1's in folder: `{path}`", hint="name the file itself")
    checkpoint = read_checkpoint(file)
    with _naming(file):
        return key_maps.to_original(checkpoint)


def find_wan(path: Path, part: WanPart) -> Path | None:
    """Where in folder `path` the part is; a file is itself. Raises InputError where it may be one of several files."""
    if not path.is_dir():
        return path
    for pattern in WAN_FILES[part]:
        files = sorted(path.glob(pattern))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise InputError(f"more than one {part} in folder: `{path}` ({names})", hint="name the file itself")
        if files:
            return files[0]
    return None


def read_checkpoint(path: Path) -> Mapping[str, object]:
    """What a checkpoint holds: tensors by name, of which some may be nested, and perhaps other values.

    `path`: a safetensors file, a pickle of torch's, from which no code is run, or the index (.json) of shards. Tensors
    are mapped to memory, and read when they are used. Raises InputError.
    """
    if path.suffix != ".json":
        return _read_file(path)
    try:
        places: dict[str, str] = json.loads(path.read_text())["weight_map"]
        shards = {name: _read_file(path.with_name(name)) for name in set(places.values())}
        return {key: shards[name][key] for key, name in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"not an index of a sharded checkpoint: `{path}` ({error!r})") from error


def _read_file(path: Path) -> Mapping[str, object]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        checkpoint = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        hint = "a pickle can run code: save its tensors alone, best as .safetensors"
        raise InputError(f"not only tensors in model file: `{path}`", hint=hint) from error
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot read model file: `{path}` ({reason})") from error
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"no tensors by name in model file: `{path}`")
    return checkpoint


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a checkpoint's keys name its file too."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}, in `{path}`", hint=error.hint) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A partial path beside `path`; where nothing is raised, it takes the name with all its data on the disk."""
    partial = path.with_name(f"{path.name}.part")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_model(folder: Path, preset: str, parts: dict[str, dict[str, Tensor]]) -> None:
    """Write a model in bfloat16 as the repository `folder`. `parts` is {file name: state dict}.

    A model that was there stays until all is written; then its manifest is replaced last, so that a mix of old and
    new files never verifies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:  # replaced in reverse
        manifest, config, *weights = (
            files.enter_context(atomic_file(folder / name)) for name in (MANIFEST, CONFIG, *parts)
        )
        config.write_text(describe(preset))
        for state, partial in zip(parts.values(), weights, strict=True):
            save_file({key: tensor.to(torch.bfloat16).contiguous() for key, tensor in state.items()}, partial)
        write_manifest(manifest, dict(zip((CONFIG, *parts), (config, *weights), strict=True)))

"""Model files: where they lie, their sha256, and strict loading on the meta device.

A model is a folder with `transformer.safetensors`, `vae.safetensors` and `prompt.safetensors`; `manifest.json` beside
the folders holds the sha256 of every file. The wheel carries the repository's `weights/` as `duovsr/_weights`.

Wan2.1's checkpoints are read as they are published: the original repository's files or those of `diffusers`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from duovsr.errors import InputError, UsageError
from duovsr.model import key_maps
from duovsr.model.layers import channels_last
from duovsr.model.one_step import OneStepModel
from duovsr.model.prompt import Prompt
from duovsr.model.tiny_vae import TinyVAE
from duovsr.model.transformer import Transformer
from duovsr.model.wan_vae import WanVAE
from duovsr.options import PRESETS, Preset, TinyVAEConfig, WanVAEConfig

EMBEDDED = "tiny"
FILES = ("transformer.safetensors", "vae.safetensors", "prompt.safetensors")
CONFIG = "config.json"

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


def weights_folder() -> Path:
    """The embedded weights: inside an installed package, or at the top of a source checkout."""
    installed = Path(__file__).parent / "_weights"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class FileStatus:
    """One model file as `doctor` shows it."""

    path: Path
    sha256: str | None  # None: the file is missing
    verified: bool


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, dict[str, str]]:
    """{model: {file: sha256}} of a weights folder."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"no model manifest: `{path}`", hint="reinstall duovsr")
    try:
        manifest: dict[str, dict[str, str]] = json.loads(path.read_text())
        expected = {EMBEDDED, *manifest} if folder == weights_folder() else set(manifest)
        complete = all(set(manifest[name]) == set(FILES) for name in expected)
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise InputError(f"damaged model manifest: `{path}`", hint="reinstall duovsr")
    return manifest


def check_files(name: str, folder: Path | None = None) -> list[FileStatus]:
    """Compare the files of a model in `folder`, by default a shipped one, with the folder's manifest."""
    folder = folder or weights_folder()
    statuses = []
    for file, expected in read_manifest(folder).get(name, dict.fromkeys(FILES, "")).items():
        path = folder / name / file
        found = sha256_of(path) if path.is_file() else None
        statuses.append(FileStatus(path, found, found == expected))
    return statuses


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> OneStepModel:
    """Load a shipped model, or the one in the folder `name` that `duovsr train export` wrote, whole or not at all.

    Raises UsageError for an unknown name, InputError for a missing or altered file.
    """
    preset, folder = _find_model(name)
    assert isinstance(preset.vae, TinyVAEConfig)
    for status in check_files(folder.name, folder.parent):
        if not status.verified:
            found = "is missing" if status.sha256 is None else "does not match its sha256"
            hint = "reinstall duovsr" if name in PRESETS else "export it again"
            raise InputError(f"model file {found}: `{status.path}`", hint=hint)
    with torch.device("meta"):
        transformer, vae = Transformer(preset.transformer), TinyVAE(preset.vae)
    transformer = load_strict(transformer, folder / FILES[0], device, dtype)
    vae = channels_last(load_strict(vae, folder / FILES[1], device, dtype))
    with torch.device("meta"):
        prompt = Prompt(preset.transformer)
    prompt = load_strict(prompt, folder / FILES[2], device, dtype)
    return OneStepModel(preset, transformer, vae, prompt.tokens(1))


def _find_model(name: str) -> tuple[Preset, Path]:
    """The preset and the folder of a shipped or exported model."""
    if name in PRESETS:
        if name not in shipped_models():
            raise UsageError(f"no weights for model `{name}` are shipped", hint=f"use `--model {EMBEDDED}`")
        return PRESETS[name], weights_folder() / name
    path = Path(name).resolve() / CONFIG
    if not path.is_file():
        known = ", ".join(shipped_models())
        raise UsageError(f"unknown model: `{name}`", hint=f"use one of: {known}; or a folder of `duovsr train export`")
    try:
        preset = PRESETS[json.loads(path.read_text())["preset"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"damaged model description: `{path}`", hint="export it again") from error
    if not isinstance(preset.vae, TinyVAEConfig):
        raise UsageError(f"upscaling with preset `{preset.name}` is not there yet: `{name}`")
    return preset, path.parent


def shipped_models() -> list[str]:
    return list(read_manifest(weights_folder()))


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


def save_model(folder: Path, name: str, preset: str, parts: dict[str, dict[str, Tensor]]) -> None:
    """Write a model in bfloat16 and note its sha256 in the folder's manifest. `parts` is {file name: state dict}."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / CONFIG).write_text(json.dumps({"preset": preset}) + "\n")
    manifest_path = folder / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    manifest[name] = {}
    for file, state in parts.items():
        tensors = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in state.items()}
        save_file(tensors, folder / name / file)
        manifest[name][file] = sha256_of(folder / name / file)
    manifest_path.write_text(json.dumps(manifest, indent=2) + "\n")

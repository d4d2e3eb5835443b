"""Model files: where they lie, their sha256, and strict loading on the meta device.

A model is a folder with `transformer.safetensors`, `vae.safetensors` and `prompt.safetensors`; `manifest.json` beside
the folders holds the sha256 of every file. The wheel carries the repository's `weights/` as `duovsr/_weights`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from duovsr.errors import InputError, UsageError
from duovsr.model.layers import channels_last
from duovsr.model.one_step import OneStepModel
from duovsr.model.prompt import Prompt
from duovsr.model.tiny_vae import TinyVAE
from duovsr.model.transformer import Transformer
from duovsr.options import PRESETS

EMBEDDED = "tiny"
FILES = ("transformer.safetensors", "vae.safetensors", "prompt.safetensors")

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
        complete = all(set(manifest[name]) == set(FILES) for name in {EMBEDDED, *manifest})
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise InputError(f"damaged model manifest: `{path}`", hint="reinstall duovsr")
    return manifest


def check_files(name: str) -> list[FileStatus]:
    """Compare a shipped model's files with the manifest."""
    statuses = []
    for file, expected in read_manifest(weights_folder())[name].items():
        path = weights_folder() / name / file
        found = sha256_of(path) if path.is_file() else None
        statuses.append(FileStatus(path, found, found == expected))
    return statuses


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> OneStepModel:
    """Load a shipped model whole or not at all.

    Raises UsageError for an unknown name, InputError for a missing or altered file.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown model: `{name}`", hint=f"use one of: {', '.join(shipped_models())}")
    if name not in shipped_models() or PRESETS[name].vae is None:
        raise UsageError(f"no weights for model `{name}` are shipped", hint=f"use `--model {EMBEDDED}`")
    for status in check_files(name):
        if not status.verified:
            found = "is missing" if status.sha256 is None else "does not match its sha256"
            raise InputError(f"model file {found}: `{status.path}`", hint="reinstall duovsr")
    preset, folder = PRESETS[name], weights_folder() / name
    assert preset.vae is not None
    with torch.device("meta"):
        transformer, vae = Transformer(preset.transformer), TinyVAE(preset.vae)
    transformer = load_strict(transformer, folder / FILES[0], device, dtype)
    vae = channels_last(load_strict(vae, folder / FILES[1], device, dtype))
    with torch.device("meta"):
        prompt = Prompt(preset.transformer)
    prompt = load_strict(prompt, folder / FILES[2], device, dtype)
    return OneStepModel(preset, transformer, vae, prompt.tokens(1))


def shipped_models() -> list[str]:
    return list(read_manifest(weights_folder()))


def load_strict(module: Module, path: Path, device: torch.device, dtype: torch.dtype) -> Module:
    """Fill a module built on the meta device: every key, and no other. Frozen, in evaluation mode."""
    state = {name: tensor.to(device, dtype) for name, tensor in read_safetensors(path).items()}
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"not weights of this model: `{path}` ({' '.join(str(error).split())[:160]})") from error
    return module.requires_grad_(False).eval()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file. Raises InputError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read model file: `{path}` ({error})") from error


def save_model(folder: Path, name: str, parts: dict[str, dict[str, Tensor]]) -> None:
    """Write a model in bfloat16 and note its sha256 in the folder's manifest. `parts` is {file name: state dict}."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    manifest_path = folder / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    manifest[name] = {}
    for file, state in parts.items():
        tensors = {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in state.items()}
        save_file(tensors, folder / name / file)
        manifest[name][file] = sha256_of(folder / name / file)
    manifest_path.write_text(json.dumps(manifest, indent=2) + "\n")

"""Model repositories: what a folder with a model in it holds, and whether that is as it was written.

`config.json` says what it is, three safetensors files hold the weights, a fourth may hold a TinyVAE for the latents of
a larger autoencoder, and `manifest.json` has the size and sha256 of all of them. Shipped, exported and downloaded
models are all such folders; the wheel carries `weights/` as `duovsr/_weights`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duovsr.errors import InputError
from duovsr.options import PRESETS, Preset

EMBEDDED = "tiny"
CONFIG, MANIFEST = "config.json", "manifest.json"
FILES = ("transformer.safetensors", "vae.safetensors", "prompt.safetensors")
TINY_VAE = "tiny_vae.safetensors"  # beside the others, where it was trained for a model whose own is another
FORMAT = 1
_LIBRARY = "duovsr"  # tells this `config.json` from those of other libraries


@dataclass(frozen=True)
class Model:
    """A model on this disk. `name`: what `--model` takes; `remedy`: the hint where its files are damaged."""

    name: str
    folder: Path
    remedy: str

    @property
    def preset(self) -> Preset:
        return read_preset(self.folder, self.remedy)

    @property
    def digest(self) -> str:
        """What tells the model's files from those of others, once they are verified."""
        return sha256_of(self.folder / MANIFEST)

    @property
    def files(self) -> list[str]:
        """The names of its files, but for the manifest, which lists them. Raises InputError."""
        return list(read_manifest(self.folder, self.remedy))

    def check(self) -> list[FileStatus]:
        """Every file against the manifest. Raises InputError where that is damaged or not there, or a file may not be
        read."""
        manifest = read_manifest(self.folder, self.remedy)
        return [_check(self.folder / name, expected) for name, expected in manifest.items()]

    def require_verified(self) -> None:
        """Raises InputError for the first file that is missing or altered."""
        for status in self.check():
            if not status.verified:
                found = "is missing" if status.sha256 is None else "does not match its sha256"
                raise InputError(f"model file {found}: `{status.path}`", hint=self.remedy)


@dataclass(frozen=True)
class FileStatus:
    """One file of a model, as found."""

    path: Path
    size: int
    sha256: str | None  # None: the file is missing
    verified: bool


def weights_folder() -> Path:
    """The folder of the shipped models: inside an installed package, or at the top of a source checkout."""
    installed = Path(__file__).parent / "_weights"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "weights"


def shipped_models() -> list[Model]:
    """The default model, there or not, and others with a manifest."""
    names = {EMBEDDED, *(path.parent.name for path in weights_folder().glob(f"*/{MANIFEST}"))}
    return [Model(name, weights_folder() / name, "reinstall duovsr") for name in sorted(names)]


def describe(preset: str) -> str:
    """The text of `config.json`."""
    return json.dumps({"library": _LIBRARY, "format": FORMAT, "preset": preset}, indent=2) + "\n"


def read_preset(folder: Path, remedy: str) -> Preset:
    """What model the folder says it holds. Raises InputError."""
    path = folder / CONFIG
    config = _read_json(path, "description", remedy)
    if config.get("library") != _LIBRARY or not isinstance(config.get("format"), int):
        raise InputError(f"not a model of duovsr: `{path}`", hint="`duovsr train export` makes one")
    preset = config.get("preset")
    if not isinstance(preset, str):
        raise InputError(f"damaged model description: `{path}`", hint=remedy)
    if config["format"] > FORMAT or preset not in PRESETS:
        known = f"format {config['format']}, preset `{preset}`"
        raise InputError(f"made with a later duovsr: `{path}` has {known}", hint="upgrade duovsr")
    return PRESETS[preset]


def write_manifest(path: Path, files: dict[str, Path]) -> None:
    """`files`: {name in the repository: where it is now}."""
    entries = {name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for name, file in files.items()}
    path.write_text(json.dumps(entries, indent=2) + "\n")


def read_manifest(folder: Path, remedy: str) -> dict[str, dict[str, Any]]:
    """{file: its size and sha256}. Raises InputError."""
    path = folder / MANIFEST
    manifest = _read_json(path, "manifest", remedy)
    if not {CONFIG, *FILES} <= set(manifest) <= {CONFIG, *FILES, TINY_VAE} or not all(
        isinstance(entry, dict) and entry.keys() == {"size", "sha256"} for entry in manifest.values()
    ):
        raise InputError(f"damaged model manifest: `{path}`", hint=remedy)
    return manifest


def _read_json(path: Path, what: str, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"no model {what}: `{path}`", hint=remedy) from error
    except ValueError as error:
        raise InputError(f"damaged model {what}: `{path}`", hint=remedy) from error
    if not isinstance(content, dict):
        raise InputError(f"damaged model {what}: `{path}`", hint=remedy)
    return content


def _check(path: Path, expected: dict[str, Any]) -> FileStatus:
    try:
        if not path.is_file():
            return FileStatus(path, 0, None, verified=False)
        size, sha256 = path.stat().st_size, sha256_of(path)
    except OSError as error:
        raise InputError(f"cannot read model file: `{path}`: {error.strerror}") from error
    return FileStatus(path, size, sha256, verified=expected == {"size": size, "sha256": sha256})


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What tells one job from another: all that its pixels depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duovsr import __version__
from duovsr.options import PIPE, UpscaleOptions
from duovsr.video.codecs import Encoding
from duovsr.video.images import image_files

if TYPE_CHECKING:
    from duovsr.engine.upscaler import Upscaler

_NOT_PIXELS = ("audio", "subtitles", "overwrite", "restart")  # options that change nothing in the pieces


def identity_of(
    source: Path, upscaler: Upscaler, options: UpscaleOptions, encoding: Encoding, piece_frames: int
) -> dict[str, Any]:
    """All but the plan, which a job keeps. A pipe is like no source."""
    wanted = {key: str(value) for key, value in asdict(options).items() if key not in _NOT_PIXELS}
    return {
        "duovsr": __version__,
        "source": None if source == PIPE else fingerprint(image_files(source) or [source]),
        "model": upscaler.model.fingerprint(),
        "attention": upscaler.model.attention,
        "device": upscaler.model.device.type,
        "dtype": ", ".join(upscaler.precisions),
        "encoder": asdict(replace(encoding, notices=())),
        "options": wanted,
        "piece_frames": piece_frames,
    }


def fingerprint(files: Sequence[Path]) -> str:
    """A digest that tells sources apart without reading them whole: names, sizes, dates, first and last MiB of each."""
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, status.st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def digest_of(content: dict[str, Any]) -> str:
    """The sha256 of what is written as JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def difference(known: dict[str, Any], identity: dict[str, Any]) -> str:
    """The names of what is not the same, as `source` or `options.seed`."""
    names = []
    for key in sorted(known.keys() | identity.keys()):
        old, new = known.get(key), identity.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += [f"{key}.{part}" for part in sorted(old.keys() | new.keys()) if old.get(part) != new.get(part)]
        elif old != new:
            names.append(key)
    return ", ".join(names)

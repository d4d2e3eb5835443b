"""`duovsr doctor`: what this installation can do, and what in it is broken."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import av
import torch
from av.codec.context import CodecContext
from av.codec.hwaccel import HWAccel

from duovsr.engine.precision import choose_device, choose_dtype
from duovsr.errors import DuovsrError, UsageError
from duovsr.model.int8 import favours_int8
from duovsr.model.quantise import INT8_LAYERS
from duovsr.model.transformer import describe_attention
from duovsr.repository import shipped_models
from duovsr.video.codecs import CODECS
from duovsr.video.encoder_options import check_encoder

_PACKAGES = ("duovsr", "torch", "numpy", "av", "typer", "rich", "safetensors", "huggingface-hub", "triton", "xformers")
_OPTIONAL = ("triton", "xformers")
_NEEDED_ENCODERS = ("h264", "ffv1")


def examine() -> tuple[dict[str, Any], list[str]]:
    """Findings for people or JSON, and the problems among them (empty: all that is needed works)."""
    problems: list[str] = []
    device = choose_device("auto")
    encoders = {name: codec.encoder in av.codecs_available for name, codec in CODECS.items() if not codec.hardware}
    problems += [f"encoder {name} is missing in PyAV" for name in _NEEDED_ENCODERS if not encoders[name]]
    versions = {name: _version(name) for name in _PACKAGES}
    missing = [name for name in _PACKAGES if versions[name] == "missing" and name not in _OPTIONAL]
    problems += [f"package {name} is missing" for name in missing]
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    findings = {
        "system": {"platform": platform.platform(), "python": platform.python_version()},
        "versions": versions,
        "devices": {
            "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "not available",
            "mps": "available" if torch.backends.mps.is_available() else "not available",
            "auto": f"{device.type}, {dtype}" + (f" and, in `tiny`, {INT8_LAYERS}" if favours_int8(device) else ""),
        },
        "attention": describe_attention(device),
        "encoders": {name: "yes" if present else "no" for name, present in encoders.items()},
        "nvidia": {name: "yes" if opens else "no" for name, opens in _nvidia().items()},
        "models": _models(problems),
    }
    return findings, problems


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _nvidia() -> dict[str, bool]:
    """What opens on this machine."""
    found = {}
    try:
        CodecContext.create("h264", "r", hwaccel=HWAccel("cuda", allow_software_fallback=False))
        found["nvdec"] = True
    except (av.error.FFmpegError, NotImplementedError):  # no such device, or not in this build of FFmpeg
        found["nvdec"] = False
    for name, codec in CODECS.items():
        if codec.hardware and codec.encoder in av.codecs_available:
            try:
                check_encoder(codec.encoder, codec.pix_fmts[0], 256, 256, codec.options, (), hardware=True)
                found[name] = True
            except UsageError:
                found[name] = False
    return found


def _models(problems: list[str]) -> dict[str, Any]:
    try:
        statuses = {model.name: model.check() for model in shipped_models()}
    except DuovsrError as error:
        problems.append(str(error))
        return {}
    for name, files in statuses.items():
        problems += [f"model {name}: `{s.path.name}` is missing or altered" for s in files if not s.verified]
    return {name: {s.path.name: s.sha256 or "missing" for s in files} for name, files in statuses.items()}

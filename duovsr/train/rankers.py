"""Scorers by which the candidates of one LQ clip are ranked (paper section 7.2).

The paper's are LPIPS, MUSIQ and DOVER: here LPIPS and MUSIQ through `pyiqa` (non-commercial licence as of 0.1.16),
DOVER through its authors' package `dover` (installed from their repository), where a person has installed them and
names files of weights. The adapters were written after those sources, and tested only against fakes of the packages.
Nothing here downloads.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duovsr.errors import TrainError, UsageError
from duovsr.metrics import niqe, vmaf
from duovsr.metrics.fidelity import psnr_y, ssim_y
from duovsr.metrics.meter import FrameMeter, Meter, Pixels, Unmeasurable

OFFLINE = ("psnr", "ssim", "vmaf", "niqe:PATH", "detail", "steady")
LEARNED = ("lpips", "musiq", "dover")

_ALL = ", ".join((*OFFLINE, *(f"{name}:PATH" for name in LEARNED)))
_OFFLINE_HINT = f"or rank by {', '.join(OFFLINE)}"
_LPIPS_HEAD = "lin0.model.1.weight"  # of every LPIPS weights file, in pyiqa as in the authors' release
# ImageNet weights that a metric loads apart, whatever file is given, from the hub's `checkpoints`.
_TRUNKS = {"lpips": "alexnet-owt-7be5be79.pth", "dover": "convnext_tiny_1k_224_ema.pth"}
_QUANTISATION = 2e-5  # what rounding to 8 bits adds to `_high_band`

Score = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Ranker:
    """Judges a candidate; comparable only between candidates of the same clip. Names are unique in a run."""

    name: str
    higher_is_better: bool
    convention: str
    score: Score
    needs_truth: bool = True
    package: str = "duovsr"
    weights: str | None = None

    def __call__(self, output: Tensor, hq: Tensor) -> float:
        """Score of frames `output` given the truth `hq`, each (1, 3, T, H, W) in [-1, 1], float32, on any device.

        Raises `Unmeasurable` for a clip that is too small, short or flat, `TrainError` for output that is not finite.
        """
        assert output.shape == hq.shape and output.dim() == 5 and output.shape[:2] == (1, 3), (output.shape, hq.shape)
        if not output.isfinite().all():  # would pass unseen: 8-bit pixels have no NaN
            raise TrainError(f"a candidate that `{self.name}` was to judge is not finite")
        return self.score(*(frames.float().clamp(-1, 1) for frames in (output, hq)))  # as a file would hold them

    def describe(self) -> dict[str, object]:
        """What made the scores, for the record: plain values that JSON can hold."""
        return {
            "package": self.package,
            "version": _version(self.package),
            "direction": "higher is better" if self.higher_is_better else "lower is better",
            "needs_truth": self.needs_truth,
            "convention": self.convention,
            "weights": self.weights,
        }


def make_rankers(names: tuple[str, ...], device: torch.device) -> list[Ranker]:
    """The rankers called `names`, of `OFFLINE` or as `NAME:PATH` of `LEARNED`; `device` is where learned ones run.

    Bare `niqe` takes its parameters from the Hugging Face cache. Raises `UsageError` for unknown and repeated names and
    where a package or weights are missing, but `InputError` for NIQE's file and VMAF's package.
    """
    if not names:
        raise UsageError("no rankers", hint=f"use some of {_ALL}")
    if len({spec.partition(":")[0] for spec in names}) < len(names):
        raise UsageError(f"a ranker is given twice: `{', '.join(names)}`", hint="give each once")
    return [_make(spec, device) for spec in names]


def rank_sum(scores: list[dict[str, float]], rankers: list[Ranker]) -> list[float]:
    """For each candidate of one clip the sum of its ranks, 0 the best; ties share their mean rank. Lowest is best.

    `scores` are by ranker's name. Raises `TrainError` for one that is not finite.
    """
    sums = [0.0] * len(scores)
    for ranker in rankers:
        values = [candidate[ranker.name] for candidate in scores]
        if not all(math.isfinite(value) for value in values):
            raise TrainError(f"a score of `{ranker.name}` is not finite: {values}")
        costs = [-value if ranker.higher_is_better else value for value in values]
        for i, cost in enumerate(costs):
            sums[i] += sum(other < cost for other in costs) + (costs.count(cost) - 1) / 2
    return sums


def _make(spec: str, device: torch.device) -> Ranker:
    name, _, path = spec.partition(":")
    if name == "dover":
        return _dover(path, device)
    if name in LEARNED:
        return _learned(name, path, device)
    if name == "niqe":
        return _niqe(path)
    if spec == "vmaf":
        return _vmaf()
    if spec not in _PLAIN:
        raise UsageError(f"unknown ranker: `{spec}`", hint=f"use some of {_ALL}")
    return _PLAIN[spec]


def _pixels(frames: Tensor) -> Pixels:
    """Frames (1, 3, T, H, W) in [-1, 1] as 8-bit RGB (T, H, W, 3)."""
    levels = ((frames[0] + 1) * 127.5).round().byte()
    return levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def _metered(start: Callable[[int], Meter]) -> Score:
    """The mean of the meter that `start` gives for a number of frames."""

    def score(output: Tensor, hq: Tensor) -> float:
        judged, truth = _pixels(output), _pixels(hq)
        meter = start(len(judged))
        for frame, expected in zip(judged, truth, strict=True):
            meter.update(frame, expected)
        return meter.mean()

    return score


def _every(frames: int, usual: int) -> int:
    """A stride that measures four frames or more: the metrics' `usual` ones are for whole files."""
    return max(1, min(usual, frames // 4))


def _vmaf() -> Ranker:
    model = vmaf.load_model()
    score = _metered(lambda count: vmaf.VmafMeter(model, _every(count, vmaf.EVERY)))
    return Ranker("vmaf", True, f"0..100, {_SAMPLED}", score, package="vmaf-torch", weights="v0.6.1, of the package")


def _niqe(path: str) -> Ranker:
    if not path:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(niqe.HUB_REPO, niqe.HUB_FILE)
        if not isinstance(cached, str):
            raise UsageError("ranker `niqe` would download its parameters", hint="give its .npz or .mat as `niqe:PATH`")
        path = cached
    parameters = niqe.load_parameters(Path(path))
    score = _metered(lambda n: FrameMeter(lambda frame, _: niqe.niqe(frame, parameters), _every(n, niqe.EVERY)))
    return Ranker("niqe", False, _SAMPLED, score, needs_truth=False, weights=f"{path}, sha256 {parameters.sha256}")


def _detail(output: Tensor, hq: Tensor) -> float:
    return -abs(math.log((_high_band(output) + _QUANTISATION) / (_high_band(hq) + _QUANTISATION)))


def _high_band(frames: Tensor) -> float:
    """Mean squared difference of neighbouring pixels, along rows and columns, summed."""
    return sum(frames.diff(dim=axis).square().mean().item() for axis in (3, 4))


def _steady(output: Tensor, hq: Tensor) -> float:
    if output.shape[2] < 2:
        raise Unmeasurable("ranker `steady` needs clips of two frames or more")
    return -(output.diff(dim=2).abs() - hq.diff(dim=2).abs()).abs().mean().item()


_SAMPLED = "of 8-bit frames, mean over four of them or more"
_LUMA = "of BT.601 luma of 8-bit frames, mean over frames"
_PLAIN = {
    "psnr": Ranker("psnr", True, f"dB, {_LUMA}", _metered(lambda _: FrameMeter(psnr_y))),
    "ssim": Ranker("ssim", True, f"at most 1, {_LUMA}", _metered(lambda _: FrameMeter(ssim_y))),
    "detail": Ranker("detail", True, "minus |log(energy / truth's)| of neighbouring pixels' differences", _detail),
    "steady": Ranker("steady", True, "minus mean | |next - this| - |truth's next - this| |, in [-1, 1]", _steady),
}


def _learned(name: str, path: str, device: torch.device) -> Ranker:
    """`pyiqa`'s metric, on frames as a batch of pictures (T, 3, H, W) in [0, 1]; the mean over frames."""
    try:
        pyiqa = importlib.import_module("pyiqa")
    except ImportError as error:  # also for what it needs
        raise UsageError(f"ranker `{name}` needs pyiqa: {error}", hint=f"install it, {_OFFLINE_HINT}") from error
    if name not in pyiqa.list_models():
        raise UsageError(f"this pyiqa has no metric `{name}`", hint=f"leave it out, {_OFFLINE_HINT}")
    weights = _check_weights(name, path)
    try:
        metric: Any = pyiqa.create_metric(name, device=device, pretrained_model_path=path)
    except RuntimeError as error:  # `load_state_dict`
        reason = str(error).partition("\n")[0]
        raise UsageError(f"pyiqa cannot load `{name}:{path}`: {reason}", hint=_OFFLINE_HINT) from error
    needs_truth: bool = metric.metric_mode == "FR"

    @torch.no_grad()  # also because older releases leave autograd switched off
    def score(output: Tensor, hq: Tensor) -> float:
        clips = (output, hq) if needs_truth else (output,)
        scores: Tensor = metric(*((clip[0].transpose(0, 1).to(device) + 1) / 2 for clip in clips))
        return scores.double().mean().item()

    return Ranker(name, not metric.lower_better, "mean over frames", score, needs_truth, "pyiqa", weights)


# Of DOVER's released `dover.yml`: its networks, the two views of a clip, and how its two scores become one.
_DOVER_MODEL: dict[str, Any] = {
    "backbone": {
        "technical": {"type": "swin_tiny_grpb", "checkpoint": True, "pretrained": None},
        "aesthetic": {"type": "conv_tiny"},
    },
    "backbone_preserve_keys": "technical,aesthetic",
    "divide_head": True,
    "vqa_head": {"in_channels": 768, "hidden_channels": 64},
}
_DOVER_VIEWS: dict[str, dict[str, int]] = {
    "technical": {"fragments_h": 7, "fragments_w": 7, "fsize_h": 32, "fsize_w": 32, "aligned": 32},
    "aesthetic": {"size_h": 224, "size_w": 224},
}
_DOVER_FUSION = {"technical": (0.1107, 0.07355, 0.6104), "aesthetic": (-0.08285, 0.03774, 0.3896)}  # mean, sd, weight
_DOVER_FRAMES = 32


def _dover(path: str, device: torch.device) -> Ranker:
    """DOVER's fused quality in 0..1. Clips shorter than its 32 frames are run back and forth."""
    try:
        models, datasets = (importlib.import_module(f"dover.{part}") for part in ("models", "datasets"))
    except ImportError as error:
        hint = f"install its authors' package, {_OFFLINE_HINT}"
        raise UsageError(f"ranker `dover` needs the package `dover`: {error}", hint=hint) from error
    weights = _check_weights("dover", path)
    model = models.DOVER(**_DOVER_MODEL).to(device).eval()
    try:
        model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"not weights of `dover`: `{path}` ({reason})", hint=_OFFLINE_HINT) from error
    mean, deviation = (torch.tensor(v).view(3, 1, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))

    @torch.no_grad()
    def score(output: Tensor, hq: Tensor) -> float:
        clip = (output[0].cpu() + 1) * 127.5
        clip = torch.cat([clip, clip.flip(1)] * math.ceil(_DOVER_FRAMES / clip.shape[1]), dim=1)[:, :_DOVER_FRAMES]
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the technical view's fragments lie at random: the same for every candidate
            views = {name: datasets.get_single_view(clip, name, **view) for name, view in _DOVER_VIEWS.items()}
        results = model({name: ((view - mean) / deviation)[None].to(device) for name, view in views.items()})
        parts = zip(results, (_DOVER_FUSION[name] for name in _DOVER_VIEWS), strict=True)
        fused = sum((r.mean().item() - mean) / deviation * weight for r, (mean, deviation, weight) in parts)
        return 1 / (1 + math.exp(-fused))

    return Ranker("dover", True, "fused quality, 0..1", score, False, "dover", weights)


def _check_weights(name: str, path: str) -> str:
    """Where the metric's weights come from, in words. Raises `UsageError` unless they are all on this machine."""
    if not path:
        raise UsageError(f"ranker `{name}` would download its weights", hint=f"give `{name}:PATH`, {_OFFLINE_HINT}")
    try:  # before pyiqa does, which unpickles whatever the file holds
        state = torch.load(path, map_location="cpu", weights_only=True)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UsageError(f"cannot read weights: `{path}`", hint=f"give those of `{name}`, {_OFFLINE_HINT}") from error
    # pyiqa skips what it does not find of LPIPS: the head would stay random.
    if not isinstance(state, dict) or (name == "lpips" and _LPIPS_HEAD not in state):
        raise UsageError(f"not weights of `{name}`: `{path}`", hint=f"give its own, {_OFFLINE_HINT}")
    if name not in _TRUNKS:
        return f"{path}, sha256 {digest}"
    trunk = Path(torch.hub.get_dir()) / "checkpoints" / _TRUNKS[name]
    if not trunk.is_file():
        raise UsageError(f"ranker `{name}` would download `{trunk}`", hint=f"put it there, {_OFFLINE_HINT}")
    return f"{path}, sha256 {digest}; {trunk}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from its source tree
        return "unknown"

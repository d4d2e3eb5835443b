"""Measure upscaled clips against the truth, or against the LQ clips that they were made from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from duovsr.errors import DuovsrError, InputError, UsageError
from duovsr.metrics import niqe, vmaf
from duovsr.metrics.fidelity import PSNR_CAP, psnr_rgb, psnr_y, ssim_y
from duovsr.metrics.meter import FrameMeter, Meter, Pixels, Unmeasurable, resized
from duovsr.metrics.pairs import ClipPair, pair_clips
from duovsr.metrics.report import ClipScores, ReferenceKind, Report
from duovsr.metrics.warping import DisFlow, WarpingMeter
from duovsr.video.container import counted
from duovsr.video.reader import Frame, VideoReader

_PACKAGES = ("duovsr", "torch", "numpy", "av", "opencv-python-headless", "opencv-python", "vmaf-torch", "scipy")


class _Tools:
    """What meters share between clips, each loaded once, on first use. Raises `Unmeasurable` where one is missing."""

    def __init__(self, niqe_parameters: Path | None) -> None:
        self._niqe_path = niqe_parameters

    @cached_property
    def niqe(self) -> niqe.NiqeParameters:
        return niqe.load_parameters(self._niqe_path)

    @cached_property
    def vmaf(self) -> Any:
        return vmaf.load_model()

    @cached_property
    def flow(self) -> DisFlow:
        return DisFlow()


@dataclass(frozen=True)
class Metric:
    """A metric's definition in words, and how to begin measuring a clip with it."""

    convention: str
    start: Callable[[_Tools], Meter]


def _niqe_meter(tools: _Tools) -> Meter:
    parameters = tools.niqe  # now, not at the first frame: a missing file is known before any clip is read
    return FrameMeter(lambda output, _: niqe.niqe(output, parameters), niqe.EVERY)


_PSNR = f"dB, peak 255, mean of the frames' values, equal frames count {PSNR_CAP:g}"
_LUMA = "BT.601 luma (16..235, unrounded) of 8-bit RGB"
_NIQE = Metric(
    f"NIQE, published parameters, 96x96 blocks, {_LUMA} rounded, half size by 2x2 means, every {niqe.EVERY}th frame",
    _niqe_meter,
)
_EWARP = (
    "x 1000; mean squared RGB difference in [0, 1] to the next frame warped here (bilinear), matches inside the frame,"
    " forward-backward occlusion mask (0.01, 0.5), OpenCV DIS flow (medium)"
)

REF_METRICS: dict[str, Metric] = {
    "psnr_y": Metric(f"{_PSNR}; {_LUMA}, no border crop", lambda _: FrameMeter(psnr_y)),
    "psnr_rgb": Metric(f"{_PSNR}; 8-bit RGB, no border crop", lambda _: FrameMeter(psnr_rgb)),
    "ssim_y": Metric(f"Gaussian window 11, sigma 1.5, wholly inside the frame; {_LUMA}", lambda _: FrameMeter(ssim_y)),
    "vmaf": Metric(
        f"VMAF v0.6.1 by vmaf-torch, clipped to 0..100, every {vmaf.EVERY}th frame as if it were the clip; {_LUMA}",
        lambda tools: vmaf.VmafMeter(tools.vmaf),
    ),
    "niqe": _NIQE,
    "ewarp_dis": Metric(_EWARP, lambda tools: WarpingMeter(tools.flow)),
}

LQ_METRICS: dict[str, Metric] = {
    "consistency_psnr_y": Metric(
        f"{_PSNR}; {_LUMA}, between the output brought to the LQ size (antialiased bicubic) and the LQ",
        lambda _: FrameMeter(lambda output, lq: psnr_y(resized(output, lq.shape[:2]), lq)),
    ),
    "niqe": _NIQE,
    "ewarp_dis_lq": Metric(_EWARP, lambda tools: WarpingMeter(tools.flow)),
}

_FLOW_SOURCES: dict[ReferenceKind, str] = {"ref": "the truth", "lq": "the LQ, bicubic at the output's size"}


def evaluate(
    output: Path,
    *,
    ref: Path | None = None,
    lq: Path | None = None,
    niqe_parameters: Path | None = None,
    metrics: Collection[str] | None = None,
    on_clip: Callable[[ClipScores], None] | None = None,
) -> Report:
    """Measure the clip or folder of clips `output` against `ref` (the truth) or `lq` (what it was made from).

    Folders are paired by name (see `pair_clips`). `metrics` are names of `REF_METRICS` or `LQ_METRICS`, None for all.
    Without `niqe_parameters` they come from the Hugging Face hub. `on_clip` hears of each clip when it is done. Memory
    does not grow with a clip's length.

    A metric that a missing package, or a clip too small or too short, leaves without a value is in `skipped` with the
    reason; a clip that cannot be read, or differs in size or length from its reference, is in `failed`. Raises
    `UsageError` for arguments that do not fit, `InputError` for clips without partner, and where none can be measured.
    """
    kind: ReferenceKind = "ref" if ref is not None else "lq"
    reference = ref if ref is not None else lq
    if reference is None or (ref is not None and lq is not None):
        raise UsageError("one reference is needed", hint="use either `--ref` or `--lq`")
    selected = _select(REF_METRICS if kind == "ref" else LQ_METRICS, metrics)
    pairs = pair_clips(output, reference)
    failed: dict[str, InputError] = {}
    for pair in pairs:  # before the network is asked for anything
        with _noted(failed, pair):
            _check(pair, kind)
    _check_some_left(pairs, failed)
    tools = _Tools(niqe_parameters)
    usable, skipped = _usable(selected, tools)

    clips: list[ClipScores] = []
    for pair in (pair for pair in pairs if str(pair.output) not in failed):
        with _noted(failed, pair):
            clips.append(_measure(pair, kind, {name: metric.start(tools) for name, metric in usable.items()}))
            if on_clip is not None:
                on_clip(clips[-1])
    _check_some_left(pairs, failed)
    for clip in clips:
        for name, reason in clip.skipped.items():
            skipped.setdefault(name, f"`{clip.output}`: {reason}")
    return Report(
        kind=kind,
        clips=tuple(clips),
        means={name: fmean(clip.scores[name] for clip in clips) for name in usable if name not in skipped},
        skipped=skipped,
        failed={name: _sentence(error) for name, error in failed.items()},
        conventions={name: metric.convention for name, metric in selected.items()},
        versions=_versions(),
        flow_source=_FLOW_SOURCES[kind] if usable.keys() & {"ewarp_dis", "ewarp_dis_lq"} else None,
        niqe_parameters_sha256=tools.niqe.sha256 if "niqe" in usable else None,
    )


@contextmanager
def _noted(failed: dict[str, InputError], pair: ClipPair) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        failed[str(pair.output)] = error


def _check_some_left(pairs: Collection[ClipPair], failed: dict[str, InputError]) -> None:
    if len(failed) == len(pairs):
        raise next(iter(failed.values()))


def _check(pair: ClipPair, kind: ReferenceKind) -> None:
    with VideoReader(pair.output) as output, VideoReader(pair.reference) as reference:
        _check_sizes(pair, kind, output, reference)


def _select(available: dict[str, Metric], names: Collection[str] | None) -> dict[str, Metric]:
    unknown = sorted(set(names or ()) - available.keys())
    if unknown:
        raise UsageError(f"unknown metric: `{unknown[0]}`", hint=f"use some of {', '.join(available)}")
    return {name: metric for name, metric in available.items() if names is None or name in names}


def _usable(selected: dict[str, Metric], tools: _Tools) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that this installation can compute, and why it cannot the others."""
    usable, skipped = {}, {}
    for name, metric in selected.items():
        try:
            metric.start(tools)
        except Unmeasurable as reason:
            skipped[name] = _sentence(reason)
        else:
            usable[name] = metric
    return usable, skipped


def _measure(pair: ClipPair, kind: ReferenceKind, meters: dict[str, Meter]) -> ClipScores:
    """Feeds the two clips frame by frame to `meters`; one that cannot measure them drops out with its reason."""
    skipped: dict[str, str] = {}
    scores: dict[str, float] = {}
    frames = 0
    with VideoReader(pair.output) as output, VideoReader(pair.reference) as reference:
        _check_sizes(pair, kind, output, reference)
        for judged, expected in _lock_step(pair, output, reference):
            frames += 1
            for name in meters.keys() - skipped.keys():
                try:
                    meters[name].update(judged, expected)
                except Unmeasurable as reason:
                    skipped[name] = _sentence(reason)
        if frames == 0:
            raise InputError(f"no frames in `{pair.output}`")
        notices = tuple(
            type(notice)(f"`{reader.info.path}`: {notice}")
            for reader in (output, reference)
            for notice in reader.notices
        )
        for name in [name for name in meters if name not in skipped]:
            try:
                scores[name] = meters[name].mean()
            except Unmeasurable as reason:
                skipped[name] = _sentence(reason)
        width, height = output.info.width, output.info.height
    return ClipScores(pair.name, str(pair.output), str(pair.reference), width, height, frames, scores, skipped, notices)


def _check_sizes(pair: ClipPair, kind: ReferenceKind, output: VideoReader, reference: VideoReader) -> None:
    (width, height), (w, h) = ((reader.info.width, reader.info.height) for reader in (output, reference))
    if kind == "ref" and (width, height) != (w, h):
        raise InputError(f"the sizes differ: `{pair.output}` is {width}x{height}, `{pair.reference}` is {w}x{h}")
    if kind == "lq" and (width < w or height < h):
        raise InputError(f"`{pair.output}`, {width}x{height}, is smaller than its LQ `{pair.reference}`, {w}x{h}")


def _lock_step(pair: ClipPair, output: VideoReader, reference: VideoReader) -> Iterator[tuple[Pixels, Pixels]]:
    """Frames of both clips, one pair at a time. Raises `InputError` when one ends before the other."""
    judged: Frame | None
    expected: Frame | None
    for count, (judged, expected) in enumerate(zip_longest(output, reference)):
        if judged is None or expected is None:
            short, long = (pair.output, pair.reference) if judged is None else (pair.reference, pair.output)
            raise InputError(f"`{short}` ends after {counted(count, 'frame')}, but `{long}` goes on")
        yield _to_8_bit(judged.pixels), _to_8_bit(expected.pixels)


def _to_8_bit(pixels: np.ndarray) -> Pixels:
    """The metrics are defined on 8-bit RGB; deeper clips come as 16-bit values of full scale."""
    return pixels if pixels.dtype == np.uint8 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _sentence(error: DuovsrError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # an extra that is not installed, or duovsr run from its source tree
            continue
    return versions

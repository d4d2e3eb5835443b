"""From HQ to LQ: RealBasicVSR's random chain of two orders (the paper's choice, section 4.1).

    unsharp -> blur -> resize -> noise -> JPEG -> codec
            -> blur -> resize -> noise -> JPEG -> {codec, resize to the LQ's size -> sinc} in either order -> 8 bits

`draw_recipe` decides, from a generator alone, what happens to a clip; `degrade` does it on the CPU with real codecs,
`degradation_batched` to many clips on any device. Defaults are those of RealBasicVSR's training configuration
(realbasicvsr_wogan_c64b20_2x30x8_lr1e-4_300k_reds.py) where not marked as ours.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Generator, Tensor

from duovsr.errors import UsageError
from duovsr.train.checks import check, check_choice, check_parts, check_ranges, check_weights
from duovsr.train.degradation_ops import (
    Blur,
    Codec,
    Jpeg,
    Kernel,
    Noise,
    Operator,
    Quantise,
    Recipe,
    Resize,
    Unsharp,
    apply,
)

FAMILIES = ("iso", "aniso", "generalised_iso", "generalised_aniso", "plateau_iso", "plateau_aniso", "sinc")
MODES = ("bilinear", "area", "bicubic")
CODECS = ("libx264", "h264", "mpeg4")
THIRDS = (1.0, 1.0, 1.0)
PAPER_SIDE = 64  # of RealBasicVSR's LQ, which its bit rates belong to
_LEAST = 0.01  # of what is divided by


@dataclass(frozen=True)
class Ranges:
    """How strong one pass through the operators is."""

    blur_sigma: tuple[float, float]
    noise_sigma: tuple[float, float]  # of 255
    poisson_scale: tuple[float, float]
    jpeg_quality: tuple[int, int] = (30, 95)
    bitrate: tuple[int, int] = (10_000, 100_000)  # bits a frame of a clip whose LQ has 64x64 pixels
    crf: tuple[int, int] = (18, 34)  # ours
    mpeg4_quantiser: tuple[int, int] = (2, 16)  # ours: in place of a CRF, 2 to 31

    def __post_init__(self) -> None:
        check_ranges(self, _LEAST, math.inf, "blur_sigma")
        check_ranges(self, 0, math.inf, "noise_sigma", "poisson_scale")
        check_ranges(self, 1, 100, "jpeg_quality")
        check_ranges(self, 1, math.inf, "bitrate")
        check_ranges(self, 0, 51, "crf")
        check_ranges(self, 2, 31, "mpeg4_quantiser")


@dataclass(frozen=True)
class ResizeRanges:
    """Weights of up, down and keep, and the bounds of the scale; up draws from [1, high], down from [low, 1]."""

    directions: tuple[float, float, float]
    scale: tuple[float, float]

    def __post_init__(self) -> None:
        check_weights(self, "directions")
        low, high = self.scale
        check(0 < low <= 1 <= high < math.inf, "scale", self.scale, "a number up to 1, and one from 1 on")


@dataclass(frozen=True)
class Steps:
    """Bounds of the random walk that parameters do from frame to frame, within their ranges."""

    sigma: float = 0.02
    angle: float = 0.31416
    beta_gaussian: float = 0.05
    beta_plateau: float = 0.1
    omega: float = 0.0628
    noise_sigma: float = 0.1
    poisson_scale: float = 0.005

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check(0 <= value < math.inf, name, value, "a number, 0 or more")


@dataclass(frozen=True)
class DegradationConfig:
    """Every probability and range. Clips are `clean`, `mild` or go through the full chain.

    `clean` and `mild` are ours, because a model that has never seen clean input damages it. Clean: a blur matched to
    the scale or none, a resize, nothing else. Mild: one order, weak noise, high qualities, no unsharp mask.
    """

    clean: float = 0.3  # ours
    mild: float = 0.3  # ours
    clean_blur: float = 0.7  # ours
    antialias: float = 0.7  # ours, of clean and mild: OpenCV, RealBasicVSR's resize, does not; most other tools do
    # RealBasicVSR sharpens the chain's input, and its target in pixels too. Our target stays as it is, which with a
    # sharpened input would teach softening (ours).
    unsharp: bool = False
    first: Ranges = Ranges((0.2, 3.0), (1.0, 30.0), (0.05, 3.0))
    second: Ranges = Ranges((0.2, 1.5), (1.0, 25.0), (0.05, 2.5))
    mild_ranges: Ranges = Ranges(  # ours
        (0.2, 1.8), (0.3, 8.0), (0.02, 0.8), jpeg_quality=(74, 95), bitrate=(50_000, 100_000), crf=(18, 29),
        mpeg4_quantiser=(2, 6),
    )  # fmt: skip
    mild_jpeg: float = 0.7  # ours
    mild_codec: float = 0.7  # ours
    second_order: float = 1.0  # ours: the share of full-chain clips that have the second order
    first_resize: ResizeRanges = ResizeRanges((0.2, 0.7, 0.1), (0.15, 1.5))
    second_resize: ResizeRanges = ResizeRanges((0.3, 0.4, 0.3), (0.3, 1.2))
    second_blur: float = 0.8
    final_sinc: float = 0.8
    kernel_size: tuple[int, int] = (7, 21)  # odd
    kernel_families: tuple[float, ...] = (0.405, 0.225, 0.108, 0.027, 0.108, 0.027, 0.1)  # weights of FAMILIES
    beta_gaussian: tuple[float, float] = (0.5, 4.0)
    beta_plateau: tuple[float, float] = (1.0, 2.0)
    sinc_omega: tuple[float, float] = (math.pi / 3, math.pi)
    large_sinc_omega: tuple[float, float] = (math.pi / 5, math.pi)  # of kernels from 13 on, but for the final one
    poisson: float = 0.5
    gray_noise: float = 0.4
    codecs: tuple[float, ...] = THIRDS  # weights of CODECS
    # Ours, or "bitrate", RealBasicVSR's, whose rates hardly bind clips this short: mpeg4 writes the same 9 frames of
    # 64x48 at 2 as at 200 kbit a frame. A pass leaves a median of 37 dB with them, 31 dB with CRF (80 passes).
    codec_control: str = "crf"
    codec_surrogate: bool = False  # ours, read by `degrade_batch` alone
    # Off, only JPEG's quality walks, as in DOVE. RealBasicVSR also walks the resize; one size a clip is kept here.
    steps: bool = False
    step: Steps = Steps()
    jpeg_step: float = 3.0

    def __post_init__(self) -> None:
        check_parts(self, "clean", "mild", "clean_blur", "antialias", "mild_jpeg", "mild_codec", "second_order")
        check_parts(self, "second_blur", "final_sinc", "poisson", "gray_noise")
        check(self.clean + self.mild < 1 + 1e-9, "clean and mild", (self.clean, self.mild), "parts of one whole")
        low, high = self.kernel_size
        odd = 1 <= low <= high and low % 2 == high % 2 == 1
        check(odd, "kernel_size", self.kernel_size, "two rising odd numbers")
        check_weights(self, "kernel_families", "codecs")
        check_ranges(self, _LEAST, math.inf, "beta_gaussian", "beta_plateau")
        check_ranges(self, _LEAST, math.pi, "sinc_omega", "large_sinc_omega")
        check(0 <= self.jpeg_step < math.inf, "jpeg_step", self.jpeg_step, "a number, 0 or more")
        check_choice("codec_control", self.codec_control, ("bitrate", "crf"))
        if self.codec_surrogate and self.codec_control == "bitrate":
            raise UsageError("codec_surrogate cannot hold a bit rate", hint="set codec_control to `crf`")


def degrade(frames: Tensor, height: int, width: int, config: DegradationConfig, generator: Generator) -> Tensor:
    """HQ (T, 3, H, W) in [0, 1] -> LQ (T, 3, height, width), quantised to 8 bits, on the CPU.

    Raises TrainError where PyAV lacks a codec.
    """
    T, C, H, W = frames.shape
    for operator in draw_recipe(config, T, H, W, height, width, generator):
        frames = apply(operator, frames)
    return frames


def draw_recipe(
    config: DegradationConfig,
    frames_count: int,
    height_in: int,
    width_in: int,
    height_out: int,
    width_out: int,
    generator: Generator,
) -> Recipe:
    """The operators, in order, that take one HQ clip to its LQ."""
    draw = _Draw(config, frames_count, height_out, width_out, generator)
    kind = uniform(0, 1, generator)
    if kind < config.clean:
        return (*_clean(draw, width_in), Quantise())
    if kind < config.clean + config.mild:
        return (*_mild(draw), Quantise())
    return (*_chain(draw, height_in, width_in), Quantise())


def _clean(draw: _Draw, width_in: int) -> list[Operator]:
    operators: list[Operator] = []
    if draw.chance(draw.config.clean_blur):
        # What a camera or a studio downscale leaves: a blur matched to the scale, then decimation.
        sigma = uniform(0.3, 0.5, draw.generator) * width_in / draw.width_out
        size = min(2 * math.ceil(3 * sigma) + 1, draw.config.kernel_size[1])
        operators.append(Blur((Kernel("iso", size, sigma, sigma),) * draw.count))
    return [*operators, draw.final_resize(draw.config.antialias)]


def _mild(draw: _Draw) -> list[Operator]:
    ranges = draw.config.mild_ranges
    operators: list[Operator] = [draw.blur(ranges), draw.final_resize(draw.config.antialias), draw.noise(ranges)]
    if draw.chance(draw.config.mild_jpeg):
        operators.append(draw.jpeg(ranges))
    if draw.chance(draw.config.mild_codec):
        operators.append(draw.codec(ranges))
    return operators


def _chain(draw: _Draw, height: int, width: int) -> list[Operator]:
    config, first, second = draw.config, draw.config.first, draw.config.second
    operators: list[Operator] = [Unsharp()] if config.unsharp else []
    resize = draw.resize(height, width, config.first_resize)
    operators += [draw.blur(first), resize, draw.noise(first), draw.jpeg(first), draw.codec(first)]
    final: list[Operator] = [draw.final_resize(antialias=0.0)]
    if draw.chance(config.final_sinc):
        final.append(draw.final_blur())
    if not draw.chance(config.second_order):
        return operators + final
    if draw.chance(config.second_blur):
        operators.append(draw.blur(second))
    operators.append(draw.resize(resize.height, resize.width, config.second_resize))
    operators += [draw.noise(second), draw.jpeg(second)]
    codec: list[Operator] = [draw.codec(second)]
    return operators + (codec + final if draw.chance(0.5) else final + codec)


@dataclass(frozen=True)
class _Draw:
    """Draws operators for one clip."""

    config: DegradationConfig
    count: int
    height_out: int
    width_out: int
    generator: Generator

    def chance(self, probability: float) -> bool:
        return chance(probability, self.generator)

    def choose(self, options: tuple[str, ...], weights: tuple[float, ...]) -> str:
        return options[int(torch.multinomial(torch.tensor(weights), 1, generator=self.generator))]

    def integer(self, bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=self.generator))

    def walk(self, bounds: tuple[float, float], step: float) -> list[float]:
        """A value for each frame: uniform within the bounds, then steps of [-step, step] if `config.steps`."""
        values = [uniform(*bounds, self.generator)]
        for _ in range(self.count - 1):
            move = uniform(-step, step, self.generator) if self.config.steps else 0.0
            values.append(min(max(values[-1] + move, bounds[0]), bounds[1]))
        return values

    def blur(self, ranges: Ranges) -> Blur:
        config, step = self.config, self.config.step
        family = self.choose(FAMILIES, config.kernel_families)
        size = self._kernel_size()
        if family == "sinc":
            return self._sinc(size, config.sinc_omega if size < 13 else config.large_sinc_omega)
        x = self.walk(ranges.blur_sigma, step.sigma)
        y, angles, betas = x, [0.0] * self.count, [1.0] * self.count
        if family.endswith("aniso"):
            y = self.walk(ranges.blur_sigma, step.sigma)
            angles = self.walk((-math.pi, math.pi), step.angle)
        if family.startswith("generalised"):
            betas = self._betas(config.beta_gaussian, step.beta_gaussian)
        elif family.startswith("plateau"):
            betas = self._betas(config.beta_plateau, step.beta_plateau)
        return Blur(tuple(Kernel(family, size, *values) for values in zip(x, y, angles, betas, strict=True)))

    def _betas(self, bounds: tuple[float, float], step: float) -> list[float]:
        # RealBasicVSR hands the walked value b to a sampler of ranges as [b, b], which draws between b and 1, anew in
        # every frame.
        return [uniform(1.0, value, self.generator) for value in self.walk(bounds, step)]

    def final_blur(self) -> Blur:
        return self._sinc(self._kernel_size(), self.config.sinc_omega)

    def _sinc(self, size: int, omega: tuple[float, float]) -> Blur:
        omegas = self.walk(omega, self.config.step.omega)
        return Blur(tuple(Kernel("sinc", size, omega=value) for value in omegas))

    def _kernel_size(self) -> int:
        low, high = self.config.kernel_size
        return 2 * self.integer((low // 2, high // 2)) + 1

    def resize(self, height: int, width: int, ranges: ResizeRanges) -> Resize:
        direction = self.choose(("up", "down", "keep"), ranges.directions)
        bounds = {"up": (1.0, ranges.scale[1]), "down": (ranges.scale[0], 1.0), "keep": (1.0, 1.0)}[direction]
        scale = uniform(*bounds, self.generator)
        height, width = (max(2, 2 * int(side * scale / 2)) for side in (height, width))  # even, for the codecs
        return Resize(height, width, self.choose(MODES, THIRDS), antialias=False)

    def final_resize(self, antialias: float) -> Resize:
        mode = self.choose(MODES, THIRDS)
        return Resize(self.height_out, self.width_out, mode, mode != "area" and self.chance(antialias))

    def noise(self, ranges: Ranges) -> Noise:
        config = self.config
        if self.chance(config.poisson):
            kind, strengths = "poisson", self.walk(ranges.poisson_scale, config.step.poisson_scale)
        else:
            kind, strengths = "gaussian", self.walk(ranges.noise_sigma, config.step.noise_sigma)
        return Noise(kind, tuple(strengths), self.chance(config.gray_noise), self.integer((0, 2**62)))

    def jpeg(self, ranges: Ranges) -> Jpeg:
        low, high = ranges.jpeg_quality
        qualities = [round(uniform(low, high, self.generator))]
        for _ in range(self.count - 1):
            move = uniform(-self.config.jpeg_step, self.config.jpeg_step, self.generator)
            qualities.append(round(min(max(qualities[-1] + move, low), high)))
        return Jpeg(tuple(qualities))

    def codec(self, ranges: Ranges) -> Codec:
        name = self.choose(CODECS, self.config.codecs)
        if self.config.codec_control == "bitrate":
            # Ours: per pixel of the LQ as in RealBasicVSR, whose LQ always has 64x64. x264 counts in thousands.
            scale = self.height_out * self.width_out / PAPER_SIDE**2
            return Codec(name, "bitrate", max(1000, round(self.integer(ranges.bitrate) * scale)))
        if name == "mpeg4":
            return Codec(name, "qscale", self.integer(ranges.mpeg4_quantiser))
        return Codec(name, "crf", self.integer(ranges.crf))


def uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def chance(probability: float, generator: Generator) -> bool:
    return uniform(0, 1, generator) < probability

"""The operators of the degradation: each a small frozen value, and what it does to frames.

Frames are (N, 3, H, W) float; values may leave [0, 1] between operators, as they do in RealBasicVSR, until `quantise`.
All but `jpeg` and `codec`, which run the real codecs (Pillow, PyAV) on the CPU, work on any device.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import av
import numpy as np
import torch
from av.codec.codec import UnknownCodecError
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from duovsr.errors import TrainError
from duovsr.video.color import LIMITED, SMPTE170M, ColorTags, FrameToRgb, RgbToFrame

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in JPEG and in OpenCV's conversion to gray
_CODED = ColorTags(SMPTE170M, SMPTE170M, SMPTE170M, LIMITED)


@dataclass(frozen=True)
class Kernel:
    """A square blur kernel. `family` is one of degradation.FAMILIES; `sinc` reads `omega`, the others the rest."""

    family: str
    size: int  # odd
    sigma_x: float = 1.0
    sigma_y: float = 1.0
    angle: float = 0.0  # radians from x to y
    beta: float = 1.0
    omega: float = math.pi  # cutoff, radians a pixel


@dataclass(frozen=True)
class Unsharp:
    pass


@dataclass(frozen=True)
class Blur:
    kernels: tuple[Kernel, ...]  # one a frame, all of one size


@dataclass(frozen=True)
class Resize:
    height: int
    width: int
    mode: str  # area, bilinear or bicubic
    antialias: bool


@dataclass(frozen=True)
class Noise:
    kind: str  # gaussian or poisson
    strengths: tuple[float, ...]  # one a frame: deviation of 255, or scale of the shot noise
    gray: bool
    seed: int


@dataclass(frozen=True)
class Jpeg:
    qualities: tuple[int, ...]  # one a frame


@dataclass(frozen=True)
class Codec:
    name: str  # FFmpeg's name of the encoder
    control: str  # bitrate (bits a frame), crf, or qscale: the fixed quantiser of mpeg4, which has no CRF
    value: int


@dataclass(frozen=True)
class Quantise:
    pass


Operator = Unsharp | Blur | Resize | Noise | Jpeg | Codec | Quantise
Recipe = tuple[Operator, ...]


def apply(operator: Operator, frames: Tensor) -> Tensor:
    """One operator on the frames of one clip (T, 3, H, W) on the CPU."""
    match operator:
        case Unsharp():
            return unsharp(frames)
        case Blur(kernels):
            return blur(frames, torch.stack([kernel_weights(kernel) for kernel in kernels]))
        case Resize(height, width, mode, antialias):
            return resize(frames, height, width, mode, antialias)
        case Noise():
            return add_noise(frames, operator)
        case Jpeg(qualities):
            return jpeg(frames, qualities)
        case Codec():
            return codec(frames, operator)
        case Quantise():
            return quantise(frames)


@lru_cache(maxsize=256)  # most clips keep one kernel for all frames
def kernel_weights(kernel: Kernel) -> Tensor:
    """The kernel as (size, size) float32 that sums to 1.

    Gaussians are exp(-0.5 d^beta) and plateaus 1 / (d^beta + 1), with d the squared Mahalanobis distance. `sinc` is the
    circular low-pass omega J1(omega r) / (2 pi r): ringing, as sharpeners and codecs leave it.
    """
    axis = torch.arange(kernel.size, dtype=torch.float64) - kernel.size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    if kernel.family == "sinc":
        r = torch.sqrt(x.square() + y.square())
        weights = kernel.omega * torch.special.bessel_j1(kernel.omega * r) / (2 * math.pi * r)
        weights[kernel.size // 2, kernel.size // 2] = kernel.omega**2 / (4 * math.pi)
    else:
        u = (math.cos(kernel.angle) * x + math.sin(kernel.angle) * y) / kernel.sigma_x
        v = (math.cos(kernel.angle) * y - math.sin(kernel.angle) * x) / kernel.sigma_y
        distance = (u.square() + v.square()).pow(kernel.beta)
        weights = 1 / (distance + 1) if kernel.family.startswith("plateau") else torch.exp(-0.5 * distance)
    return (weights / weights.sum()).float()


def blur(frames: Tensor, weights: Tensor) -> Tensor:
    """Correlate every channel of frame n (N, 3, H, W) with its kernel (N, k, k), k odd; reflected at the border."""
    pad = weights.shape[-1] // 2
    for axis in (2, 3):
        frames = frames.index_select(axis, _reflected(frames.shape[axis], pad).to(frames.device))
    # Frames as the groups of one convolution: depthwise, ten times faster on a CPU than a single channel at a time.
    return F.conv2d(frames.transpose(0, 1), weights[:, None], groups=len(weights)).transpose(0, 1)


def _reflected(size: int, pad: int) -> Tensor:
    """Indices of a padded side, reflected without the border pixel (OpenCV's reflect-101), again where it is short."""
    last = max(size - 1, 1)
    index = (torch.arange(-pad, size + pad) + last).remainder(2 * last)
    return (index - last).abs().clamp(max=size - 1)


def unsharp(frames: Tensor) -> Tensor:
    """RealBasicVSR's unsharp mask (kernel 51, weight 0.5, threshold 10 of 255): [0, 1] -> [0, 1]."""
    weight, threshold = 0.5, 10 / 255
    rows, columns = (_unsharp_matrix(side).to(frames) for side in frames.shape[2:])
    residue = frames - rows @ frames @ columns.T
    mask = rows @ (residue.abs() > threshold).to(frames) @ columns.T
    return frames + mask * ((frames + weight * residue).clamp(0, 1) - frames)


@lru_cache(maxsize=16)
def _unsharp_matrix(side: int) -> Tensor:
    """(side, side): the mask's Gaussian with its reflected border. A matrix, because 51 taps are slow on a CPU."""
    size = 51
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8  # OpenCV's rule for sigma 0
    line = torch.exp(-0.5 * ((torch.arange(size) - size // 2) / sigma).square())
    taps = _reflected(side, size // 2).unfold(0, size, 1)
    return torch.zeros(side, side).scatter_add_(1, taps, (line / line.sum()).expand(side, size))


def resize(frames: Tensor, height: int, width: int, mode: str, antialias: bool) -> Tensor:
    """As OpenCV resizes where `antialias` is off; `area` has none."""
    if mode != "area":
        return F.interpolate(frames, (height, width), mode=mode, align_corners=False, antialias=antialias)
    # Not F.interpolate's area: where the ratio is not whole, that averages whole pixels, some of them twice.
    rows, columns = (_coverage(*sides).to(frames) for sides in zip(frames.shape[2:], (height, width), strict=True))
    return rows @ frames @ columns.T


def _coverage(size: int, target: int) -> Tensor:
    """(target, size): the part of each target pixel's extent that each source pixel covers."""
    edges = torch.arange(target + 1, dtype=torch.float64) * size / target
    source = torch.arange(size)
    overlap = torch.minimum(edges[1:, None], source + 1) - torch.maximum(edges[:-1, None], source)
    return overlap.clamp(min=0) * target / size


def add_noise(frames: Tensor, noise: Noise) -> Tensor:
    """Noise drawn on the frames' device from its own seed, new in every frame; gray noise is equal in all channels.

    Poisson is (poisson(x v) / v - x) scaled, with v the number of levels in the frame, raised to a power of 2. x is in
    [0, 1], as in the RealBasicVSR of the paper; mmagic 1.x has it in [0, 255], which leaves hardly any noise.
    """
    generator = Generator(frames.device).manual_seed(noise.seed)
    strengths = torch.tensor(noise.strengths).to(frames)[:, None, None, None]
    if noise.kind == "gaussian":
        shape = (len(frames), 1 if noise.gray else 3, *frames.shape[2:])
        return frames + strengths / 255 * torch.randn(shape, generator=generator, device=frames.device)
    clean = quantise(gray(frames) if noise.gray else frames)
    seen = torch.zeros(len(frames), 256, device=frames.device)
    seen.scatter_(1, (clean.flatten(1) * 255).round().long(), 1.0)
    levels = torch.exp2(seen.sum(1).log2().ceil())[:, None, None, None]
    return frames + strengths * (torch.poisson(clean * levels, generator=generator) / levels - clean)


def gray(frames: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)"""
    return (frames * torch.tensor(LUMA).to(frames)[:, None, None]).sum(1, keepdim=True)


def quantise(frames: Tensor) -> Tensor:
    """Clamped to [0, 1] and rounded to 8 bits."""
    return (frames.clamp(0, 1) * 255).round() / 255


def jpeg(frames: Tensor, qualities: tuple[int, ...]) -> Tensor:
    """Encode and decode every frame (N, 3, H, W) with Pillow at its quality; 4:2:0."""
    return torch.stack([_jpeg_image(frame, quality) for frame, quality in zip(frames, qualities, strict=True)])


def _jpeg_image(frame: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(_to_uint8(frame)).save(buffer, "jpeg", quality=quality)
    return _from_uint8(np.array(Image.open(buffer)))


def codec(frames: Tensor, settings: Codec) -> Tensor:
    """Encode and decode one clip (T, 3, H, W) as 4:2:0 in mp4. Odd sides are padded for the codec and cropped back.

    Raises TrainError where this build of PyAV lacks the encoder.
    """
    T, C, H, W = frames.shape
    padded = F.pad(frames, (0, W % 2, 0, H % 2), mode="replicate")
    # Without macroblock-tree rate control: with it, x264's output differs from run to run on short small clips.
    options = {"threads": "1"} if settings.name == "mpeg4" else {"threads": "1", "x264-params": "mbtree=0"}
    if settings.control == "crf":
        options["crf"] = str(settings.value)
    elif settings.control == "qscale":
        options |= {"qmin": str(settings.value), "qmax": str(settings.value)}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        try:
            # One frame a second gives each frame the whole bit rate; x264's CRF is known at usual rates.
            rate = 1 if settings.control == "bitrate" else 25
            stream = cast(av.VideoStream, container.add_stream(settings.name, rate=rate, options=options))
        except UnknownCodecError as error:
            hint = "install PyAV from PyPI, or leave the codec out with `--set degradation.codecs=1,1,0`"
            raise TrainError(f"this build of PyAV has no encoder `{settings.name}`", hint=hint) from error
        stream.height, stream.width, stream.pix_fmt = padded.shape[2], padded.shape[3], "yuv420p"
        if settings.control == "bitrate":
            stream.bit_rate = settings.value
        # As clips are read and written: swscale's quicker ways darken by 1 of 255, which a model would learn to undo.
        to_frame, to_rgb = RgbToFrame(_CODED, "yuv420p"), FrameToRgb(_CODED, 8)
        for frame in padded:
            container.mux(stream.encode(to_frame(_to_uint8(frame))))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, "r") as encoded:
        decoded = [to_rgb(frame) for frame in encoded.decode(video=0)]
    assert len(decoded) == T
    return torch.stack([_from_uint8(frame) for frame in decoded])[:, :, :H, :W]


def _to_uint8(frame: Tensor) -> np.ndarray:
    return (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _from_uint8(frame: np.ndarray) -> Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 255

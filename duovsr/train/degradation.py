"""From HQ to LQ: RealBasicVSR's chain of operators (paper section 4.1), one draw of parameters a clip.

blur -> resize -> noise -> JPEG -> video codec, each with a probability; JPEG (Pillow) and H.264 (PyAV) are the real
codecs. Frames are (T, 3, H, W) float32 in [0, 1]; every function draws from the given generator alone.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import av
import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class DegradationConfig:
    """Probabilities and ranges. RealBasicVSR's where not marked; `clean` and `mild` are ours: a model that has never
    seen clean input damages it."""

    clean: float = 0.3  # ours: blur or none, resize, nothing else
    mild: float = 0.3  # ours: as the full chain, with a third of its noise and high qualities
    blur_sigma: tuple[float, float] = (0.2, 3.0)
    noise_sigma: tuple[float, float] = (1.0, 25.0)  # of 255
    poisson_scale: tuple[float, float] = (0.05, 2.5)
    gray_noise: float = 0.4
    jpeg_quality: tuple[int, int] = (30, 95)
    codec_crf: tuple[int, int] = (18, 34)  # ours: CRF, because RealBasicVSR's bit rates suit 64x64 clips only


def uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def chance(probability: float, generator: Generator) -> bool:
    return torch.rand((), generator=generator).item() < probability


def degrade(frames: Tensor, height: int, width: int, config: DegradationConfig, generator: Generator) -> Tensor:
    """HQ (T, 3, H, W) in [0, 1] -> LQ (T, 3, height, width), quantised to 8 bits."""
    kind = torch.rand((), generator=generator).item()
    if kind < config.clean:
        if chance(0.7, generator):
            # What a camera or a studio downscale leaves: a blur matched to the scale, then decimation.
            sigma = uniform(0.3, 0.5, generator) * frames.shape[-1] / width
            frames = blur(frames, gaussian_kernel(sigma, sigma, 0.0))
        return _quantise(_resize_any(frames, height, width, generator))
    mild = kind < config.clean + config.mild
    weight = 0.33 if mild else 1.0
    frames = blur(frames, random_kernel(config.blur_sigma[0], config.blur_sigma[1] * max(weight, 0.6), generator))
    if not mild and chance(0.3, generator):  # through an intermediate size, as the second order of RealBasicVSR
        factor = uniform(0.5, 1.2, generator)
        middle = [max(height, round(side * factor / 2) * 2) for side in frames.shape[2:]]
        frames = _resize_any(frames, middle[0], middle[1], generator)
        frames = add_random_noise(frames, 0.4, config, generator)
    frames = _resize_any(frames, height, width, generator)
    frames = add_random_noise(frames, weight, config, generator)
    low, high = config.jpeg_quality
    if chance(0.7, generator):
        frames = jpeg(frames, round(uniform(low + (high - low) * (1 - weight), high, generator)))
    if chance(0.7, generator):
        low, high = config.codec_crf
        frames = h264(_quantise(frames), round(uniform(low, high - 8 * (1 - weight), generator)))
    return _quantise(frames)


def _quantise(frames: Tensor) -> Tensor:
    return (frames.clamp(0, 1) * 255).round() / 255


def blur(frames: Tensor, kernel: Tensor) -> Tensor:
    """Correlate every channel with an odd square kernel, reflecting at the border."""
    pad = kernel.shape[-1] // 2
    padded = F.pad(frames, (pad, pad, pad, pad), mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view_as(frames)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, dtype=torch.float32) - size // 2
    return axis[:, None].expand(size, size), axis.expand(size, size)


def gaussian_kernel(sigma_x: float, sigma_y: float, angle: float, beta: float = 1.0, plateau: bool = False) -> Tensor:
    """exp(-0.5 r^beta), or 1 / (r^beta + 1) for `plateau`, with r the squared Mahalanobis distance; sums to 1."""
    size = min(21, 2 * math.ceil(3 * max(sigma_x, sigma_y)) + 1)
    y, x = _grid(size)
    u = (math.cos(angle) * x + math.sin(angle) * y) / sigma_x
    v = (-math.sin(angle) * x + math.cos(angle) * y) / sigma_y
    distance = (u.square() + v.square()).pow(beta)
    kernel = 1 / (distance + 1) if plateau else torch.exp(-0.5 * distance)
    return kernel / kernel.sum()


def sinc_kernel(omega: float, size: int) -> Tensor:
    """Circular low-pass omega J1(omega r) / (2 pi r): ringing, as sharpeners and codecs leave it; sums to 1."""
    y, x = _grid(size)
    r = torch.sqrt(x.square() + y.square())
    kernel = omega * torch.special.bessel_j1(omega * r) / (2 * math.pi * r)
    kernel[size // 2, size // 2] = omega**2 / (4 * math.pi)
    return kernel / kernel.sum()


def random_kernel(low: float, high: float, generator: Generator) -> Tensor:
    """One of RealBasicVSR's seven kernel families with its probabilities."""
    family = torch.rand((), generator=generator).item()
    if family < 0.1:
        size = 2 * int(uniform(3, 11, generator)) + 1
        return sinc_kernel(uniform(math.pi / 3, math.pi, generator), size)
    sigma_x = uniform(low, high, generator)
    isotropic = family < 0.1 + 0.405 + 0.108 + 0.108
    sigma_y = sigma_x if isotropic else uniform(low, high, generator)
    angle = 0.0 if isotropic else uniform(-math.pi, math.pi, generator)
    shape = torch.rand((), generator=generator).item()
    if shape < 0.7:
        return gaussian_kernel(sigma_x, sigma_y, angle)
    if shape < 0.85:
        return gaussian_kernel(sigma_x, sigma_y, angle, beta=uniform(0.5, 4, generator))
    return gaussian_kernel(sigma_x, sigma_y, angle, beta=uniform(1, 2, generator), plateau=True)


def _resize_any(frames: Tensor, height: int, width: int, generator: Generator) -> Tensor:
    """Area, bilinear or bicubic, a third each."""
    mode = ("area", "bilinear", "bicubic")[int(torch.randint(3, (), generator=generator))]
    if mode == "area":
        return F.interpolate(frames, (height, width), mode="area")
    antialias = chance(0.7, generator)  # OpenCV, used by RealBasicVSR, does not antialias; most other tools do
    return F.interpolate(frames, (height, width), mode=mode, align_corners=False, antialias=antialias)


def add_random_noise(frames: Tensor, weight: float, config: DegradationConfig, generator: Generator) -> Tensor:
    """Gaussian or Poisson noise, in colour or in gray, new in every frame; `weight` scales its strength."""
    gray = chance(config.gray_noise, generator)
    shape = (frames.shape[0], 1 if gray else 3, *frames.shape[2:])
    if chance(0.5, generator):
        sigma = weight * uniform(*config.noise_sigma, generator) / 255
        return frames + sigma * torch.randn(shape, generator=generator)
    scale = weight * uniform(*config.poisson_scale, generator)
    source = frames.mean(1, keepdim=True) if gray else frames
    source = source.clamp(0, 1)
    return frames + scale * (torch.poisson(source * 255, generator=generator) / 255 - source)


def jpeg(frames: Tensor, quality: int) -> Tensor:
    return torch.stack([_jpeg_image(frame, quality) for frame in frames])


def _jpeg_image(frame: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(_to_uint8(frame)).save(buffer, "jpeg", quality=quality)
    return _from_uint8(np.array(Image.open(buffer)))


def h264(frames: Tensor, crf: int) -> Tensor:
    """Encode and decode with libx264 as one mp4; sides must be even."""
    # Without macroblock-tree rate control: with it, x264's output differs from run to run on short small clips.
    options = {"crf": str(crf), "threads": "1", "x264-params": "mbtree=0"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_to_uint8(frame), format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, "r") as encoded:
        decoded = [frame.to_ndarray(format="rgb24") for frame in encoded.decode(video=0)]
    return torch.stack([_from_uint8(frame) for frame in decoded])


def _to_uint8(frame: Tensor) -> np.ndarray:
    return (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _from_uint8(frame: np.ndarray) -> Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 255

"""Every setting of duovsr as frozen dataclasses. Imports no torch, so that `duovsr --help` stays fast."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

from duovsr.errors import UsageError

PIPE = Path("-")  # as a source, standard input; as a target, standard output

ColorTransfer = Literal["wavelet", "adain", "none"]
COLOR_TRANSFERS: tuple[str, ...] = get_args(ColorTransfer)
Decoder = Literal["software", "nvdec"]
DECODERS: tuple[str, ...] = get_args(Decoder)
DTYPES: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16", "int8", "fp8")
VAES: tuple[str, ...] = ("wan", "tiny")

# Statistics of the latents, published with Wan2.1's VAE: the transformer sees (mu - mean) / std.
# fmt: off
WAN_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
WAN_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


@dataclass(frozen=True)
class WindowConfig:
    """Local attention: `height` x `width` tokens in space; in time the current and `past` earlier latent frames, or
    with `past` None all of a call's."""

    height: int
    width: int
    past: int | None


@dataclass(frozen=True)
class TransformerConfig:
    """The Wan2.1-shaped DiT (reference: Wan2.1 `model.py`; paper section 3.1). `window=None` is full 3D attention."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    latent_channels: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_length: int = 512
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    window: WindowConfig | None = None

    @property
    def in_channels(self) -> int:
        """Noisy latents first, LQ latents second."""
        return 2 * self.latent_channels

    @property
    def streams(self) -> bool:
        """Whether a call takes over the state of the call before; otherwise it looks at its own frames alone."""
        return self.window is not None and self.window.past is not None


@dataclass(frozen=True)
class TinyVAEConfig:
    """Widths of TinyVAE: `width_8` channels at 1/8 of the frame's resolution, `width_4` at 1/4."""

    latent_channels: int = 16
    encoder_width: int = 64
    width_8: int = 96
    width_4: int = 48
    latent_blocks: int = 2
    blocks_8: int = 3
    blocks_4: int = 2


@dataclass(frozen=True)
class WanVAEConfig:
    """Widths of the Wan2.1 VAE: `dim` x `multipliers` channels at 1/1, 1/2, 1/4 and 1/8 of the frame's size.

    The defaults are Wan2.1's. `temporal_downsample`: whether a halving in space also halves the frame rate.
    """

    dim: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = WAN_LATENT_MEAN
    latent_std: tuple[float, ...] = WAN_LATENT_STD

    @property
    def latent_channels(self) -> int:
        return len(self.latent_mean)

    @property
    def spatial_factor(self) -> int:
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_factor(self) -> int:
        return 2 ** sum(self.temporal_downsample)


@dataclass(frozen=True)
class Preset:
    """A model that `--model` can name.

    `shared_noise`: the part of its noise's variance that latents share. `learned_prompt`: its condition tokens are
    trained with it; otherwise they are stored states of a text encoder. `tiny_vae`: a light autoencoder that may be
    trained for the latents of `vae`.
    """

    name: str
    transformer: TransformerConfig
    vae: TinyVAEConfig | WanVAEConfig
    tiny_vae: TinyVAEConfig | None = None
    shared_noise: float = 0.0
    default_strength: float = 1.0
    default_color: ColorTransfer = "wavelet"
    learned_prompt: bool = True

    def with_vae(self, name: str | None) -> Preset:
        """With the autoencoder of this name, or its own. Raises UsageError where it can have no such one."""
        if name is not None and name not in VAES:
            raise UsageError(f"unknown autoencoder: `{name}`", hint=f"use {' or '.join(VAES)}")
        own = "wan" if isinstance(self.vae, WanVAEConfig) else "tiny"
        if name is None or name == own:
            return self
        if self.tiny_vae is None:
            raise UsageError(f"preset `{self.name}` has no autoencoder `{name}`", hint="leave out `--vae`")
        return replace(self, vae=self.tiny_vae)


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        name="tiny",
        transformer=TransformerConfig(
            dim=256,
            ffn_dim=768,
            heads=4,
            layers=6,
            text_dim=256,
            text_length=8,
            window=WindowConfig(height=8, width=8, past=1),
        ),
        vae=TinyVAEConfig(),
        shared_noise=0.8,
        default_color="none",  # its decoder adds to the LQ: a transfer has nothing to mend, and costs detail and time
    ),
    "1.3b": Preset(
        name="1.3b",
        transformer=TransformerConfig(dim=1536, ffn_dim=8960, heads=12, layers=30),
        vae=WanVAEConfig(),
        tiny_vae=TinyVAEConfig(),
        learned_prompt=False,
    ),
}


@dataclass(frozen=True)
class Position:
    """A place in a clip: a frame's number from 0, or seconds since the first frame."""

    seconds: Fraction | None = None
    frame: int | None = None

    @classmethod
    def parse(cls, text: str) -> Position:
        """`90`, `90.5`, `1:30.5` and `0:01:30` are times, `2250f` is a frame. Raises UsageError."""
        if re.fullmatch(r"\d{1,9}f", text):
            return cls(frame=int(text[:-1]))
        if not re.fullmatch(r"(\d{1,9}:){0,2}\d{1,9}(\.\d{1,9})?", text, re.ASCII):
            hint = "write seconds (90.5), hours:minutes:seconds (0:01:30.5) or a frame (2250f)"
            raise UsageError(f"unsupported position: `{text}`", hint=hint)
        parts = reversed(text.split(":"))
        return cls(seconds=sum((Fraction(part) * 60**i for i, part in enumerate(parts)), Fraction(0)))


@dataclass(frozen=True)
class UpscaleOptions:
    """What `upscale` is asked to do with one clip. `None`: chosen by the planner or by the source's properties."""

    scale: float = 4.0
    size: tuple[int, int] | None = None  # (width, height); overrides `scale`
    seed: int = 0
    strength: float | None = None  # 0 faithful .. 1 full detail; None: the preset's default
    chunk: int | None = None  # frames a model call
    overlap: int | None = None  # warm-up frames where a chunk cannot take over the state of the one before it
    tile: int | None = None  # output pixels a tile side; None: auto, 0: off
    color: ColorTransfer | None = None  # None: the preset's default
    codec: str | None = None
    crf: int | None = None
    pix_fmt: str | None = None
    encoder_options: tuple[tuple[str, str], ...] = ()  # the encoder's own settings, over duovsr's
    start: Position | None = None  # the first frame that is wanted
    end: Position | None = None  # the first frame that is not
    frame_rate: Fraction | None = None  # of a source without times of its own: an image sequence
    decoder: Decoder = "software"  # of H.264 and HEVC files
    audio: bool = True
    subtitles: bool = True
    deinterlace: bool = True
    scene_cuts: bool = True
    restart: bool = False  # discards an unfinished job at the target
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and 1 <= self.scale <= 4):
            raise UsageError(f"unsupported scale: `{self.scale:.15g}`", hint="use a value from 1 to 4")
        if self.size is not None and min(self.size) < 1:
            raise UsageError(f"unsupported size: `{self.size[0]}x{self.size[1]}`", hint="use `--size WIDTHxHEIGHT`")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"unsupported seed: `{self.seed}`", hint="use a whole number from 0 to 2^63 - 1")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UsageError(f"unsupported strength: `{self.strength:.15g}`", hint="use a value from 0 to 1")
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"unsupported chunk: `{self.chunk}`", hint="use a number of frames, 1 or more")
        if self.overlap is not None and self.overlap < 0:
            raise UsageError(f"unsupported overlap: `{self.overlap}`", hint="use a number of frames, 0 or more")
        if self.tile is not None and self.tile < 0:
            raise UsageError(f"unsupported tile: `{self.tile}`", hint="use a number of pixels, or 0 for whole frames")
        if self.color is not None and self.color not in COLOR_TRANSFERS:
            raise UsageError(f"unsupported color transfer: `{self.color}`", hint="use wavelet, adain or none")
        if self.decoder not in DECODERS:
            raise UsageError(f"unknown decoder: `{self.decoder}`", hint="use software or nvdec")
        if self.crf is not None and not 0 <= self.crf <= 63:
            raise UsageError(f"unsupported crf: `{self.crf}`", hint="use a whole number from 0 to 63")

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """Output (width, height) in pixels of a `width` x `height` source, to the pixel (DESIGN 1.1)."""
        if self.size is None:
            return math.floor(self.scale * width + 0.5), math.floor(self.scale * height + 0.5)
        out_width, out_height = self.size
        if not (width <= out_width <= 4 * width and height <= out_height <= 4 * height):
            raise UsageError(
                f"unsupported size: `{out_width}x{out_height}` for a {width}x{height} source",
                hint="each side may grow by a factor from 1 to 4",
            )
        return out_width, out_height


@dataclass(frozen=True)
class Progress:
    """A report to `on_progress`: frames done so far, of `total` where the container tells it."""

    done: int
    total: int | None

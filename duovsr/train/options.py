"""The settings of every training stage.

"paper" marks what the paper gives (sections 4.1 and 7); the rest is ours, with its source: starting values of the
methods that the stage is built from (DMD2, Flow-DPO, progressive distillation), or measured on `tiny`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from duovsr.errors import UsageError
from duovsr.train.checks import check, check_choice, check_parts, check_ranges, check_seed, check_weights
from duovsr.train.degradation import DegradationConfig

_ABOVE_ZERO = frozenset(
    "steps batch accumulate crop frames clip keep log_every save_every validate_every validation_samples learning_rate"
    " fake_rate head_rate discriminator_rate shift beta statistics_momentum faithful_every noise_every ssim_scales"
    " head_width pairs candidates samples side skip speed workers".split()
)
_BELOW_ONE = frozenset("beta1 beta2 ema prompt_dropout".split())


def _check_numbers(config: StageConfig | PoolConfig) -> None:
    """Every number is finite and not negative; some are more."""
    for name, value in ((each.name, getattr(config, each.name)) for each in fields(config)):
        if isinstance(value, bool | str) or not isinstance(value, int | float):
            continue
        positive, below = name in _ABOVE_ZERO, name in _BELOW_ONE
        wanted = "more than 0" if positive else "from 0 to below 1" if below else "0 or more"
        usable = math.isfinite(value) and value >= 0 and not (positive and value == 0) and not (below and value >= 1)
        check(usable, name, value, f"a number, {wanted}")


@dataclass(frozen=True)
class StageConfig:
    """What every stage has. Sizes are of the whole job: `batch` samples an update are split over devices and
    `accumulate` micro-batches, and the result depends on neither."""

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    crop: int = 160  # HQ pixels a side
    frames: int = 5  # 4k + 1
    learning_rate: float = 1e-4
    schedule: str = "cosine"  # to zero; or constant
    warmup: int = 100  # steps, or a tenth of the stage's (of a round's) where that is less
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    clip: float = 1.0  # of the gradient's norm
    ema: float = 0.999
    seed: int = 0
    dtype: str = "bfloat16"  # of activations; weights and optimiser stay float32
    device: str = "auto"
    checkpointing: bool = False  # recompute activations of the transformer's blocks in the backward pass
    threads: int = 0  # CPU threads; 0: torch's own choice
    log_every: int = 20
    save_every: int = 250
    keep: int = 3  # checkpoints
    validate_every: int = 250  # with a validation pool
    validation_samples: int = 16
    patience: int = 0  # validations without a better score before the run stops; 0: never

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.batch % self.accumulate:
            raise UsageError(f"batch `{self.batch}` does not divide into {self.accumulate} micro-batches")
        check(self.frames % 4 == 1, "frames", self.frames, "4k + 1, such as 5, 9 or 21")
        check(self.crop % 16 == 0, "crop", self.crop, "a multiple of 16")
        check_seed(self.seed)
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_choice("dtype", self.dtype, ("bfloat16", "float32"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class VAEConfig(StageConfig):
    """TinyVAE (ours: the paper leaves a task-specific autoencoder to future work)."""

    steps: int = 6000
    learning_rate: float = 3e-4  # at 1e-3 features die before the latents matter, see weights/HISTORY.md
    crop: int = 96
    weight_decay: float = 1e-4
    free_every: int = 4  # every so many updates decode without a latent; 0: none does
    log_every: int = 21  # no multiple of that, so that updates of both kinds are noted
    latent_noise: float = 0.2  # largest standard deviation of the noise on the unit-variance latent
    gradient_weight: float = 0.5
    temporal_weight: float = 0.3
    statistics_momentum: float = 0.01
    latent_weight: float = 1.0  # of the squared error against another autoencoder's latents, where they are its

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts(self, "statistics_momentum")


@dataclass(frozen=True)
class BaseConfig(StageConfig):
    """LQ-conditioned flow matching (paper section 3.1)."""

    steps: int = 3000
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    shift: float = 2.0
    prompt_dropout: float = 0.1
    sharpness: float = 0.0  # presets that learn their prompt: blurrier HQ (variance of the Laplacian) gets the null one


@dataclass(frozen=True)
class LatentsConfig(StageConfig):
    """Latents of `samples` random crops, kept on disk. `steps`, `batch` and the optimiser's settings are not used."""

    samples: int = 10_000


@dataclass(frozen=True)
class CFGConfig(StageConfig):
    """Stage I, guidance distillation (eq. 4)."""

    steps: int = 500  # paper
    guidance: float = 1.0  # w of eq. 4; the paper does not say (SeedVR2's teacher: 6.5)
    shift: float = 2.0


@dataclass(frozen=True)
class ProgressiveConfig(StageConfig):
    """Stage I, progressive distillation (eq. 5). `steps` is that of one round."""

    steps: int = 500  # paper
    start: int = 64  # the teacher's sampling steps; halved every round down to 1 (paper)
    shift: float = 2.0
    weighting: str = "velocity"  # |v - v*|^2; or `paper`, eq. 5 as printed: times (t - t'')^2

    def __post_init__(self) -> None:
        super().__post_init__()
        power_of_two = self.start >= 2 and self.start & (self.start - 1) == 0
        check(power_of_two, "start", self.start, "a power of two from 2 on")
        check_choice("weighting", self.weighting, ("velocity", "paper"))
        if self.patience:
            raise UsageError("progressive distillation cannot stop early: its rounds are of a length")

    @property
    def rounds(self) -> int:
        return self.start.bit_length() - 1


@dataclass(frozen=True)
class DualConfig(StageConfig):
    """Stage II, dual-stream distillation (eq. 6-8, Algorithm 1); `steps` counts student updates."""

    steps: int = 2000  # paper; it may mean all updates, see `count`
    count: str = "student"  # what `steps` counts: student, or all (auxiliary updates too)
    auxiliary: int = 3  # N, auxiliary updates for each student update (paper)
    learning_rate: float = 5e-5
    fake_rate: float = 1e-4
    head_rate: float = 1e-4
    beta1: float = 0.0
    beta2: float = 0.999
    ema: float = 0.99
    shift: float = 5.0
    sigma_range: tuple[float, float] = (0.02, 0.98)  # DMD2
    guidance: float = 0.0  # of the real score: 0 where it is guidance-distilled
    dmd_weight: float = 1.0  # paper
    gan_weight: float = 0.1  # paper
    matching_weight: float = 0.05  # paper
    streams: str = "joint"  # Table 4: joint, dmd, gan, or sequential (DMD, then from half of the steps on GAN)
    features: str = "both"  # Table 5: both, real, or fake
    discriminator_input: str = "noised"  # section 8: noised, or clean
    head_width: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("count", self.count, ("student", "all"))
        check_ranges(self, 0, 1, "sigma_range")
        check_choice("streams", self.streams, ("joint", "dmd", "gan", "sequential"))
        check_choice("features", self.features, ("both", "real", "fake"))
        check_choice("discriminator_input", self.discriminator_input, ("noised", "clean"))


@dataclass(frozen=True)
class PrefsConfig(StageConfig):
    """Stage III, preference pairs (section 7.2). `steps`, `batch` and the optimiser's settings are not used."""

    pairs: int = 2000  # paper
    candidates: int = 5  # paper
    rankers: tuple[str, ...] = ("ssim", "detail", "steady")  # need nothing more; paper: lpips, musiq, dover

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.candidates >= 2, "candidates", self.candidates, "2 or more: the best and the worst make a pair")


@dataclass(frozen=True)
class DPOConfig(StageConfig):
    """Stage III, flow DPO (eq. 9)."""

    steps: int = 1000  # paper
    learning_rate: float = 1e-5
    beta: float = 100.0  # Flow-GRPO's, with errors averaged over elements
    shift: float = 5.0  # timesteps: logit-normal, moved towards 1, where the student is called
    only_noise: bool = False  # t = 1 alone: linear in the output, stop early


@dataclass(frozen=True)
class RefineConfig(StageConfig):
    """Student and decoder together in pixels (ours)."""

    steps: int = 2400
    learning_rate: float = 5e-4
    batch: int = 3
    crop: int = 128
    discriminator_rate: float = 2e-4
    gradient_weight: float = 0.5
    psnr_weight: float = 0.0  # of a dB
    ssim_weight: float = 0.4
    ssim_scales: int = 1  # full size, half, and so on
    detail_weight: float = 0.0  # sharper, at a cost in PSNR and steadiness
    temporal_weight: float = 0.3
    adversarial_weight: float = 0.02
    adversarial_start: int = 1200  # step; pixels first: they are cheaper, and settle the decoder
    discriminator_lead: int = 200  # steps that the discriminator learns alone before
    noise_weight: float = 0.2  # holds what the noise does to what it did in the distilled student
    noise_every: int = 4  # steps
    faithful_weight: float = 0.3
    recycle: float = 0.0  # at the start, features this small beside their layer's mean begin anew; see `recycle`
    faithful_every: int = 4  # steps; the latent-free decode needs little and costs a fifth of a step

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.crop >> (self.ssim_scales - 1) >= 11  # the window of SSIM
        check(fits, "ssim_scales", self.ssim_scales, f"fewer, as a crop of {self.crop} is too small")


@dataclass(frozen=True)
class PoolConfig:
    """A pool of `samples` windows of `frames` x `side` x `side` HQ pixels with their LQ."""

    samples: int = 3000
    frames: int = 9
    side: int = 192
    seed: int = 0
    validation: bool = False  # from the held-out sources instead of the others
    live: bool = False  # HQ and scale only: the LQ is made anew for every batch
    stills: float = 0.55  # part of the samples made from stills by synthetic camera motion
    skip_frames: float = 0.3  # part of the clips' samples that show only every `skip`th frame, for faster motion
    skip: int = 2
    speed: float = 3.0  # of the fastest pan over a still, HQ pixels a frame; slow ones are more
    scale_weights: tuple[float, float, float, float] = (0.6, 0.12, 0.18, 0.1)  # of pool.SCALES
    degradation: DegradationConfig = DegradationConfig()
    workers: int = 1  # processes

    def __post_init__(self) -> None:
        _check_numbers(self)
        check(self.side % 24 == 0 < self.side, "side", self.side, "a multiple of 24, which keeps the LQ's sides even")
        check_seed(self.seed)
        check_parts(self, "stills", "skip_frames")
        check_weights(self, "scale_weights")


@dataclass(frozen=True)
class TuneConfig(RefineConfig):
    """A trained model adapted to somebody's own footage: a pool of it, and a short refinement."""

    steps: int = 600
    learning_rate: float = 2e-4
    adversarial_start: int = 100
    discriminator_lead: int = 100
    ema: float = 0.995
    samples: int = 300  # windows of the pool
    side: int = 192  # pixels of a window: smaller sources are skipped
    stills: float = 0.0  # part of the windows from photos

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.crop <= self.side, "crop", self.crop, f"at most the windows' side, {self.side}")
        self.windows()  # checks the rest

    def windows(self) -> PoolConfig:
        """The pool that the footage is cut into."""
        frames = max(PoolConfig.frames, self.frames)
        return PoolConfig(samples=self.samples, frames=frames, side=self.side, seed=self.seed, stills=self.stills)


@dataclass(frozen=True)
class ExportConfig:
    """Which weights are written: a run's, or those between it and another run of the same model (network
    interpolation, Wang et al., ESRGAN, section 3.4: between fidelity and detail)."""

    blend: str = ""  # the other run
    share: float = 0.0  # its part
    only: str = "both"  # what is blended: model, vae, or both; share=1 takes that of the other run
    tiny_vae: str = ""  # a run of stage `vae` on the model: its TinyVAE is written beside the model's autoencoder

    def __post_init__(self) -> None:
        check_parts(self, "share")
        check_choice("only", self.only, ("both", "model", "vae"))
        if bool(self.blend) != (self.share > 0):
            raise UsageError("`blend` and `share` go together", hint="add `--set blend=RUN` or `--set share=0.5`")
        if self.only != "both" and not self.blend:
            raise UsageError(
                "`only` says what is blended", hint="add `--set blend=RUN --set share=0.5`, or leave it out"
            )

"""The stages in order, with their settings: `tiny` from nothing, and what the paper gives (sections 4.1 and 7)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from duovsr.train.options import (
    BaseConfig,
    CFGConfig,
    DPOConfig,
    DualConfig,
    PrefsConfig,
    ProgressiveConfig,
    RefineConfig,
    StageConfig,
    VAEConfig,
)


@dataclass(frozen=True)
class Recipe:
    """Stages in order, for a preset."""

    preset: str
    stages: dict[str, StageConfig] = field(default_factory=dict)


_PAPER: dict[str, Any] = {
    "crop": 720,  # the paper does not say
    "frames": 21,
    "checkpointing": True,
    "beta2": 0.999,
    "schedule": "constant",
}

RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        "tiny",
        {
            "vae": VAEConfig(),
            "base": BaseConfig(sharpness=300.0),
            "cfg": CFGConfig(),
            "progressive": ProgressiveConfig(steps=150, start=64),
            "dual": DualConfig(steps=1000),
            "prefs": PrefsConfig(pairs=500),
            "dpo": DPOConfig(steps=300),
            "refine": RefineConfig(
                steps=5000,
                learning_rate=3e-4,
                batch=2,
                frames=9,
                ssim_weight=1.0,
                ssim_scales=3,
                temporal_weight=5.0,
                detail_weight=0.3,
                adversarial_weight=0.04,
                adversarial_start=2000,
            ),
        },
    ),
    "paper": Recipe(
        "1.3b",
        {
            "base": BaseConfig(steps=10_000, batch=64, learning_rate=1e-5, shift=5.0, **_PAPER),
            "cfg": CFGConfig(steps=500, batch=32, learning_rate=1e-6, guidance=4.0, shift=5.0, **_PAPER),
            "progressive": ProgressiveConfig(steps=500, batch=32, learning_rate=1e-6, shift=5.0, **_PAPER),
            "dual": DualConfig(
                steps=2000, batch=32, learning_rate=2e-6, fake_rate=2e-6, head_rate=2e-5, clip=10.0, **_PAPER
            ),
            "prefs": PrefsConfig(rankers=("lpips", "musiq", "dover"), **_PAPER),
            "dpo": DPOConfig(steps=1000, batch=32, learning_rate=1e-6, **_PAPER),
        },
    ),
}

"""What --dry-run promises, counted from the real modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from duovsr.model.transformer import Transformer
from duovsr.options import PRESETS
from duovsr.train.memory import activation_bytes, describe, forward_flops, plan
from duovsr.train.options import BaseConfig, DualConfig
from duovsr.train.recipes import RECIPES
from duovsr.train.stages import Job, resolve
from tests.conftest import SMALL


def test_the_dual_stage_of_the_paper_fits_eight_devices() -> None:
    planned = plan("dual", PRESETS["1.3b"], RECIPES["paper"].stages["dual"], devices=8)
    assert planned["parameters"]["diffusion_model"] == 1_419_095_104  # its prompts are stored, not trained
    assert planned["samples"] == 2000 * 4 * 32
    memory = planned["memory_gib_a_device"]
    assert memory["total"] == pytest.approx(
        sum(value for name, value in memory.items() if name not in ("total", "not_counted")), abs=0.02
    )
    assert memory["total"] < 80
    alone = plan("dual", PRESETS["1.3b"], RECIPES["paper"].stages["dual"], devices=1)["memory_gib_a_device"]
    assert alone["weights_gradients_optimizer_ema"] == pytest.approx(
        8 * memory["weights_gradients_optimizer_ema"], rel=0.01
    )


def test_heads_are_planned_as_wide_as_they_will_be() -> None:
    counts = [
        plan("dual", PRESETS["tiny"], config, devices=1)["parameters"]["heads"]
        for config in (DualConfig(), DualConfig(features="real"), DualConfig(head_width=64))
    ]
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("preset", ["tiny", "1.3b"])
def test_flops_are_those_that_torch_counts(preset: str) -> None:
    config = replace(PRESETS[preset].transformer, layers=2)
    stage = BaseConfig(crop=256, frames=9)
    with torch.device("meta"):
        model = Transformer(config)
        latents, text = torch.empty(1, 16, 3, 32, 32), torch.empty(1, config.text_length, config.text_dim)
        with FlopCounterMode(display=False) as counter:
            model(latents, latents, torch.empty(1), text)
    assert forward_flops(config, stage) == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_activations_are_those_that_autograd_keeps() -> None:
    """The estimate against the storage that a real backward pass would find, on the small preset without windows."""
    config = replace(SMALL.transformer, window=None, dim=64, ffn_dim=256, layers=3)
    stage = BaseConfig(crop=64, frames=5)
    model = Transformer(config).bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    latents, text = torch.randn(1, 16, 2, 8, 8).bfloat16(), torch.randn(1, 1, config.text_dim).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(latents, latents, torch.ones(1), text)[0]
    assert activation_bytes(config, stage) == pytest.approx(sum(kept.values()), rel=0.3)
    assert output.requires_grad
    assert activation_bytes(config, replace(stage, checkpointing=True)) < activation_bytes(config, stage)


def test_a_dry_run_describes_every_stage(tmp_path: Path) -> None:
    job = Job("recipe", tmp_path, name="paper")
    described = describe(job, resolve(job, []), devices=8)
    assert set(described) == set(RECIPES["paper"].stages)
    assert all(
        "total" in described[stage]["plan"]["memory_gib_a_device"] for stage in ("base", "cfg", "progressive", "dual")
    )
    assert described["progressive"]["plan"]["steps"] == 6 * 500

"""The networks: shapes of the paper's model, causality, streamed = whole, and the noise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from duovsr.model import flow
from duovsr.model.one_step import OneStepModel
from duovsr.model.resize import resize_frames
from duovsr.model.tiny_vae import shuffle, unshuffle
from duovsr.model.transformer import Transformer
from duovsr.options import PRESETS


def test_the_1_3b_preset_has_wans_parameters() -> None:
    with torch.device("meta"):
        transformer = Transformer(PRESETS["1.3b"].transformer)
    assert sum(p.numel() for p in transformer.parameters()) == 1_419_095_104
    assert len(transformer.state_dict()) == 825
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    assert shapes["patch_embedding.weight"] == (1536, 32, 1, 2, 2)
    assert shapes["blocks.29.ffn.0.weight"] == (8960, 1536)
    assert shapes["blocks.0.norm3.weight"] == (1536,)
    assert shapes["head.modulation"] == (1, 2, 1536)


def test_full_attention_runs_at_reduced_size() -> None:
    from dataclasses import replace

    config = replace(PRESETS["1.3b"].transformer, dim=48, ffn_dim=64, heads=2, layers=2, text_dim=16, text_length=8)
    transformer = Transformer(config).eval()
    latents = torch.randn(2, 16, 3, 6, 10)
    velocity, state = transformer(latents, latents, torch.tensor([1000.0, 20.0]), torch.randn(2, 5, 16))
    assert velocity.shape == latents.shape
    assert state is None


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_unshuffle_inverts_shuffle_and_keeps_pixels_apart(factor: int) -> None:
    x = torch.randn(2, 3, 2 * factor, 3 * factor)
    small = unshuffle(x, factor)
    assert small.shape == (2, 3 * factor**2, 2, 3)
    assert_close(shuffle(small, factor), x)
    assert_close(small[:, :3, 1, 2], x[:, :, factor, 2 * factor])


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cuts", [[0, 17], [0, 1, 5, 17], [0, 5, 9, 13, 17], [0, 13, 17]])
def test_streamed_equals_whole(small_model: OneStepModel, cuts: list[int], strength: float) -> None:
    torch.manual_seed(1)
    lq = torch.rand(1, 3, 17, 48, 80) * 2 - 1
    whole, _ = small_model.restore(lq, None, seed=3, scale=4, strength=strength)
    state, parts = None, []
    for start, end in pairwise(cuts):
        part, state = small_model.restore(lq[:, :, start:end], state, seed=3, scale=4, strength=strength)
        parts.append(part)
    assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
@torch.inference_mode()
def test_a_state_holds_nothing_else_alive(small_model: OneStepModel, strength: float) -> None:
    """It is held on the device, and saved with every piece of a job."""
    _, state = small_model.restore(torch.zeros(1, 3, 17, 32, 32), None, seed=0, scale=4, strength=strength)
    kept = [
        *state.encoder.memories,
        *(memory for part in (state.decoder, state.faithful) if part for memory in part.memories),
    ]
    if state.transformer is not None:
        kept += [*state.transformer.keys, *state.transformer.values]
    assert kept
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)


def test_the_future_does_not_change_the_past(small_model: OneStepModel) -> None:
    lq = torch.rand(1, 3, 13, 32, 32) * 2 - 1
    changed = lq.clone()
    changed[:, :, 9:] = 0
    first, _ = small_model.restore(lq, None, seed=0, scale=4)
    second, _ = small_model.restore(changed, None, seed=0, scale=4)
    assert_close(first[:, :, :9], second[:, :, :9])
    assert not torch.allclose(first[:, :, 9:], second[:, :, 9:])


def test_seeds_differ_and_repeat(small_model: OneStepModel) -> None:
    lq = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    first, again, other = (small_model.restore(lq, None, seed=seed, scale=4)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 1e-4


def test_noise_is_a_function_of_place_alone() -> None:
    whole = flow.noise(7, (4, 6, 10, 12), shared=0.5)
    assert torch.equal(flow.noise(7, (4, 2, 5, 3), origin=(3, 4, 8), shared=0.5), whole[:, :, 3:5, 4:9, 8:11])
    assert not torch.equal(flow.noise(8, (4, 6, 10, 12), shared=0.5), whole)
    high = flow.noise(7 + 2**40, (4, 6, 10, 12), shared=0.5)
    assert not torch.equal(high, whole), "the seed's upper half counts"


def test_noise_is_pinned() -> None:
    """A change of the generator changes every result that people have: it must be meant."""
    values = flow.noise(0, (1, 1, 1, 4)).flatten()
    assert_close(values, torch.tensor(PINNED_NOISE), rtol=0, atol=1e-6)


PINNED_NOISE = [-0.8574708, 0.9166533, 0.1901445, -1.1952877]


def test_noise_is_normal_and_uncorrelated() -> None:
    x = flow.noise(1, (16, 8, 64, 64))[0]
    assert abs(x.mean()) < 0.005
    assert abs(x.std() - 1) < 0.005
    assert abs((x**4).mean() - 3) < 0.05
    for axis in range(4):
        neighbour = (x.narrow(axis, 1, x.shape[axis] - 1) * x.narrow(axis, 0, x.shape[axis] - 1)).mean()
        assert abs(neighbour) < 0.01
    shared = flow.noise(1, (16, 8, 64, 64), shared=0.8)[0]
    assert abs(shared.std() - 1) < 0.01
    assert abs((shared[:, 1:] * shared[:, :-1]).mean() - 0.8) < 0.01


def test_flow_conversions_invert() -> None:
    x0, eps = torch.randn(2, 3, 4, 2, 5, 5)
    sigma = torch.tensor([0.1, 0.5, 1.0])
    noisy = flow.add_noise(x0, eps, sigma)
    assert_close(flow.x0_from_velocity(noisy, flow.velocity_target(x0, eps), sigma), x0)
    assert_close(flow.shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0.0, 0.75, 1.0]))


@pytest.mark.parametrize(("height", "width"), [(40, 60), (15, 21), (10, 28), (7, 5)])
def test_resize_is_the_one_call_of_torch(height: int, width: int) -> None:
    frames = torch.rand(2, 3, 2, 10, 14)
    flat = frames.transpose(1, 2).flatten(0, 1)
    expected = torch.nn.functional.interpolate(flat, (height, width), mode="bicubic", antialias=True)
    assert_close(resize_frames(frames, height, width).transpose(1, 2).flatten(0, 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (15, 21), (10, 14)])
def test_resize_keeps_constant_frames(height: int, width: int) -> None:
    frames = torch.full((1, 3, 2, 10, 14), 0.25)
    resized = resize_frames(frames, height, width)
    assert resized.shape == (1, 3, 2, height, width)
    assert_close(resized, torch.full_like(resized, 0.25))

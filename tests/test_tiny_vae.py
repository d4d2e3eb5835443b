"""TinyVAE at a scene's start, and models with it that compute in 8 bits."""

from __future__ import annotations

import copy
from copy import deepcopy
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from torch.testing import assert_close

from duovsr.kernels.int8 import is_int8_fast
from duovsr.model import tiny_vae
from duovsr.model.int8 import to_int8
from duovsr.model.one_step import OneStepModel
from duovsr.model.tiny_vae import TinyVAE

needs_int8 = pytest.mark.skipif(not is_int8_fast(), reason="a CPU without VNNI, or with AMX")


@pytest.fixture
def model(small_model: OneStepModel) -> OneStepModel:
    return copy.deepcopy(small_model)


def clip(frames: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(1, 3, frames, 48, 80) * 2 - 1


@torch.inference_mode()
def test_a_scene_starts_as_if_its_first_frame_had_stood_still(small_model: OneStepModel) -> None:
    vae, frames = small_model.vae, clip(5)
    assert isinstance(vae, TinyVAE)
    held, scale = torch.cat([frames[:, :, :1]] * 3 + [frames], dim=2).transpose(1, 2), torch.tensor([2.0])
    with patch.object(tiny_vae, "_whole_steps", side_effect=lambda x, memory: x):
        latents, memory = vae.encoder(held, None)
        expected, memories = vae.decoder(latents, held, None, scale)
    short, short_memory = vae.encoder(frames.transpose(1, 2), None)
    result, short_memories = vae.decoder(latents, frames.transpose(1, 2), None, scale)
    assert_close((short, short_memory), (latents, memory), rtol=0, atol=1e-5)
    assert_close((result, short_memories), (expected[:, 3:], memories), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_decoder_is_told_by_how_much_its_frames_were_enlarged(model: OneStepModel) -> None:
    vae, frames = model.vae, clip(5)
    assert isinstance(vae, TinyVAE)
    latents, _ = vae.encode(frames)
    deaf = deepcopy(vae)
    for told in (deaf.decoder.scale_8, deaf.decoder.scale_4):
        told.weight.zero_()
    untold = deaf.decode(latents, frames, scale=2.0)[0]
    results = {scale: vae.decode(latents, frames, scale=scale)[0] for scale in (1.0, 1.5, 2.0, 3.9, 4.0, 5.0)}
    assert torch.equal(results[4.0], untold) and torch.equal(results[5.0], untold)
    assert torch.equal(results[1.0], results[1.5]) and not torch.equal(results[1.5], results[2.0])
    assert 0 < (results[3.9] - untold).abs().max() < 0.1 * (results[2.0] - untold).abs().max()
    batch = vae.decode(latents.repeat(2, 1, 1, 1, 1), frames.repeat(2, 1, 1, 1, 1), scale=torch.tensor([4.0, 2.0]))[0]
    assert_close(batch, torch.cat([untold, results[2.0]]), rtol=0, atol=1e-6)


def test_weights_from_before_the_scale_was_told_are_taken(model: OneStepModel) -> None:
    vae = model.vae
    assert isinstance(vae, TinyVAE)
    vae.decoder.scale_8.weight.data.fill_(1)
    before = {name: value for name, value in vae.state_dict().items() if ".scale_" not in name}
    vae.load_state_dict(before)
    assert not vae.decoder.scale_8.weight.any()
    with torch.device("meta"):
        empty = TinyVAE(model.preset.vae)  # type: ignore[arg-type]
    empty.load_state_dict(before, assign=True)
    assert not any(value.is_meta for value in empty.state_dict().values())
    with pytest.raises(RuntimeError, match="Missing key"):
        vae.load_state_dict({})


@needs_int8
@torch.inference_mode()
def test_int8_is_close_and_leaves_its_inputs(model: OneStepModel) -> None:
    frames, plain = clip(9), copy.deepcopy(model)
    model = to_int8(model)
    assert model.fingerprint() != plain.fingerprint()
    kept = frames.clone()
    (latents, _), (exact, _) = model.encode(frames), plain.encode(frames)
    assert (latents - exact).square().mean().sqrt() < 0.05 * exact.std()
    (z, _), (exact_z, _) = (each.generate(exact, 0, (0, 0, 0)) for each in (model, plain))
    assert (z - exact_z).square().mean().sqrt() < 0.05 * exact_z.std()
    for given in (exact, None):
        (result, _), (wanted, _) = model.decode(given, frames, scale=4), plain.decode(given, frames, scale=4)
        assert (result - wanted).square().mean().sqrt() < 0.05 * (wanted - frames).square().mean().sqrt()
    assert torch.equal(exact, plain.encode(frames)[0])
    assert torch.equal(frames, kept)


@needs_int8
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cuts", [[0, 1, 5, 17], [0, 13, 17]])
def test_int8_streamed_equals_whole(model: OneStepModel, cuts: list[int], strength: float) -> None:
    model, frames = to_int8(model), clip(17)
    whole, _ = model.restore(frames, None, seed=3, scale=4, strength=strength)
    state, parts = None, []
    for start, end in pairwise(cuts):
        part, state = model.restore(frames[:, :, start:end], state, seed=3, scale=4, strength=strength)
        parts.append(part)
    difference = (torch.cat(parts, dim=2) - whole).abs()  # a float32 sum's last bit may move a value on its grid
    assert difference.mean() < 1e-5


@needs_int8
def test_int8_is_the_same_each_time(small_model: OneStepModel) -> None:
    models = [to_int8(copy.deepcopy(small_model)) for _ in range(2)]
    first, second = (model.restore(clip(5), None, seed=0, scale=4)[0] for model in models)
    assert torch.equal(first, second)

"""The Wan2.1 VAE: its exact size, streamed = whole, and equality with `diffusers` (itself, or its stored outputs)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import seeded
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from duovsr.model import wan_vae
from duovsr.model.key_maps import to_original
from duovsr.model.tiny_vae import VAEState
from duovsr.model.wan_vae import ChannelNorm, DoublingConv, WanVAE
from duovsr.options import WAN_LATENT_MEAN, WAN_LATENT_STD, WanVAEConfig

GOLDEN = Path(__file__).parent / "data" / "wan_vae.safetensors"  # save_file(diffusers_outputs(small), GOLDEN)
SMALL = WanVAEConfig(dim=8)


@pytest.fixture(scope="module")
def small() -> WanVAE:
    vae = WanVAE(SMALL)
    seeded.fill(vae)
    return vae


def clip(B: int, T: int, H: int, W: int) -> Tensor:
    return (0.5 * seeded.normal(99, B, 3, T, H, W)).clamp(-1, 1)


def in_parts(
    step: Callable[[Tensor, VAEState | None], tuple[Tensor, VAEState]], x: Tensor, cuts: list[int]
) -> tuple[Tensor, VAEState | None]:
    state, parts = None, []
    for start, end in pairwise(cuts):
        part, state = step(x[:, :, start:end], state)
        parts.append(part)
    return torch.cat(parts, dim=2), state


def test_it_has_wans_parameters() -> None:
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig())
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    assert sum(p.numel() for p in vae.encoder.parameters()) == 53_595_872
    assert sum(p.numel() for p in vae.decoder.parameters()) == 73_295_331
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert len(shapes) == 194
    assert shapes["encoder.downsamples.6.shortcut.weight"] == (384, 192, 1, 1, 1)
    assert shapes["encoder.downsamples.5.time_conv.weight"] == (192, 192, 3, 1, 1)
    assert shapes["encoder.downsamples.2.resample.1.bias"] == (96,)
    assert shapes["encoder.head.0.gamma"] == (384, 1, 1, 1)
    assert shapes["decoder.middle.1.to_qkv.weight"] == (1152, 384, 1, 1)
    assert shapes["decoder.middle.1.norm.gamma"] == (384, 1, 1)
    assert shapes["decoder.upsamples.4.residual.2.weight"] == (384, 192, 3, 3, 3)
    assert shapes["decoder.upsamples.7.time_conv.weight"] == (768, 384, 3, 1, 1)


@pytest.mark.parametrize("cuts", [[0, 1, 5, 9, 13, 17], [0, 1, 17], [0, 5, 17], [0, 13, 17]])
def test_streamed_equals_whole(small: WanVAE, cuts: list[int]) -> None:
    frames = clip(2, 17, 24, 40)
    latents, _ = small.encode(frames)
    assert latents.shape == (2, 16, 5, 3, 5) and latents.dtype == torch.float32
    streamed, _ = in_parts(small.encode, frames, cuts)
    assert_close(streamed, latents, rtol=0, atol=1e-5)

    decoded, _ = small.decode(latents)
    assert decoded.shape == frames.shape and decoded.dtype == torch.float32
    streamed, _ = in_parts(small.decode, latents, [(cut + 3) // 4 for cut in cuts])
    assert_close(streamed, decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
@pytest.mark.parametrize("T", [1, 5, 21])
def test_a_few_frames_at_a_time_equal_all(small: WanVAE, at_once: int, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = clip(1, T, 16, 24)
    latents, _ = small.encode(frames)
    decoded, _ = small.decode(latents)
    monkeypatch.setattr(small, "frames_at_once", at_once)
    assert_close(small.encode(frames)[0], latents, rtol=0, atol=1e-5)
    assert_close(small.decode(latents)[0], decoded, rtol=0, atol=1e-5)


def test_calls_may_differ_in_their_frames_at_a_time(small: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = clip(2, 25, 24, 16)
    latents, _ = small.encode(frames)
    decoded, _ = small.decode(latents)
    for sizes in ([1, 4, 2], [8, 1, 64], [2, 3, 1]):
        states: list[VAEState | None] = [None, None]
        for at_once, (start, end) in zip(sizes, pairwise([0, 9, 13, 25]), strict=True):
            monkeypatch.setattr(small, "frames_at_once", at_once)
            steps = slice((start + 3) // 4, (end + 3) // 4)
            part, states[0] = small.encode(frames[:, :, start:end], states[0])
            assert_close(part, latents[:, :, steps], rtol=0, atol=1e-5)
            part, states[1] = small.decode(latents[:, :, steps], states[1])
            assert_close(part, decoded[:, :, start:end], rtol=0, atol=1e-5)


def test_no_stage_takes_more_frames_than_it_may(small: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size `frames_at_once`, at half of it twice as many; and the two before them."""
    H, W, seen = 16, 24, dict[int, int]()

    def note(conv: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        level = (W // args[0].shape[4]).bit_length() - 1
        seen[level] = max(seen.get(level, 0), args[0].shape[2] - 2)

    causal = [m for m in small.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3)]
    hooks = [conv.register_forward_hook(note) for conv in causal]
    for at_once in (1, 2):
        monkeypatch.setattr(small, "frames_at_once", at_once)
        for step, x in ((small.encode, clip(1, 17, H, W)), (small.decode, seeded.normal(98, 1, 16, 5, H // 8, W // 8))):
            seen.clear()
            step(x)
            assert seen == {0: at_once, 1: 2 * at_once, 2: 2 * at_once, 3: 2 * at_once}
    for hook in hooks:
        hook.remove()


def test_a_call_leaves_the_state_that_it_was_given(small: WanVAE) -> None:
    frames, latents = clip(1, 9, 16, 16), seeded.normal(98, 1, 16, 3, 2, 2)
    _, encoder = small.encode(frames[:, :, :5])
    _, decoder = small.decode(latents[:, :, :2])
    for step, x, state in ((small.encode, frames[:, :, 5:], encoder), (small.decode, latents[:, :, 2:], decoder)):
        assert_close(step(x, state)[0], step(x, state)[0], rtol=0, atol=0)


def test_one_frame_is_a_clip(small: WanVAE) -> None:
    frames = clip(1, 5, 16, 16)
    image, _ = small.encode(frames[:, :, :1])
    latents, _ = small.encode(frames)
    assert_close(image, latents[:, :, :1], rtol=0, atol=1e-5)
    assert_close(small.decode(image)[0], small.decode(latents)[0][:, :, :1], rtol=0, atol=1e-5)


def test_the_first_halving_keeps_the_frame_rate() -> None:
    with pytest.raises(AssertionError, match="one at a time"):
        WanVAE(WanVAEConfig(dim=4, temporal_downsample=(True, True, False)))


@pytest.mark.parametrize(("frames", "started"), [(4, False), (6, False), (5, True)])
def test_a_frame_count_that_fits_no_latent_is_a_mistake(small: WanVAE, frames: int, started: bool) -> None:
    state = small.encode(clip(1, 1, 8, 8))[1] if started else None
    with pytest.raises(AssertionError, match=f"{frames} frames"):
        small.encode(clip(1, frames, 8, 8), state)


@pytest.mark.parametrize(("direction", "count"), [("encode", 24), ("decode", 32)])
def test_the_state_is_bounded_and_holds_nothing_else_alive(small: WanVAE, direction: str, count: int) -> None:
    x = clip(1, 17, 16, 16) if direction == "encode" else seeded.normal(98, 1, 16, 5, 2, 2)
    _, short = in_parts(getattr(small, direction), x, [0, 1])
    _, long = in_parts(getattr(small, direction), x, [0, 1, x.shape[2]])
    assert short is not None and long is not None
    assert len(short.memories) == len(long.memories) == count
    assert [memory.shape for memory in short.memories] == [memory.shape for memory in long.memories]
    for memory in long.memories:
        assert memory.untyped_storage().nbytes() == memory.numel() * memory.element_size()


@pytest.mark.parametrize(("B", "at_once"), [(1, 64), (2, 64), (1, 1)])
@pytest.mark.parametrize("cuts", [[0, 5, 9], [0, 1, 9]])
def test_no_layer_breaks_channels_last(
    small: WanVAE, B: int, at_once: int, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would cost two transposes a convolution on a GPU."""
    seen = []
    monkeypatch.setattr(small, "frames_at_once", at_once)

    def check(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        layout = torch.channels_last if output.dim() == 4 else torch.channels_last_3d
        seen.append(args[0].is_contiguous(memory_format=layout))
        return output.contiguous(memory_format=layout)  # as cuDNN does; some of torch's CPU kernels do not

    hooks = [m.register_forward_hook(check) for m in small.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    latents, _ = in_parts(small.encode, clip(B, 9, 16, 24), cuts)
    in_parts(small.decode, latents, [(cut + 3) // 4 for cut in cuts])
    for hook in hooks:
        hook.remove()
    assert len(seen) >= 2 * len(hooks) - 4  # the four convolutions in time do not see a lone first frame
    assert all(seen)


def test_bfloat16_stays_close(small: WanVAE) -> None:
    half = WanVAE(SMALL)
    half.load_state_dict(small.state_dict())
    half.bfloat16()
    frames = clip(1, 5, 16, 16)
    latents, _ = small.encode(frames)
    assert (half.encode(frames)[0] - latents).abs().max() < 0.05
    decoded, expected = half.decode(latents)[0], small.decode(latents)[0]
    assert decoded.dtype == torch.float32
    assert (decoded - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(("H", "W"), [(1, 1), (5, 7), (8, 6)])
def test_a_doubling_convolution_equals_that_of_the_enlarged_picture(H: int, W: int) -> None:
    layer, x = DoublingConv(12, 6, 3, padding=1), seeded.normal(97, 2, 12, H, W)
    seeded.fill(layer)
    enlarged = functional.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    assert_close(layer(x), functional.conv2d(enlarged, layer.weight, layer.bias, padding=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("most", [1, 300, 1000])
def test_attention_by_rows_is_attention(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan_vae, "MOST_SCORES", most)
    q, k, v = seeded.normal(96, 3, 1, 35, 16)
    weights = (q @ k.transpose(1, 2) / 4).softmax(-1)
    assert_close(wan_vae.attend(q, k, v), weights @ v, rtol=0, atol=1e-5)


def test_attention_writes_down_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    attention = functional.scaled_dot_product_attention
    monkeypatch.setattr(wan_vae, "MOST_SCORES", 300)
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda q, k, v: (rows.append(q.shape[2]), attention(q, k, v))[1]
    )
    wan_vae.attend(*seeded.normal(96, 3, 1, 35, 16))
    assert sum(rows) == 35
    assert max(rows) * 35 <= 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_keeps_zeros(dtype: torch.dtype) -> None:
    assert not ChannelNorm(4).to(dtype)(torch.zeros(1, 4, 1, 2, 2, dtype=dtype)).any()


def golden_frames() -> Tensor:
    return clip(1, 9, 16, 24)


def diffusers_outputs(vae: WanVAE) -> dict[str, Tensor]:
    """Latents of `golden_frames` and what they decode to, by `AutoencoderKLWan` with the weights of `vae`."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKLWan(base_dim=SMALL.dim, z_dim=16).requires_grad_(False).eval()
    original = to_original(theirs.state_dict())
    for name, tensor in vae.state_dict().items():
        original[name].copy_(tensor)  # in place: these are the parameters of `theirs`
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_LATENT_MEAN, WAN_LATENT_STD))
    latents = (theirs.encode(golden_frames()).latent_dist.mode() - mean) / std
    return {"latents": latents, "frames": theirs.decode(latents * std + mean).sample}


def assert_same_outputs(vae: WanVAE, expected: dict[str, Tensor]) -> None:
    latents, _ = vae.encode(golden_frames())
    assert_close(latents, expected["latents"], rtol=0, atol=1e-5)
    frames, _ = vae.decode(expected["latents"])
    assert frames.abs().lt(1).float().mean() > 0.9, "nearly all is clamped: nothing to compare"
    assert_close(frames.clamp(-1, 1), expected["frames"], rtol=0, atol=1e-5)


def test_it_equals_diffusers(small: WanVAE) -> None:
    expected = diffusers_outputs(small)
    assert_same_outputs(small, expected)
    for name, tensor in load_file(GOLDEN).items():
        assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_it_equals_the_stored_outputs_of_diffusers(small: WanVAE) -> None:
    assert_same_outputs(small, load_file(GOLDEN))


def test_the_latents_constants_are_diffusers_own() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        config = diffusers.AutoencoderKLWan().config
    assert tuple(config.latents_mean) == WAN_LATENT_MEAN
    assert tuple(config.latents_std) == WAN_LATENT_STD

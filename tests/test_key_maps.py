"""Checkpoints in both layouts: their names, their wrappings, and outputs equal to those of `diffusers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import seeded
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from duovsr.errors import InputError
from duovsr.model.key_maps import to_original, widen_patch_embedding
from duovsr.model.layers import timestep_embedding
from duovsr.model.transformer import Transformer
from duovsr.model.wan_vae import WanVAE
from duovsr.options import PRESETS, TransformerConfig, WanVAEConfig

GOLDEN = Path(__file__).parent / "data" / "wan_transformer.safetensors"  # save_file(diffusers_outputs(small), GOLDEN)
SMALL = TransformerConfig(dim=96, ffn_dim=160, heads=4, layers=3, freq_dim=64, text_dim=48, text_length=12)

TRANSFORMER_PAIRS = [  # (diffusers, original)
    ("patch_embedding.weight", "patch_embedding.weight"),
    ("condition_embedder.text_embedder.linear_2.bias", "text_embedding.2.bias"),
    ("condition_embedder.time_embedder.linear_1.weight", "time_embedding.0.weight"),
    ("condition_embedder.time_proj.weight", "time_projection.1.weight"),
    ("proj_out.bias", "head.head.bias"),
    ("scale_shift_table", "head.modulation"),
    ("blocks.0.attn1.to_q.weight", "blocks.0.self_attn.q.weight"),
    ("blocks.2.scale_shift_table", "blocks.2.modulation"),
    ("blocks.1.attn1.to_out.0.bias", "blocks.1.self_attn.o.bias"),
    ("blocks.1.attn2.norm_k.weight", "blocks.1.cross_attn.norm_k.weight"),
    ("blocks.1.norm2.weight", "blocks.1.norm3.weight"),
    ("blocks.1.ffn.net.0.proj.weight", "blocks.1.ffn.0.weight"),
    ("blocks.1.ffn.net.2.weight", "blocks.1.ffn.2.weight"),
]
VAE_PAIRS = [
    ("quant_conv.weight", "conv1.weight"),
    ("post_quant_conv.bias", "conv2.bias"),
    ("encoder.conv_in.weight", "encoder.conv1.weight"),
    ("decoder.norm_out.gamma", "decoder.head.0.gamma"),
    ("decoder.conv_out.bias", "decoder.head.2.bias"),
    ("encoder.mid_block.resnets.1.norm2.gamma", "encoder.middle.2.residual.3.gamma"),
    ("decoder.mid_block.attentions.0.to_qkv.weight", "decoder.middle.1.to_qkv.weight"),
    ("encoder.down_blocks.0.conv1.weight", "encoder.downsamples.0.residual.2.weight"),
    ("encoder.down_blocks.3.conv_shortcut.weight", "encoder.downsamples.3.shortcut.weight"),
    ("encoder.down_blocks.5.time_conv.bias", "encoder.downsamples.5.time_conv.bias"),
    ("encoder.down_blocks.8.resample.1.weight", "encoder.downsamples.8.resample.1.weight"),
    ("decoder.up_blocks.0.resnets.2.conv2.weight", "decoder.upsamples.2.residual.6.weight"),
    ("decoder.up_blocks.0.upsamplers.0.time_conv.weight", "decoder.upsamples.3.time_conv.weight"),
    ("decoder.up_blocks.1.resnets.0.conv_shortcut.weight", "decoder.upsamples.4.shortcut.weight"),
    ("decoder.up_blocks.2.upsamplers.0.resample.1.bias", "decoder.upsamples.11.resample.1.bias"),
    ("decoder.up_blocks.3.resnets.2.norm1.gamma", "decoder.upsamples.14.residual.0.gamma"),
]


def own_models() -> list[nn.Module]:
    with torch.device("meta"):
        return [
            Transformer(PRESETS["1.3b"].transformer),
            Transformer(PRESETS["tiny"].transformer),
            WanVAE(WanVAEConfig()),
        ]


def complete(pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """A state in diffusers' layout; `blocks.2` needs a `blocks.0` and a `blocks.1`, which the pairs have."""
    return {theirs: torch.tensor(float(i)) for i, (theirs, _) in enumerate(pairs)}


@pytest.mark.parametrize("pairs", [TRANSFORMER_PAIRS, VAE_PAIRS], ids=["transformer", "vae"])
def test_diffusers_names_become_original(pairs: list[tuple[str, str]]) -> None:
    state = to_original(complete(pairs))
    assert state == {ours: torch.tensor(float(i)) for i, (_, ours) in enumerate(pairs)}
    assert to_original(state) == state


@pytest.mark.parametrize("model", own_models(), ids=["1.3b", "tiny", "vae"])
def test_our_own_names_are_the_original_ones(model: nn.Module) -> None:
    state = model.state_dict()
    assert list(to_original(state).items()) == list(state.items())


@pytest.mark.parametrize(
    "prefix",
    ["model.", "module.", "diffusion_model.", "model.diffusion_model.", "_orig_mod.", "module._orig_mod.model."],
)
def test_prefixes_are_stripped(prefix: str) -> None:
    state = complete(TRANSFORMER_PAIRS)
    assert to_original({prefix + key: tensor for key, tensor in state.items()}) == to_original(state)


def test_wrappers_inside_names_are_stripped() -> None:
    state = {ours: torch.zeros(1) for _, ours in TRANSFORMER_PAIRS}
    wrapped = {
        f"_fsdp_wrapped_module.{key.replace('.self_attn', '._checkpoint_wrapped_module.self_attn')}": tensor
        for key, tensor in state.items()
    }
    assert to_original(wrapped).keys() == state.keys()


def test_nested_states_are_found_averaged_weights_first() -> None:
    old, new = complete(VAE_PAIRS), {key: tensor + 100 for key, tensor in complete(VAE_PAIRS).items()}
    assert to_original({"step": 7, "state_dict": new}) == to_original(new)
    assert to_original(
        {"optimizer": {}, "model": {"model." + key: tensor for key, tensor in new.items()}}
    ) == to_original(new)
    assert to_original({"generator": old, "critic": old, "generator_ema": {"model": new}}) == to_original(new)


@pytest.mark.parametrize(
    ("key", "pairs"),
    [
        ("blocks.0.attn1.add_k_proj.weight", TRANSFORMER_PAIRS),
        ("blocks.0.self_attn.q.weight", TRANSFORMER_PAIRS),  # the other layout's
        ("blocks.0.attn1.to_q.lora_A.weight", TRANSFORMER_PAIRS),
        ("blocks.0.attn1.to_q.weight_scale", TRANSFORMER_PAIRS),
        ("blocks.9.attn1.to_q.weight", TRANSFORMER_PAIRS),  # blocks 0 - 2 and 9
        ("decoder.up_blocks.3.upsamplers.0.resample.1.weight", VAE_PAIRS),
        ("encoder.conv1.weight", VAE_PAIRS),
    ],
)
def test_an_unknown_key_is_named(key: str, pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(InputError, match=f"unknown key in the checkpoint: `{key}`"):
        to_original(complete(pairs) | {key: torch.zeros(1)})


def test_what_is_no_checkpoint_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"neither a Wan2\.1 transformer nor a Wan2\.1 VAE: its first key is `fc\.weight`"
    ):
        to_original({"fc.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="neither a Wan2"):
        to_original({})
    with pytest.raises(InputError, match="not a tensor in the checkpoint: `step`"):
        to_original({**complete(VAE_PAIRS), "step": 3})
    with pytest.raises(InputError, match=r"key twice in the checkpoint, with and without a prefix: `model\.quant_conv"):
        to_original({**complete(VAE_PAIRS), "model.quant_conv.weight": torch.zeros(1)})


def test_widening_appends_zeros_for_the_lq_latents() -> None:
    weight = torch.randn(8, 16, 1, 2, 2)
    state = {"patch_embedding.weight": weight, "patch_embedding.bias": torch.ones(8)}
    widened = widen_patch_embedding(state, 32)
    assert widened.keys() == state.keys()
    assert torch.equal(widened["patch_embedding.weight"][:, :16], weight)
    assert widened["patch_embedding.weight"].shape == (8, 32, 1, 2, 2)
    assert not widened["patch_embedding.weight"][:, 16:].any()
    assert widen_patch_embedding(widened, 32)["patch_embedding.weight"] is widened["patch_embedding.weight"]
    assert state["patch_embedding.weight"] is weight


def test_a_widened_model_ignores_the_lq_latents(small: Transformer) -> None:
    config, state = small.config, small.state_dict()
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :16]
    widened = Transformer(config)
    widened.load_state_dict(widen_patch_embedding(state, config.in_channels))
    noisy, lq, timestep, text = inputs()
    assert_close(widened(noisy, lq, timestep, text)[0], widened(noisy, -lq, timestep, text)[0])


@pytest.mark.parametrize("channels", [36, 48, 33, 8])
def test_other_patch_embeddings_are_refused(channels: int) -> None:
    with pytest.raises(InputError, match=f"unsupported input channels of `patch_embedding.weight`: {channels}"):
        widen_patch_embedding({"patch_embedding.weight": torch.zeros(8, channels, 1, 2, 2)}, 32)
    with pytest.raises(InputError, match=r"it has no `patch_embedding\.weight`"):
        widen_patch_embedding({"conv1.weight": torch.zeros(8, channels, 1, 1, 1)}, 32)


@pytest.fixture(scope="module")
def small() -> Transformer:
    transformer = Transformer(SMALL)
    seeded.fill(transformer)
    return transformer


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    noisy, lq = seeded.normal(99, 2, 2, 16, 3, 4, 6)
    return noisy, lq, torch.tensor([1000.0, 321.5]), seeded.normal(98, 2, 5, SMALL.text_dim)


def diffusers_outputs(transformer: Transformer) -> dict[str, Tensor]:
    """The velocity of `inputs` by `WanTransformer3DModel` with the weights of `transformer`.

    Its timestep sinusoids are float32, off by up to 3e-5 at 1000; here it gets ours, float64 inside as Wan2.1's are.
    """
    diffusers = pytest.importorskip("diffusers")
    theirs: Any = diffusers.WanTransformer3DModel(
        num_attention_heads=SMALL.heads,
        attention_head_dim=SMALL.dim // SMALL.heads,
        in_channels=SMALL.in_channels,
        out_channels=SMALL.latent_channels,
        text_dim=SMALL.text_dim,
        freq_dim=SMALL.freq_dim,
        ffn_dim=SMALL.ffn_dim,
        num_layers=SMALL.layers,
    )
    theirs.requires_grad_(False).eval()
    original = to_original(theirs.state_dict())
    for name, tensor in transformer.state_dict().items():
        original[name].copy_(tensor)  # in place: these are the parameters of `theirs`
    noisy, lq, timestep, text = inputs()
    sinusoids = theirs.condition_embedder.timesteps_proj
    assert_close(sinusoids(timestep), timestep_embedding(timestep, SMALL.freq_dim), rtol=0, atol=5e-5)
    sinusoids.forward = lambda timestep: timestep_embedding(timestep, SMALL.freq_dim)
    padded = nn.functional.pad(text, (0, 0, 0, SMALL.text_length - text.shape[1]))
    return {"velocity": theirs(torch.cat([noisy, lq], dim=1), timestep, padded, return_dict=False)[0]}


def test_the_transformer_equals_diffusers(small: Transformer) -> None:
    expected = diffusers_outputs(small)["velocity"]
    assert_close(small(*inputs())[0], expected, rtol=0, atol=1e-5)
    assert_close(load_file(GOLDEN)["velocity"], expected, rtol=0, atol=1e-5)


def test_the_transformer_equals_the_stored_output_of_diffusers(small: Transformer) -> None:
    assert_close(small(*inputs())[0], load_file(GOLDEN)["velocity"], rtol=0, atol=1e-5)


def test_all_names_of_the_full_models_are_mapped() -> None:
    diffusers = pytest.importorskip("diffusers")
    config = PRESETS["1.3b"].transformer
    with torch.device("meta"):
        theirs = [
            diffusers.WanTransformer3DModel(
                num_attention_heads=config.heads,
                attention_head_dim=config.dim // config.heads,
                in_channels=config.in_channels,
                out_channels=config.latent_channels,
                ffn_dim=config.ffn_dim,
                num_layers=config.layers,
            ),
            diffusers.AutoencoderKLWan(),
        ]
        ours = [Transformer(config), WanVAE(WanVAEConfig())]
    for their_model, our_model in zip(theirs, ours, strict=True):
        found = {name: tensor.shape for name, tensor in to_original(their_model.state_dict()).items()}
        assert found == {name: tensor.shape for name, tensor in our_model.state_dict().items()}

"""Wan2.1's checkpoints as they are published: every layout loads the same, and training starts from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import seeded
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from duovsr.errors import InputError, UsageError
from duovsr.model import key_maps
from duovsr.model.transformer import Transformer
from duovsr.model.wan_vae import WanVAE
from duovsr.options import PRESETS, Preset, TransformerConfig, WanVAEConfig
from duovsr.repository import Model
from duovsr.train.options import ExportConfig
from duovsr.train.runs import load_weights
from duovsr.train.stages import Job, resolve, run_job
from duovsr.weights import is_text_to_video, load_transformer, load_wan_vae
from tests.conftest import write_pool

CPU = torch.device("cpu")
SMALL = Preset(
    name="1.3b",
    transformer=TransformerConfig(dim=32, ffn_dim=64, heads=2, layers=3, freq_dim=32, text_dim=16, text_length=4),
    vae=WanVAEConfig(dim=8),
    learned_prompt=False,
)
VAE = WanVAEConfig(dim=8)
FILE = "diffusion_pytorch_model.safetensors"
SHORT = "batch=2 crop=32 frames=5 dtype=float32 device=cpu steps=3 warmup=1 log_every=1 validation_samples=1".split()

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def text_to_video() -> State:
    """A transformer of 16 input channels, original names."""
    transformer = Transformer(SMALL.transformer)
    seeded.fill(transformer)
    state = transformer.state_dict()
    return {**state, "patch_embedding.weight": state["patch_embedding.weight"][:, :16].contiguous()}


@pytest.fixture(scope="module")
def vae() -> State:
    wan = WanVAE(VAE)
    seeded.fill(wan)
    return wan.state_dict()


def same(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def in_diffusers_layout(state: State, names: dict[str, str]) -> State:
    """`names`: the table {diffusers: original}."""
    theirs = {original: name for name, original in names.items()}

    def renamed(key: str) -> str:
        module, _, parameter = key.rpartition(".")
        return theirs[key] if key in theirs else f"{theirs[module]}.{parameter}"

    return {renamed(key): tensor for key, tensor in state.items()}


def write_original(folder: Path, transformer: State, vae: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(transformer, folder / FILE)
    torch.save(vae, folder / "Wan2.1_VAE.pth")


def write_diffusers(folder: Path, transformer: State, vae: State) -> None:
    """The transformer in two shards with their index."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "vae").mkdir()
    (folder / "model_index.json").write_text("{}")
    state = in_diffusers_layout(transformer, key_maps._transformer_names(SMALL.transformer.layers))
    places = {key: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(places.values()):
        save_file({key: state[key] for key in state if places[key] == name}, folder / "transformer" / name)
    (folder / "transformer" / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file(in_diffusers_layout(vae, key_maps._vae_names()), folder / "vae" / FILE)


def write_nested(folder: Path, transformer: State, vae: State) -> None:
    """As trainers leave it: a pickle with the averaged weights among the rest of their state."""
    folder.mkdir()
    averaged = {f"model._fsdp_wrapped_module.{key}": tensor for key, tensor in transformer.items()}
    torch.save({"step": 7, "generator": {}, "generator_ema": averaged}, folder / "trained.pt")
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in vae.items()}}, folder / "vae.pth")


# Reading


@pytest.mark.parametrize(
    ("write", "transformer_at", "vae_at"),
    [
        (write_original, "", ""),
        (write_original, FILE, "Wan2.1_VAE.pth"),
        (write_diffusers, "", ""),
        (write_diffusers, "transformer", "vae"),
        (write_diffusers, f"transformer/{FILE}.index.json", f"vae/{FILE}"),
        (write_nested, "trained.pt", "vae.pth"),
    ],
)
def test_every_layout_loads_the_same(
    tmp_path: Path,
    text_to_video: State,
    vae: State,
    write: Callable[[Path, State, State], None],
    transformer_at: str,
    vae_at: str,
) -> None:
    write(tmp_path / "wan", text_to_video, vae)
    path = tmp_path / "wan" / transformer_at
    assert is_text_to_video(path)
    transformer = load_transformer(path, SMALL, CPU, torch.float32)
    found = transformer.state_dict()
    assert found["patch_embedding.weight"].shape[1] == 32
    assert not found["patch_embedding.weight"][:, 16:].any()
    found["patch_embedding.weight"] = found["patch_embedding.weight"][:, :16]
    assert same(found, text_to_video)

    autoencoder = load_wan_vae(tmp_path / "wan" / vae_at, VAE, CPU, torch.float32)
    assert same(autoencoder.state_dict(), vae)
    for module in (transformer, autoencoder):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_what_diffusers_saves_loads(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = SMALL.transformer
    heads = {"num_attention_heads": config.heads, "attention_head_dim": config.dim // config.heads}
    widths = {"ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim, "text_dim": config.text_dim}
    theirs = diffusers.WanTransformer3DModel(**heads, **widths, in_channels=16, num_layers=config.layers)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    autoencoder = diffusers.AutoencoderKLWan(base_dim=VAE.dim, z_dim=16)
    autoencoder.save_pretrained(tmp_path / "vae")
    found = load_transformer(tmp_path, SMALL, CPU, torch.float32).state_dict()
    found["patch_embedding.weight"] = found["patch_embedding.weight"][:, :16]
    found |= load_wan_vae(tmp_path, VAE, CPU, torch.float32).state_dict()
    expected = key_maps.to_original(theirs.state_dict()) | key_maps.to_original(autoencoder.state_dict())
    assert same(found, expected)


def test_weights_take_the_type_that_is_asked_for(tmp_path: Path, text_to_video: State, vae: State) -> None:
    write_original(tmp_path, text_to_video, vae)
    for module in (
        load_transformer(tmp_path, SMALL, CPU, torch.bfloat16),
        load_wan_vae(tmp_path, VAE, CPU, torch.bfloat16),
    ):
        assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.bfloat16}


def test_a_text_to_video_model_ignores_the_lq_and_a_model_of_ours_does_not(
    tmp_path: Path, text_to_video: State, vae: State
) -> None:
    write_original(tmp_path / "wan", text_to_video, vae)
    ours = Transformer(SMALL.transformer)
    seeded.fill(ours)
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    noisy, lq = seeded.normal(99, 2, 1, 16, 2, 4, 4)
    timestep, text = torch.tensor([700.0]), seeded.normal(98, 1, 4, 16)
    for path, ignored in ((tmp_path / "wan", True), (tmp_path / "ours.safetensors", False)):
        assert is_text_to_video(path) is ignored
        transformer = load_transformer(path, SMALL, CPU, torch.float32)
        velocities = [transformer(noisy, z_lq, timestep, text)[0] for z_lq in (lq, -lq)]
        assert torch.equal(*velocities) is ignored
        assert velocities[0].any()


def test_files_are_not_changed_through_the_model(tmp_path: Path, text_to_video: State, vae: State) -> None:
    """They are mapped to memory, not copied."""
    write_original(tmp_path, text_to_video, vae)
    for _ in range(2):
        autoencoder = load_wan_vae(tmp_path, VAE, CPU, torch.float32)
        transformer = load_transformer(tmp_path, SMALL, CPU, torch.float32)
        assert autoencoder.conv1.bias.any() and transformer.head.head.bias.any()
        autoencoder.conv1.bias.zero_()
        transformer.head.head.bias.zero_()


# Refusing


def test_other_keys_and_shapes_are_refused(tmp_path: Path, text_to_video: State, vae: State) -> None:
    path = tmp_path / "wan.safetensors"

    def refused(state: State, words: str, preset: Preset = SMALL) -> None:
        save_file(state, path)
        with pytest.raises(InputError, match=words) as caught:
            load_transformer(path, preset, CPU, torch.float32)
        assert "wan.safetensors" in str(caught.value)

    key = "blocks.1.ffn.0.weight"
    without = {name: tensor for name, tensor in text_to_video.items() if name != key}
    refused(without, rf"not weights of this model.*Missing key.*{key}")
    refused(text_to_video | {"blocks.1.extra.weight": torch.zeros(1)}, r"unknown key.*`blocks\.1\.extra\.weight`")
    refused({"surplus": torch.zeros(1)}, "neither a Wan2.1 transformer nor a Wan2.1 VAE")
    refused(vae, "not a transformer's checkpoint")
    refused(text_to_video | {"patch_embedding.weight": torch.zeros(32, 36, 1, 2, 2)}, "unsupported input channels.*36")
    wider = replace(SMALL, transformer=replace(SMALL.transformer, ffn_dim=96))
    refused(text_to_video, "not weights of this model.*size mismatch", wider)
    save_file(text_to_video, path)
    with pytest.raises(InputError, match="not weights of this model"):
        load_wan_vae(path, VAE, CPU, torch.float32)


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, vae: State) -> None:
    torch.save({**vae, "surplus": Code(tmp_path / "ran")}, tmp_path / "vae.pth")
    with pytest.raises(InputError, match=r"not only tensors in model file: .*vae\.pth"):
        load_wan_vae(tmp_path / "vae.pth", VAE, CPU, torch.float32)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, text_to_video: State, vae: State) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(InputError, match=words):
            load_transformer(path, SMALL, CPU, torch.float32)

    refused(tmp_path, "no transformer of Wan2.1's in folder")
    refused(tmp_path / "absent.safetensors", "cannot read model file: .*absent")
    refused(tmp_path / "absent.pth", "cannot read model file: .*absent")
    (tmp_path / "text.pth").write_text("text")
    refused(tmp_path / "text.pth", "cannot read model file: .*text")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    refused(tmp_path / "tensor.pth", "no tensors by name in model file")

    write_diffusers(tmp_path / "wan", text_to_video, vae)
    folder = tmp_path / "wan" / "transformer"
    index = folder / f"{FILE}.index.json"
    shard = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.rename(tmp_path / shard.name)
    refused(folder, f"cannot read model file: .*{shard.name}")
    (tmp_path / shard.name).rename(shard)
    places = json.loads(index.read_text())["weight_map"]
    for damaged in ({"weight_map": places | {"surplus": shard.name}}, {"weight_map": {"a": "../a.safetensors"}}, []):
        index.write_text(json.dumps(damaged))
        refused(index, "not an index of a sharded checkpoint")
    index.unlink()
    refused(folder, r"more than one transformer in folder: .*00001-of-00002.*00002-of-00002")


# Training


@pytest.fixture
def wan(tmp_path: Path, text_to_video: State, vae: State, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that training can start from, and the small preset in place of the large one."""
    monkeypatch.setitem(PRESETS, "1.3b", SMALL)
    write_original(tmp_path / "wan", text_to_video, vae)
    positive, null = seeded.normal(97, 2, 4, 16)
    save_file({"positive": positive, "null": null}, tmp_path / "wan" / "prompt.safetensors")
    return tmp_path / "wan"


def run_stage(stage: str, out: Path, *settings: str, preset: str = "1.3b", **job: Any) -> Path:
    described = Job(stage, out, preset, **job)
    run_job(described, resolve(described, [*SHORT, *settings]))
    return out


def test_the_chain_trains_from_a_wan_folder(wan: Path, vae: State, training_pool: Path, tmp_path: Path) -> None:
    pool, held_out = (training_pool,), (write_pool(tmp_path / "held_out"),)
    stages = {
        "base": ["prompt_dropout=0.5", "sharpness=1e9"],
        "cfg": [],
        "progressive": ["start=4", "steps=2"],
        "dual": ["head_width=8", "steps=2"],
        "dpo": ["only_noise=true"],
    }
    prompt, init, before = load_file(wan / "prompt.safetensors"), wan, load_weights(wan)["model"]
    for stage, settings in stages.items():
        data = pool
        if stage == "dpo":
            ranked = ("pairs=2", "rankers=psnr", "candidates=2")
            data = (run_stage("prefs", tmp_path / "prefs", *ranked, data=pool, init=init),)
        init = run_stage(stage, tmp_path / stage, *settings, data=data, init=init, held_out=held_out)
        weights = load_weights(init)
        for name in ("model", *({"score"} & weights.keys())):
            assert all(torch.equal(weights[name][f"prompt.{key}"], prompt[key]) for key in prompt), stage
        assert same(weights["vae"], vae), stage
        moved = {key for key in before if not torch.equal(before[key], weights["model"][key])}
        assert "transformer.blocks.2.ffn.2.weight" in moved, stage
        before = weights["model"]
    assert before["transformer.patch_embedding.weight"][:, 16:].any()

    exported = tmp_path / "models" / "mine"
    run_job(Job("export", exported, "1.3b", init=init), ExportConfig())
    Model("mine", exported, "").require_verified()
    assert not is_text_to_video(exported)
    transformer = load_transformer(exported, SMALL, CPU, torch.float32)
    assert torch.equal(transformer.head.head.weight, before["transformer.head.head.weight"].bfloat16().float())
    assert load_wan_vae(exported, VAE, CPU, torch.float32).conv1.bias.any()
    assert load_weights(exported)["model"].keys() == before.keys()


def test_a_folder_without_its_prompts_says_what_is_missing(wan: Path, training_pool: Path, tmp_path: Path) -> None:
    save_file({"positive": torch.zeros(4, 16)}, wan / "prompt.safetensors")
    with pytest.raises(InputError, match=r"prompt\.safetensors` has positive") as caught:
        load_weights(wan)
    (wan / "prompt.safetensors").unlink()
    with pytest.raises(InputError, match=r"no `prompt\.safetensors` in Wan2\.1's folder") as caught:
        run_stage("base", tmp_path / "base", data=(training_pool,), init=wan)
    assert all(name in str(caught.value.hint) for name in ("`positive`", "`null`", "text_length", "text_dim"))


def test_sharpness_drops_no_prompt_that_is_not_learned(wan: Path, training_pool: Path, tmp_path: Path) -> None:
    settings = ("steps=1", "prompt_dropout=0")
    runs = [
        run_stage("base", tmp_path / limit, *settings, f"sharpness={limit}", data=(training_pool,), init=wan)
        for limit in ("0", "1e9")
    ]
    first, second = (load_weights(run)["model"] for run in runs)
    assert same(first, second)


def test_weights_of_another_preset_are_refused(wan: Path, training_pool: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"not a finished training run: .*{FILE}"):
        load_weights(wan / FILE)
    with pytest.raises(InputError, match="not of preset `tiny`"):
        run_stage("base", tmp_path / "tiny", preset="tiny", data=(training_pool,), init=wan)
    save_file({name: torch.zeros(5, 16) for name in ("positive", "null")}, wan / "prompt.safetensors")
    with pytest.raises(InputError, match=r"not of preset `1\.3b`.*prompt\.positive"):
        run_stage("base", tmp_path / "base", data=(training_pool,), init=wan)


@pytest.mark.parametrize("stage", ["refine", "tune"])
def test_stages_that_train_a_tiny_vae_need_one(stage: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trains TinyVAE, which preset `1\.3b` does not have"):
        run_stage(stage, tmp_path, data=(tmp_path,))

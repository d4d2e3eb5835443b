"""Weights of 8 bits: how far off they are, what they take, and when a plan chooses them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from duovsr import UpscaleOptions
from duovsr.engine import bench, files
from duovsr.engine.memory import lent, place, weight_bytes
from duovsr.engine.upscaler import Upscaler
from duovsr.errors import UsageError
from duovsr.model.quantise import EIGHT_BITS, QuantisedLinear, bytes_held, precision_of, quantise
from duovsr.model.transformer import Transformer
from duovsr.options import PRESETS
from tests.clips import Clip, frame_hashes, write_clip
from tests.command_line import Run, running
from tests.test_wan_chunks import Crash, crash_after
from tests.wan import PLAIN, WAN, moving, saved, upscaled

BOUNDS = {"int8": 0.01, "fp8": 0.03}  # of the error over the weights, both as Frobenius norms


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with saved(tmp_path_factory.mktemp("models") / "wan") as path:
        yield path


def dequantised(layer: QuantisedLinear) -> torch.Tensor:
    return layer(torch.eye(layer.weight.shape[1])) - layer.bias


@pytest.mark.parametrize("precision", EIGHT_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_what_it_was_within_its_bound(precision: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 64).requires_grad_(False)
    least = -1 if dtype == torch.float16 else -6  # float16 has few bits for scales below 6e-5
    linear.weight.mul_(10 ** torch.linspace(least, 2, 64)[:, None])  # each output channel has a scale of its own
    layer = QuantisedLinear(linear, EIGHT_BITS[precision], dtype)
    held = layer.weight.float() * layer.scale.float()
    errors = (held - linear.weight).norm(dim=1) / linear.weight.norm(dim=1)
    assert 0 < errors.max() < BOUNDS[precision]
    x = torch.randn(5, 96).to(dtype)
    exact = x.float() @ held.T + layer.bias.float()
    assert (layer(x).float() - exact).norm() < 0.01 * exact.norm()
    assert layer(x).dtype == layer.bias.dtype == dtype


@pytest.mark.parametrize("precision", EIGHT_BITS)
def test_channels_of_zeros_stay_so(precision: str) -> None:
    linear = nn.Linear(8, 2).requires_grad_(False)
    linear.weight[0] = 0
    linear.weight[1] = torch.tensor([1000.0] + [0.5] * 7)
    held = dequantised(QuantisedLinear(linear, EIGHT_BITS[precision], torch.float32).requires_grad_(False))
    assert (held[:, 0] == 0).all() and held[0, 1] == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize("precision", EIGHT_BITS)
def test_the_blocks_are_quantised_and_nothing_else(precision: str) -> None:
    transformer = Transformer(WAN.transformer).requires_grad_(False)
    planned = bytes_held(transformer, precision, 2)
    assert bytes_held(transformer, "bfloat16", 2) == weight_bytes(transformer) // 2
    quantise(transformer, precision, torch.bfloat16)
    layers = [module for module in transformer.blocks.modules() if isinstance(module, QuantisedLinear)]
    assert len(layers) == WAN.transformer.layers * 10 and precision_of(transformer) == precision
    assert isinstance(transformer.text_embedding[0], nn.Linear)
    largest = WAN.transformer.dim * WAN.transformer.ffn_dim * 2  # of one layer's, while they are multiplied
    assert planned == bytes_held(transformer, precision, 2) == weight_bytes(transformer) + largest
    homes = [tensor.data_ptr() for tensor in transformer.state_dict().values()]
    with torch.inference_mode(), lent(transformer, torch.device("meta")):
        assert all(tensor.is_meta for tensor in transformer.state_dict().values())
    place(transformer, torch.device("cpu"))
    assert [tensor.data_ptr() for tensor in transformer.state_dict().values()] == homes
    assert transformer.blocks[0].ffn[0].weight.dtype == EIGHT_BITS[precision]


def test_the_papers_model_takes_half(folder: Path) -> None:
    with torch.device("meta"):
        transformer = Transformer(PRESETS["1.3b"].transformer)
    whole, eight = (bytes_held(transformer, precision, 2) for precision in ("bfloat16", "int8"))
    assert (whole, eight / whole < 0.53) == (2 * 1_419_095_104, True)


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.03), ("fp8", 0.06), ("bfloat16", 0.03)])
def test_the_result_is_close_to_that_of_float32(
    folder: Path, precision: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # compute in float32 everywhere
    exact, other = (Upscaler.from_preset(str(folder), device="cpu", dtype=dtype) for dtype in ("float32", precision))
    frames = moving(5)
    whole, held = (upscaled(each, frames) for each in (exact, other))
    assert other.model.precision == other.plan(32, 24, PLAIN).dtype == precision
    assert exact.model.fingerprint() == other.model.fingerprint(), "the weights' files are the same"
    assert 0 < np.linalg.norm(held - whole) / np.linalg.norm(whole - whole.mean()) < bound


# What the planner makes of it


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is free, which a test may change."""
    free = {"bytes": 2**40}
    monkeypatch.setattr("duovsr.engine.precision.free_memory", lambda device: free["bytes"])
    return free


def test_auto_takes_8_bits_where_memory_is_short_and_says_so(folder: Path, memory: dict[str, int]) -> None:
    model, frames, notices = Upscaler.from_preset(str(folder), device="cpu"), moving(5), []
    compute = model.model.precision
    ample = model.plan(32, 24, PLAIN)
    whole = upscaled(model, frames)
    memory["bytes"] = 1
    short = model.plan(32, 24, PLAIN)
    assert (ample.dtype, short.dtype) == (compute, "int8")
    assert short.memory_bytes < ample.memory_bytes
    held = np.stack(list(model.restore(frames, short, PLAIN, bench.StageTimes(), notices)))
    assert notices == ["memory is short: the transformer's weights are held as int8"]
    assert model.model.precision == "int8" and np.abs(held - whole).max() > 0
    memory["bytes"] = 2**40
    assert model.plan(32, 24, PLAIN) == ample, "whatever was held before"
    assert np.array_equal(upscaled(model, frames), whole)
    memory["bytes"] = 1
    named = Upscaler.from_preset(str(folder), device="cpu", dtype="float32")
    assert named.plan(32, 24, PLAIN).dtype == "float32", "what is asked for is kept"


def test_a_model_that_streams_has_nothing_to_gain(memory: dict[str, int]) -> None:
    memory["bytes"] = 1
    model = Upscaler.from_preset("tiny", device="cpu")
    assert model.plan(32, 24, PLAIN).dtype == model.model.precision != "int8"


@pytest.mark.parametrize(("before", "after"), [(1, 2**40), (2**40, 1)])
def test_a_job_keeps_its_precision(
    folder: Path, memory: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """Another day there is more memory, or less: the recorded plan counts."""
    monkeypatch.setattr(files, "PIECE_FRAMES", 8)
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 512 * 30, 512), size=(32, 24)))
    options = UpscaleOptions(scale=2, codec="ffv1", chunk=8)
    model = Upscaler.from_preset(str(folder), device="cpu")
    memory["bytes"] = before
    whole = model.upscale_file(source, tmp_path / "whole.mkv", options)
    with pytest.raises(Crash):
        model.upscale_file(source, tmp_path / "out.mkv", options, crash_after(20))
    memory["bytes"] = after
    report = Upscaler.from_preset(str(folder), device="cpu").upscale_file(source, tmp_path / "out.mkv", options)
    assert report.reused > 0 and report.plan == whole.plan
    assert report.notices == whole.notices and len(whole.notices) == (before == 1)
    assert frame_hashes(tmp_path / "out.mkv") == frame_hashes(tmp_path / "whole.mkv")


def test_fp8_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match="device `mps` has no fp8"):
        Upscaler.from_preset("tiny", device="mps", dtype="fp8")


# The command line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    yield from running(monkeypatch, capsys)


@pytest.mark.parametrize("precision", EIGHT_BITS)
def test_commands_take_8_bits(run: Run, folder: Path, tmp_path: Path, precision: str) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 512 * 5, 512), size=(32, 24)))
    held = ("--model", folder, "--dtype", precision, "--json")
    assert run("upscale", source, tmp_path / "out.mp4", "--scale", 2, *held) == 0, run.err
    assert json.loads(run.out)["plan"]["dtype"] == precision
    workload = ("--random-weights", "--size", "48x32", "--frames", 1, "--repeat", 1)
    assert run("bench", "--model", "wan", "--dtype", precision, "--json", *workload) == 0, run.err
    assert json.loads(run.out)["dtype"] == precision
    run.fails(2, "unknown dtype: `int4`", "upscale", source, tmp_path / "other.mp4", "--dtype", "int4")


def test_windows_and_8_bits_go_together(folder: Path) -> None:
    """Windows of the whole frame: full attention."""
    full, windows = (Upscaler.from_preset(str(folder), device="cpu", dtype="int8", window=w) for w in (None, 96))
    frames = moving(5, 48, 32)
    assert_close(upscaled(full, frames), upscaled(windows, frames), rtol=0, atol=1e-4)
    assert replace(full.model, digest="other").fingerprint() != full.model.fingerprint()

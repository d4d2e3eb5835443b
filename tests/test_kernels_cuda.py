"""The Triton kernels on a GPU, at every shape of the presets, against float64; and the models that they make."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from duovsr.kernels import dispatch
from duovsr.kernels.attention import attention
from duovsr.kernels.backends import BACKENDS, usable
from duovsr.model.transformer import Transformer
from duovsr.model.wan_vae import WanVAE
from duovsr.options import PRESETS, WanVAEConfig, WindowConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CASES = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "kernel_cases.py"))
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-3}
GPU = torch.device("cuda", 0)


def test_triton_runs_here() -> None:
    assert dispatch.triton_failure(0) is None


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("case", CASES["cases"](), ids=lambda case: f"{case.kernel} {case.shape}")
@torch.inference_mode()
def test_kernels_equal_float64(case: Any, dtype: torch.dtype) -> None:
    if not CASES["fits"](case, dtype):
        pytest.skip("left to torch")
    torch.manual_seed(0)
    arguments = case.make(GPU, dtype)
    assert CASES["relative_error"](case, CASES["run_fused"](case, arguments), arguments) <= BOUNDS[dtype]


@pytest.mark.parametrize("window", [None, WindowConfig(8, 8, past=1), WindowConfig(8, 8, past=None)])
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.inference_mode()
def test_every_backend_computes_the_same(backend: str, dtype: torch.dtype, window: WindowConfig | None) -> None:
    if backend not in usable(GPU, dtype, 64):
        pytest.skip("not on this machine")
    past = (window.past or 0) if window else 0
    q = torch.randn(1, 3, 13, 21, 4, 64, dtype=dtype, device=GPU)
    k, v = (torch.randn(1, 3 + past, 13, 21, 4, 64, dtype=dtype, device=GPU) for _ in range(2))
    expected = attention(q.double(), k.double(), v.double(), window, shifted=True, backend="sdpa")
    error = attention(q, k, v, window, shifted=True, backend=backend).double() - expected
    assert error.norm() / expected.norm() <= BOUNDS[dtype]


@torch.inference_mode()
def test_models_are_those_of_the_twins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    config = PRESETS["tiny"].transformer
    transformer, autoencoder = Transformer(config).to(GPU), WanVAE(WanVAEConfig(dim=24)).to(GPU)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.1)
    latents, text = torch.randn(1, 16, 2, 34, 46, device=GPU), torch.randn(1, 8, config.text_dim, device=GPU)
    frames = torch.rand(1, 3, 5, 40, 56, device=GPU) * 2 - 1

    def outputs() -> list[torch.Tensor]:
        velocity, _ = transformer(latents, latents, torch.full((1,), 1000.0, device=GPU), text)
        encoded, _ = autoencoder.encode(frames)
        return [velocity, encoded, autoencoder.decode(encoded)[0]]

    fused = outputs()
    monkeypatch.setattr(dispatch, "takes_fused", lambda *tensors: False)
    transformer.attend_with("sdpa", GPU)
    for ours, plain in zip(fused, outputs(), strict=True):
        assert (ours - plain).norm() / plain.norm() <= BOUNDS[torch.float32]


def test_training_goes_through_the_twins() -> None:
    transformer = Transformer(PRESETS["tiny"].transformer).to(GPU)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.1)
    latents, text = torch.randn(1, 16, 2, 18, 22, device=GPU), torch.randn(1, 8, 256, device=GPU)
    transformer(latents, latents, torch.full((1,), 500.0, device=GPU), text)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())

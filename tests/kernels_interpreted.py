"""The Triton kernels in Triton's interpreter, on a CPU, against float64: run by `test_kernels_fused.py` in a process of
its own, as the interpreter is chosen when Triton is imported. Sizes are odd, and outputs are NaN until written."""

from __future__ import annotations

from collections.abc import Callable

import kernel_cases
import kernels
import numpy as np
import pytest
import torch
import triton.language as tl
from kernel_cases import (
    Case,
    full_attention,
    images,
    norm_silu,
    relative_error,
    row_cases,
    run_fused,
    run_twin,
    windowed,
)
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from duovsr.kernels import dispatch
from duovsr.kernels.fused import attention, modulate, prologue, vae  # noqa: F401  # registers the operators
from duovsr.model.transformer import Attention, Transformer
from duovsr.model.wan_vae import WanVAE
from duovsr.options import TransformerConfig, WanVAEConfig, WindowConfig

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
kernel_cases.MODELS |= {"1.3b": (32, 2), "odd": (24, 3), "tiny": (32, 2)}  # channels, heads
kernel_cases.PLACES |= {"odd": (2, 3, 7), "low": (3, 5, 9), "small": (2, 3, 3), "rows": (3, 11, 13)}  # T, H, W
kernel_cases.VAE_STAGES |= {"odd": (12, 3, 5, 7), "one": (24, 1, 3, 3)}  # channels, frames, height, width
kernel_cases.WINDOWS |= {"1.3b": WindowConfig(4, 3, past=None), "tiny": WindowConfig(4, 4, past=1)}

SMALL = [
    full_attention("odd", (3, 5, 11), (2, 3, 7), B=2),
    full_attention("one key", (1, 1, 3), (1, 1, 1)),
    *(windowed("tiny", name, shifted) for name in ("odd", "low", "small") for shifted in (False, True)),
    *(windowed("1.3b", "odd", shifted, B=2) for shifted in (False, True)),
    *row_cases("odd", "rows", B=2),
    *row_cases("tiny", "odd"),
    *(norm_silu(stage, carried, B=2) for stage in ("odd", "one") for carried in (True, False)),
    images("odd", 2, 67, C=48),
]


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritten(make: object) -> object:
        def made(*args: object, **options: object) -> Tensor:
            result: Tensor = make(*args, **options)  # type: ignore[operator]
            return result.fill_(float("nan")) if result.is_floating_point() else result

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, unwritten(getattr(torch, name)))


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as bits, and multiplies these as if they were whole numbers."""
    product = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: product(self, widened(a), widened(b), *rest)
    )


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.kernel} {case.shape}")
def test_kernels_equal_float64(case: Case, dtype: torch.dtype) -> None:
    if case.kernel == "attend_images" and dtype == torch.float32:
        pytest.skip("left to torch")
    torch.manual_seed(0)
    arguments = case.make(torch.device("cpu"), dtype)
    before = [x.clone() for x in arguments if isinstance(x, Tensor)]
    error = relative_error(case, run_fused(case, arguments), arguments)
    assert error < BOUNDS[dtype]
    if dtype != torch.bfloat16:  # to which the interpreter rounds down, not to nearest
        assert error < 2 * relative_error(case, run_twin(case, arguments), arguments) + 1e-6, "less exact than the twin"
    assert all(torch.equal(x, y) for x, y in zip(before, (x for x in arguments if isinstance(x, Tensor)), strict=True))


def test_strided_queries_and_a_gate_for_all_of_a_batch() -> None:
    qkv = torch.randn(2, 19, 3, 2, 16)
    q, k, v = qkv.unbind(2)
    dense = torch.ops.duovsr.attend(*(x.contiguous() for x in (q, k, v)))
    torch.testing.assert_close(torch.ops.duovsr.attend(q, k, v), dense, rtol=0, atol=1e-6)
    x, branch, gate = torch.randn(2, 5, 24), torch.randn(2, 5, 24), torch.randn(1, 1, 24)
    torch.testing.assert_close(torch.ops.duovsr.gated_residual(x, gate, branch), x + gate * branch)


def test_a_position_of_zeros_stays_zero() -> None:
    for dtype in BOUNDS:
        x = torch.zeros(1, 12, 1, 2, 2, dtype=dtype)
        assert not vae.norm_silu_after(x, torch.ones(12, 1, 1, 1, dtype=dtype), None, 2).any()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (200 * torch.randn(1, 21, 1, 16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v)))
    torch.testing.assert_close(attention.attend(q, k, v).transpose(1, 2).double(), expected, rtol=1e-3, atol=1e-2)


def test_without_a_formula_there_is_no_silent_gradient() -> None:
    x = torch.randn(3, 24, requires_grad=True)
    result = torch.ops.duovsr.rms_norm(x, torch.ones(24), 1e-6)
    with pytest.raises(RuntimeError, match="autograd"):
        result.sum().backward()


def test_the_benchmark_checks_and_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(compute: Callable[[], object], device: torch.device, repeat: int = 1) -> dict[str, float]:
        compute()
        return {"median": 2.0, "least": 1.0, "most": 3.0}

    monkeypatch.setattr(kernels, "milliseconds", once)
    monkeypatch.setattr(kernels, "usable", lambda *shape: ["triton", "sdpa"])
    monkeypatch.setattr(kernels, "triton_runs", lambda device: True)
    cpu, peaks = torch.device("cpu"), kernels.Peaks("bfloat16", 1e12, 1e12, 1e9, 1e9)
    chosen = [case for case in SMALL if case.shape in ("window 4x4, small", "odd rows")]
    checked = kernels.check(chosen, cpu)
    assert len(checked) == 3 * len(chosen) and all(row["right"] for row in checked)
    rows = [kernels.measure(case, cpu, peaks) for case in chosen]
    assert set(rows[0]["milliseconds"]) == {"triton", "sdpa"}
    assert len(kernels.tune_blocks(chosen[0], cpu)["tuned"]) == len(kernels.BLOCKS)
    assert all(set(row["milliseconds"]) == {"fused", "twin"} for row in rows[1:])
    assert all(row["times_floor"] > 0 for row in rows)


@pytest.fixture
def fused_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models take the kernels. Returns the names of those that ran."""
    ran: list[str] = []

    class Listed:
        def __getattr__(self, name: str) -> object:
            ran.append(name)
            return getattr(real, name)

    real = torch.ops.duovsr
    monkeypatch.setattr(dispatch, "takes_fused", lambda *tensors: True)
    monkeypatch.setattr(torch.ops, "duovsr", Listed())
    return ran


@pytest.mark.parametrize("window", [None, WindowConfig(4, 4, past=1)])
@torch.inference_mode()
def test_the_transformer_is_the_same(window: WindowConfig | None, fused_on_cpu: list[str]) -> None:
    torch.manual_seed(0)
    transformer = Transformer(
        TransformerConfig(dim=48, ffn_dim=32, heads=3, layers=2, text_dim=16, text_length=4, window=window)
    )
    torch.nn.init.normal_(transformer.head.head.weight, std=0.1)
    latents, timestep, text = torch.randn(2, 1, 16, 2, 10, 10), torch.tensor([1000.0]), torch.randn(1, 3, 16)

    def twice() -> list[Tensor]:
        velocity, state = transformer(latents[0], latents[1], timestep, text)
        return [velocity, transformer(latents[1], latents[0], timestep, text, state)[0]]

    for module in transformer.modules():
        if isinstance(module, Attention):
            module.backend = "triton"
    fused = twice()
    assert set(fused_on_cpu) == {"rms_norm", "rotated_norms", "modulated_norm", "gated_residual"} | {
        *("gated_residual_norm", "residual_modulated_norm", "attend"),
        *(["attend_windows"] if window else []),
    }
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(dispatch, "takes_fused", lambda *tensors: False)
        transformer.attend_with("sdpa", torch.device("cpu"))
        for x, y in zip(fused, twice(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_the_autoencoder_is_the_same(fused_on_cpu: list[str]) -> None:
    torch.manual_seed(0)
    autoencoder, frames = WanVAE(WanVAEConfig(dim=12)), torch.rand(1, 3, 9, 16, 16) * 2 - 1

    def streamed() -> list[Tensor]:
        latents, state = autoencoder.encode(frames[:, :, :5])
        more, _ = autoencoder.encode(frames[:, :, 5:], state)
        decoded, state = autoencoder.decode(latents)
        return [latents, more, decoded, autoencoder.decode(more, state)[0]]

    fused = streamed()
    assert set(fused_on_cpu) == {"norm_silu_after"}  # its attention leaves float32 to torch
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(dispatch, "takes_fused", lambda *tensors: False)
        for x, y in zip(fused, streamed(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-5)

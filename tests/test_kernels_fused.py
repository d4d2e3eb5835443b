"""The Triton kernels without a GPU: interpreted, compiled ahead of time, and seen through by `torch.compile`; and when
they are taken instead of their twins. On a GPU: `test_kernels_cuda.py`."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from duovsr.kernels import attention as attention_module
from duovsr.kernels import dispatch, modulate, prologue
from duovsr.kernels.attention import attention
from duovsr.options import WindowConfig

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def benchmarks() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("kernel_compile")


def version(package: str) -> tuple[int, int]:
    major, minor = metadata.version(package).split(".")[:2]
    return int(major), int(minor)


@pytest.mark.skipif(
    version("triton") < (3, 7) and version("numpy") >= (2, 4), reason="the interpreter before 3.7 needs NumPy below 2.4"
)
def test_kernels_equal_their_twins_in_the_interpreter() -> None:
    folder = ROOT / "tests"
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "kernels_interpreted.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize("architecture", [80, 90])
def test_attention_compiles_within_its_budget(benchmarks: ModuleType, architecture: int) -> None:
    cases = importlib.import_module("kernel_cases")
    chosen = [
        cases.full_attention("1080p", cases.PLACES["1080p"], cases.PLACES["1080p"]),
        cases.windowed("tiny", "tiny 720p", shifted=True),
        cases.images("1080p", 2, 136 * 240),
    ]
    compiled = list(benchmarks.compile_all(chosen, [torch.bfloat16], architecture))
    assert len(compiled) == len(chosen)
    for kernel in compiled:
        assert kernel.stack == 0, f"registers are spilled: {kernel}"
        assert kernel.shared_memory <= benchmarks.SHARED_MEMORY[architecture], kernel


def test_kernels_of_rows_compile_within_their_budget(benchmarks: ModuleType) -> None:
    cases = importlib.import_module("kernel_cases")
    chosen = [
        *cases.row_cases("1.3b", "1080p"),
        cases.norm_silu("1/1", carried=True),
        cases.norm_silu("1/4", carried=True),
    ]
    compiled = list(benchmarks.compile_all(chosen, [torch.bfloat16], 90))
    assert len(compiled) == len(chosen)
    for kernel in compiled:
        assert kernel.stack <= 32 and kernel.registers <= 128, kernel  # four blocks of four warps on a processor
        assert kernel.shared_memory <= 4096, kernel


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_everything_compiles_within_its_budget(benchmarks: ModuleType, architecture: int) -> None:
    cases = importlib.import_module("kernel_cases").cases()
    for kernel in benchmarks.compile_all(cases, [torch.bfloat16, torch.float16, torch.float32], architecture):
        assert kernel.shared_memory <= benchmarks.SHARED_MEMORY[architecture], kernel
        # Of kernels with loops not a byte; elsewhere the assembler may keep a few in the first-level cache, rather than
        # pass 64 registers, with which twice as many warps run.
        assert kernel.stack == 0 or (kernel.stack <= 32 and kernel.registers <= 64), kernel


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Tensors of a GPU that is not there: they have shapes, and no values."""
    importlib.import_module("duovsr.kernels.fused.vae")
    for name in ("attention", "modulate", "prologue"):
        importlib.import_module(f"duovsr.kernels.fused.{name}")
    monkeypatch.setattr(dispatch, "_triton_failure", lambda device: None)
    monkeypatch.setattr(attention_module, "_probe", lambda *shape: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return FakeTensorMode(allow_non_fake_inputs=True)


def test_kernels_are_for_gpus_floats_and_no_gradient(fake_gpu: FakeTensorMode) -> None:
    assert not dispatch.takes_fused(torch.ones(2, 64))
    with fake_gpu:
        x, weight = torch.ones(2, 64, device="cuda"), torch.ones(64, device="cuda")
        assert dispatch.takes_fused(x, weight)
        assert not dispatch.takes_fused(x.double())
        weight.requires_grad_()
        assert not dispatch.takes_fused(x, weight)
        with torch.no_grad():
            assert dispatch.takes_fused(x, weight)


def test_where_triton_fails_the_twin_is_taken(fake_gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_failure", lambda device: "no compiler")
    with fake_gpu:
        assert not dispatch.takes_fused(torch.ones(2, 64, device="cuda"))


def test_only_the_current_gpu_is_launched_on(fake_gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert dispatch.triton_failure(0) == "not the current device"


def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = modulate.gated_residual(prologue.rms_norm(x, weight, 1e-6), weight.view(1, 1, 1, 1, -1), x)
    heads = y.unflatten(-1, (2, -1))
    return attention(heads, heads, heads, WindowConfig(4, 4, past=0))


def test_torch_compile_sees_through_the_kernels(fake_gpu: FakeTensorMode) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    def operations(backend: object) -> list[str]:
        graphs.clear()
        torch._dynamo.reset()
        with fake_gpu, torch.no_grad():
            x, weight = torch.ones(1, 2, 8, 8, 64, device="cuda"), torch.ones(64, device="cuda")
            assert torch.compile(layer, backend=backend, fullgraph=True)(x, weight).shape == (1, 2, 8, 8, 2, 32)
        (graph,) = graphs
        return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]

    assert [name for name in operations(keep) if "duovsr" in name] == [
        "duovsr.rms_norm",
        "duovsr.gated_residual",
        "duovsr.attend_windows",
    ]
    if torch.backends.cuda.is_built():
        operations(aot_autograd(fw_compiler=keep))
    else:  # once the graph is made, it is run
        with pytest.raises(RuntimeError, match="not linked with support for cuda"):
            operations(aot_autograd(fw_compiler=keep))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert targets.count("triton_kernel_wrapper_functional") == 3

"""Who computes attention: the measured choice and its file, with backends and a clock of the test's own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duovsr.errors import UsageError
from duovsr.kernels import backends
from duovsr.kernels.attention import attention
from duovsr.kernels.backends import Remembered, fastest, misfit, require, usable
from duovsr.model.transformer import Transformer
from duovsr.options import PRESETS, WindowConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Clock:
    """Candidates say how long they take; counts the measurements."""

    def __init__(self) -> None:
        self.measured = 0

    def __call__(self, compute: Callable[[], object]) -> float:
        self.measured += 1
        taken = compute()
        assert isinstance(taken, float)
        return taken


def fail(error: Exception) -> float:
    raise error


@pytest.fixture
def machine(tmp_path: Path) -> Remembered:
    return Remembered(tmp_path / "duovsr" / "attention.json", "GPU, torch 9")


def test_the_fastest_is_taken_and_remembered(machine: Remembered) -> None:
    clock = Clock()
    candidates = {"triton": lambda: 2.0, "sdpa": lambda: 1.0}
    assert fastest("shape", candidates, machine, clock) == "sdpa"
    assert fastest("shape", candidates, Remembered(machine.file, machine.machine), clock) == "sdpa"
    assert clock.measured == 2
    assert machine.choices()["shape"]["milliseconds"] == {"triton": 2.0, "sdpa": 1.0}
    assert [path.name for path in machine.file.parent.iterdir()] == ["attention.json"], "no partial file is left"


def test_other_shapes_and_machines_are_measured_anew(machine: Remembered) -> None:
    clock = Clock()
    assert fastest("shape", {"triton": lambda: 2.0, "sdpa": lambda: 1.0}, machine, clock) == "sdpa"
    assert fastest("other", {"triton": lambda: 1.0, "sdpa": lambda: 2.0}, machine, clock) == "triton"
    newer = Remembered(machine.file, "GPU, torch 10")
    assert fastest("shape", {"triton": lambda: 1.0, "sdpa": lambda: 2.0}, newer, clock) == "triton"
    assert clock.measured == 6
    assert set(json.loads(machine.file.read_text())) == {"GPU, torch 9", "GPU, torch 10"}


def test_a_remembered_backend_that_is_gone_is_not_taken(machine: Remembered) -> None:
    assert fastest("shape", {"xformers": lambda: 1.0, "sdpa": lambda: 2.0}, machine, Clock()) == "xformers"
    assert fastest("shape", {"sdpa": lambda: 2.0}, machine, Clock()) == "sdpa"


def test_a_backend_that_fails_is_passed_over_and_its_reason_kept(machine: Remembered) -> None:
    candidates = {"xformers": lambda: fail(NotImplementedError("no kernel\nfor sm_120")), "sdpa": lambda: 3.0}
    assert fastest("shape", candidates, machine, Clock()) == "sdpa"
    assert machine.choices()["shape"]["failures"] == {"xformers": "no kernel"}
    with pytest.raises(RuntimeError, match="no attention for other"):
        fastest("other", {"xformers": candidates["xformers"]}, machine, Clock())
    with pytest.raises(torch.OutOfMemoryError):
        fastest("large", {"sdpa": lambda: fail(torch.OutOfMemoryError("full"))}, machine, Clock())


@pytest.mark.parametrize("content", ["", "{not json", "[1]", '{"GPU, torch 9": []}', "\xff"])
def test_a_damaged_file_is_replaced(machine: Remembered, content: str) -> None:
    machine.file.parent.mkdir()
    machine.file.write_bytes(content.encode("latin-1"))
    assert fastest("shape", {"sdpa": lambda: 1.0}, machine, Clock()) == "sdpa"
    assert set(machine.choices()) == {"shape"}


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = Remembered(tmp_path / "file" / "attention.json", "GPU")
    clock = Clock()
    assert [fastest("shape", {"sdpa": lambda: 1.0}, nowhere, clock) for _ in range(2)] == ["sdpa", "sdpa"]
    assert clock.measured == 2


def test_the_file_lies_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    found = Remembered.of(GPU)
    assert found.file == tmp_path / "duovsr" / "attention.json"
    assert found.machine.startswith(f"Some GPU, torch {torch.__version__}, CUDA ")
    assert not os.listdir(tmp_path), "looking makes nothing"


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_dim", "message"),
    [
        ("flash", CPU, torch.float32, 64, "unknown attention: `flash`"),
        ("triton", CPU, torch.float32, 64, "`triton` is not available: needs CUDA"),
        ("xformers", CPU, torch.bfloat16, 64, "`xformers` is not available: needs CUDA"),
        ("triton", GPU, torch.bfloat16, 24, "`triton` is not available: heads of 24 in bfloat16"),
        ("triton", GPU, torch.float32, 128, "`triton` is not available: heads of 128 in float32"),
        ("cudnn", GPU, torch.float32, 64, "`cudnn` is not available: heads of 64 in float32"),
    ],
)
def test_a_forced_backend_that_cannot_be_is_refused(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "triton_failure", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with pytest.raises(UsageError, match=message) as caught:
        require(backend, device, dtype, head_dim)
    assert caught.value.hint


def test_auto_and_torchs_own_are_always_there() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        require("auto", CPU, dtype, 24)
        require("sdpa", CPU, dtype, 24)
    assert usable(CPU, torch.float32, 64) == ["sdpa"]
    assert misfit("triton", torch.bfloat16, 128) is misfit("triton", torch.float32, 64) is None


def test_a_transformer_takes_a_backend_for_all_its_layers() -> None:
    with torch.device("meta"):
        transformer = Transformer(PRESETS["tiny"].transformer)
    transformer.attend_with("sdpa", torch.device("cpu"))
    assert {block.self_attn.backend for block in transformer.blocks} == {"sdpa"}
    assert {block.cross_attn.backend for block in transformer.blocks} == {"sdpa"}
    with pytest.raises(UsageError, match="needs CUDA"):
        transformer.attend_with("triton", torch.device("cpu"))
    assert {block.self_attn.backend for block in transformer.blocks} == {"sdpa"}


def test_a_cpu_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    q, k, v = torch.randn(3, 1, 2, 5, 7, 2, 8).unbind(0)
    window = WindowConfig(4, 4, past=0)
    assert torch.equal(attention(q, k, v, window), attention(q, k, v, window, backend="sdpa"))
    assert backends.describe(CPU)["auto"] == "sdpa"
    assert backends.describe(CPU)["triton"] == "needs CUDA"
    assert not os.listdir(tmp_path)

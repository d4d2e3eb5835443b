"""How much memory there is where a container has less than its machine, and what is left when it runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from duovsr import Upscaler
from duovsr.engine import memory
from tests.bicubic import bicubic

GIB = 2**30


def group(folder: Path, limit: str, used: int, cached: int, version: int) -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{prefix}active_file {cached}\n{prefix}inactive_file {cached}\n")


def test_groups_of_version_2(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    group(root / "batch", str(8 * GIB), 5 * GIB, GIB, 2)
    group(root / "batch" / "job", str(4 * GIB), 2 * GIB, 0, 2)
    group(root / "batch" / "job" / "step", "max", GIB, 0, 2)
    group(root / "batch" / "other", str(GIB), 0, 0, 2)
    own.write_text("1:name=systemd:/elsewhere\n0::/batch/job/step\n")
    assert list(memory.left_in_groups(root, own)) == [2 * GIB, 5 * GIB]


def test_groups_of_version_1_in_a_container(tmp_path: Path) -> None:
    """It is told its group's name outside, and sees the group at the top."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    group(root / "memory", str(4 * GIB), 5 * GIB, GIB // 2, 1)
    own.write_text("5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n")
    assert list(memory.left_in_groups(root, own)) == [0]


def test_no_groups(tmp_path: Path) -> None:
    assert list(memory.left_in_groups(tmp_path, tmp_path / "none")) == []


def test_the_least_of_all_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "left_in_groups", lambda: iter([2**60]))
    assert GIB // 64 < memory.free_memory(cpu) < 2**50
    monkeypatch.setattr(memory, "left_in_groups", lambda: iter([2**60, 12345]))
    assert memory.free_memory(cpu) == 12345


def test_a_model_that_cannot_be_loaded_anew_leaves_the_one_before() -> None:
    whole = bicubic()
    model, precision = whole.model, whole.model.precision

    def load(kind: str) -> object:
        if kind != precision:
            raise MemoryError
        return model

    upscaler = Upscaler(model, load, (precision, "int8"))  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(MemoryError):
            upscaler._hold("int8")
        assert upscaler.model is model

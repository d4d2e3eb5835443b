"""Compiles every Triton kernel as the presets launch it, for GPUs that need not be there, and reports what it takes:
registers and shared memory, and the bytes of the stack to which registers were spilled."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from kernel_cases import Case, fits, run_fused
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from duovsr.kernels.fused import attention as fused_attention
from duovsr.kernels.fused import modulate, prologue, tiles, vae

ARCHITECTURES = (80, 89, 90)  # of the A100, of cards for desktops, of the H100 and H200
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that a block may ask for
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Launch:
    """A kernel with what its machine code depends on: types, constants, which numbers 16 divides, and options."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiled:
    kernel: str
    shape: str
    dtype: str
    architecture: int
    constants: dict[str, Any]
    registers: int
    stack: int
    shared_memory: int


def launches(case: Case, dtype: torch.dtype, architecture: int) -> list[Launch]:
    """What the fused form of a case launches, found by running it on tensors without values."""
    found: list[Launch] = []

    def record(kernel: Any) -> Any:
        class Recorder:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *args, **options: found.append(_launch(kernel, args, options))

        return Recorder()

    arguments = case.make(torch.device("meta"), dtype)
    with ExitStack() as patched:
        capability = divmod(architecture, 10)
        patched.enter_context(mock.patch.object(tiles, "capability", return_value=capability))
        for module in (fused_attention, modulate, prologue, vae):
            patched.enter_context(mock.patch.object(module, "wrap_triton", record))
        run_fused(case, arguments)
    return found


def _launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """As Triton specialises: a number that is 1 is a constant, and of others it matters whether 16 divides them."""
    options = dict(options)
    chosen = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    plain = {p.name for p in kernel.params if p.do_not_specialize}
    constants |= {name: 1 for name, value in values.items() if type(value) is int and value == 1 and name not in plain}
    signature, divisible = {}, []
    for name in kernel.arg_names:
        value = values[name]
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            divisible += [name] if value % 16 == 0 and name not in plain else []
    return Launch(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible), tuple(sorted(chosen.items()))
    )


def compile_launch(launch: Launch, architecture: int) -> tuple[int, int, int]:
    """Registers a thread, bytes of stack a thread, bytes of shared memory a block."""
    names = launch.kernel.arg_names
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = subprocess.run([tool, "-res-usage", binary.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    return int(match[1]), int(match[2]), compiled.metadata.shared


def compile_all(cases: list[Case], dtypes: list[torch.dtype], architecture: int) -> Iterator[Compiled]:
    """Each distinct kernel once, under the first shape that launches it."""
    seen: set[Launch] = set()
    for dtype in dtypes:
        for case in (case for case in cases if fits(case, dtype)):
            for launch in launches(case, dtype, architecture):
                if launch not in seen:
                    seen.add(launch)
                    sizes = {name: value for name, value in launch.constants if not isinstance(value, bool)}
                    yield Compiled(
                        launch.kernel.__name__,
                        case.shape,
                        str(dtype).removeprefix("torch."),
                        architecture,
                        sizes | dict(launch.options),
                        *compile_launch(launch, architecture),
                    )

"""What the presets ask of each kernel: arguments at the paper's workload (21 frames of 1920x1088, and of 1280x720), the
same in float64, and the work that cannot be saved. `kernels.py` measures these; `kernel_compile.py` compiles them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.kernels import modulate, prologue, vae
from duovsr.kernels.attention import attention
from duovsr.kernels.backends import misfit
from duovsr.model.layers import rope_table
from duovsr.model.wan_vae import attend_images
from duovsr.options import WindowConfig

EPS = 1e-6
PLACES = {"1080p": (6, 68, 120), "720p": (6, 45, 80), "tiny 1080p": (5, 68, 120), "tiny 720p": (5, 45, 80)}  # T, H, W
MODELS = {"1.3b": (1536, 12), "tiny": (256, 4)}  # channels, heads
WINDOWS = {"tiny": WindowConfig(8, 8, past=1), "1.3b": WindowConfig(32, 32, past=None)}
VAE_STAGES = {  # of a call of one latent, in the decoder: channels, frames, height, width
    "1/1": (96, 4, 1088, 1920),
    "1/2": (192, 4, 544, 960),
    "1/4": (384, 2, 272, 480),
    "1/8": (384, 1, 136, 240),
}
Pieces = Iterator[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """`run` is the function that models call; its `__wrapped__`, the twin. `reference` yields the results in float64,
    as pieces of `piece` along `axis`, which bounds the memory of what is large."""

    kernel: str
    shape: str
    run: Callable[..., Any]
    make: Callable[[torch.device, torch.dtype], tuple[Any, ...]]
    reference: Callable[..., Pieces]
    flops: float = 0.0
    numbers: float = 0.0  # read and written, at least
    axis: int = 0
    piece: int = 2**31


def randn(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def cases() -> list[Case]:
    middle_channels, _, middle_height, middle_width = VAE_STAGES["1/8"]
    return [
        *(full_attention(name, places, places) for name, places in PLACES.items() if "tiny" not in name),
        full_attention("1080p to text", PLACES["1080p"], (512, 1, 1)),
        *(windowed("tiny", name, shifted) for name in ("tiny 1080p", "tiny 720p") for shifted in (False, True)),
        windowed("1.3b", "1080p", shifted=True),
        *(case for model, name in (("1.3b", "1080p"), ("tiny", "tiny 1080p")) for case in row_cases(model, name)),
        *(norm_silu(stage, carried) for stage in VAE_STAGES for carried in (True, False)),
        images("1080p", 2, middle_height * middle_width, middle_channels),
    ]


def run_fused(case: Case, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if case.kernel == "attention":
        return (case.run(*arguments, backend="triton"),)
    return as_tuple(getattr(torch.ops.duovsr, case.kernel)(*arguments))


def run_twin(case: Case, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if case.kernel == "attention":
        return (case.run(*arguments, backend="sdpa"),)
    return as_tuple(inspect.unwrap(case.run)(*arguments))


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def relative_error(case: Case, results: tuple[Tensor, ...], arguments: tuple[Any, ...]) -> float:
    """|result - reference| / |reference| by Frobenius norms, the largest of the results; nan where one is not whole."""
    expected = case.reference(*arguments)
    squares = torch.zeros(2, len(results), dtype=torch.float64)
    for pieces in zip(*(result.split(case.piece, case.axis) for result in results), strict=True):
        for i, (piece, truth) in enumerate(zip(pieces, next(expected), strict=True)):
            assert piece.shape == truth.shape, (piece.shape, truth.shape)
            squares[0, i] += (piece.double() - truth).square().sum().cpu()
            squares[1, i] += truth.square().sum().cpu()
    return float((squares[0] / squares[1]).sqrt().max())


def fits(case: Case, dtype: torch.dtype) -> bool:
    """Whether the fused form takes the dtype: attention of wide heads leaves float32 to torch."""
    if case.kernel == "attention":
        q = case.make(torch.device("meta"), dtype)[0]
        return misfit("triton", dtype, q.shape[-1]) is None
    return case.kernel != "attend_images" or dtype != torch.float32


def full_attention(name: str, places: tuple[int, int, int], keys: tuple[int, int, int], B: int = 1) -> Case:
    dim, heads = MODELS["1.3b"]
    head_dim = dim // heads
    queries, others = torch.Size(places).numel(), torch.Size(keys).numel()

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        q = randn(device, dtype, B, *places, heads, head_dim)
        return q, *(randn(device, dtype, B, *keys, heads, head_dim) for _ in range(2))

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Pieces:
        k, v = (x.flatten(1, 3).double().transpose(1, 2) for x in (k, v))
        for t in range(places[0]):
            rows = q[:, t].flatten(1, 2).double().transpose(1, 2).split(256, dim=2)
            parts = [(part @ k.transpose(2, 3) / head_dim**0.5).softmax(-1) @ v for part in rows]
            yield (torch.cat(parts, dim=2).transpose(1, 2).view(B, 1, *places[1:], heads, head_dim),)

    return Case(
        "attention", f"full, {name}", attention, make, reference,
        flops=4.0 * queries * others * dim, numbers=2 * (queries + others) * dim, axis=1, piece=1,
    )  # fmt: skip


def windowed(model: str, name: str, shifted: bool, B: int = 1) -> Case:
    (dim, heads), (T, H, W), window = MODELS[model], PLACES[name], WINDOWS[model]
    past = window.past or 0
    tokens = window.height * window.width * (T if window.past is None else past + 1)

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        q = randn(device, dtype, B, T, H, W, heads, dim // heads)
        return q, *(randn(device, dtype, B, T + past, H, W, heads, dim // heads) for _ in range(2)), window

    def run(q: Tensor, k: Tensor, v: Tensor, window: WindowConfig, **options: Any) -> Tensor:
        return attention(q, k, v, window, shifted=shifted, **options)

    def reference(q: Tensor, k: Tensor, v: Tensor, window: WindowConfig) -> Pieces:
        yield (run(q.double(), k.double(), v.double(), window, backend="sdpa"),)

    queries = T * H * W
    return Case(
        "attention", f"window {window.height}x{window.width}, {name}{', shifted' if shifted else ''}",
        run, make, reference, flops=4.0 * queries * tokens * dim, numbers=(2 * queries + 2 * (T + past) * H * W) * dim,
    )  # fmt: skip


def row_cases(model: str, name: str, B: int = 1) -> Iterator[Case]:
    """The kernels that read and write rows of the residual stream's width."""
    (dim, heads), places = MODELS[model], PLACES[name]
    size = torch.Size(places).numel() * dim

    def rows(device: torch.device, dtype: torch.dtype, count: int) -> list[Tensor]:
        return [randn(device, dtype, B, *places, dim) for _ in range(count)]

    def parameters(device: torch.device, dtype: torch.dtype, count: int, *shape: int) -> list[Tensor]:
        return [randn(device, dtype, *shape, dim) for _ in range(count)]

    def case(run: Callable[..., Any], make: Callable[..., Any], reference: Callable[..., Pieces], passes: int) -> Case:
        label = f"{model} {name.removeprefix('tiny ')}"
        return Case(run.__name__, label, run, make, reference, numbers=passes * size)

    def for_rotation(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        rope = rope_table(*places, dim // heads, 0, device)
        return *rows(device, dtype, 2), *parameters(device, dtype, 2), rope, EPS

    row = (B, 1, 1, 1)
    yield case(prologue.rotated_norms, for_rotation, rotated_norms, 4)
    yield case(prologue.rms_norm, lambda d, t: (*rows(d, t, 1), *parameters(d, t, 1), EPS), rms_norm, 2)
    yield case(
        modulate.modulated_norm, lambda d, t: (*rows(d, t, 1), *parameters(d, t, 2, *row), EPS), modulated_norm, 2
    )
    yield case(
        modulate.gated_residual, lambda d, t: (*rows(d, t, 1), *parameters(d, t, 1, *row), *rows(d, t, 1)), residual, 3
    )
    yield case(
        modulate.gated_residual_norm,
        lambda d, t: (*rows(d, t, 1), *parameters(d, t, 1, *row), *rows(d, t, 1), *parameters(d, t, 2), EPS),
        gated_residual_norm,
        4,
    )
    yield case(
        modulate.residual_modulated_norm,
        lambda d, t: (*rows(d, t, 2), *parameters(d, t, 2, *row), EPS),
        residual_modulated_norm,
        4,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Pieces:
    yield (F.rms_norm(x.double(), (x.shape[-1],), weight.double(), eps),)


def rotated_norms(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float) -> Pieces:
    both = (
        next(rms_norm(x, w, eps))[0].unflatten(-1, (-1, rope.shape[-1], 2)) for x, w in ((q, q_weight), (k, k_weight))
    )
    yield tuple(torch.view_as_real(torch.view_as_complex(x.contiguous()) * rope).flatten(-2) for x in both)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Pieces:
    yield (F.layer_norm(x.double(), (x.shape[-1],), eps=eps) * (1 + scale.double()) + shift.double(),)


def residual(x: Tensor, gate: Tensor, branch: Tensor) -> Pieces:
    yield (x.double() + gate.double() * branch.double(),)


def gated_residual_norm(x: Tensor, gate: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Pieces:
    x = x.double() + gate.double() * branch.double()
    yield x, F.layer_norm(x, (x.shape[-1],), weight.double(), bias.double(), eps)


def residual_modulated_norm(x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Pieces:
    x = x.double() + branch.double()
    yield x, next(modulated_norm(x, shift, scale, eps))[0]


def norm_silu(stage: str, carried: bool, B: int = 1) -> Case:
    C, T, H, W = VAE_STAGES[stage]

    def frames(device: torch.device, dtype: torch.dtype, count: int) -> Tensor:
        return randn(device, dtype, B, count, H, W, C).permute(0, 4, 1, 2, 3)

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        before = frames(device, dtype, 2) if carried else None
        return frames(device, dtype, T), randn(device, dtype, C, 1, 1, 1), before, 2

    def reference(x: Tensor, gamma: Tensor, before: Tensor | None, zeros: int) -> Pieces:
        for t in range(zeros):
            yield (torch.zeros_like(x[:, :, :1]).double() if before is None else before[:, :, t : t + 1].double(),)
        for t in range(T):
            yield (F.silu(F.normalize(x[:, :, t : t + 1].double(), dim=1) * C**0.5 * gamma.double()),)

    shape = f"{stage} of 1080p, {'after frames' if carried else 'after zeros'}"
    return Case(
        "norm_silu_after", shape, vae.norm_silu_after, make, reference,
        numbers=(2 * T + (4 if carried else 2)) * C * H * W, axis=2, piece=1,
    )  # fmt: skip


def images(name: str, count: int, tokens: int, C: int = 384) -> Case:
    def reference(qkv: Tensor) -> Pieces:
        for image in qkv.double():
            q, k, v = image.chunk(3, dim=1)
            yield (torch.cat([(part @ k.T / C**0.5).softmax(-1) @ v for part in q.split(2048)])[None],)

    return Case(
        "attend_images", f"{count} of {name}", attend_images, lambda *a: (randn(*a, count, tokens, 3 * C),), reference,
        flops=4.0 * count * tokens**2 * C, numbers=4 * count * tokens * C, piece=1,
    )  # fmt: skip

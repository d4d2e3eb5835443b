"""Scaled dot-product attention, full or in local windows, over q, k, v of shape (B, T, H, W, heads, head_dim).

Windows never need a sparse kernel: every window is gathered into one dense batch, attended, and read back; only our
own kernel reads and writes them in place. Windows clamp inwards at the real border of the frame instead of being padded
or masked, so each query always sees a full window of real tokens, and every backend computes the same mask (DESIGN
section 2).
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from duovsr.kernels.backends import Remembered, cuda_milliseconds, fastest, usable
from duovsr.kernels.dispatch import needs_gradient
from duovsr.options import WindowConfig

_PROBED_TOKENS = 2**14  # of full attention at most: beyond, all of them are bound by arithmetic
_FEW_KEYS = 512  # so many at most: two products in bfloat16 take two thirds of the time of torch's own on a CPU


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: WindowConfig | None = None,
    *,
    shifted: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attend from q (B, T, H, W, heads, head_dim) to k, v; returns the shape of q.

    Without `window`, every query sees every key; k and v may have another length on the first axis after B (text as
    (B, L, 1, 1, heads, head_dim)). With `window`, a query sees the positions of its own spatial window only: of all
    frames where `window.past` is None; else k and v hold `past` more latent frames in front than q, and query frame t
    sees key frames t .. t + past. `shifted` moves the window grid by half a window, for every other layer.

    `backend`: one that `backends.require` lets pass, or auto: torch's on a CPU, what was measured to be the fastest on
    a GPU. Where a gradient is wanted it is torch's.
    """
    if needs_gradient(q, k, v) or (backend == "auto" and not q.is_cuda):
        backend = "sdpa"
    elif backend == "auto":
        places = None if window is None else (window.height, window.width, window.past)
        backend = _measured(q.get_device(), q.dtype, tuple(q.shape), tuple(k.shape), places)
    if backend == "triton":
        return _fused(q, k, v, window, shifted)
    return _by_dense_calls(q, k, v, window, shifted, backend)


def _by_dense_calls(
    q: Tensor, k: Tensor, v: Tensor, window: WindowConfig | None, shifted: bool, backend: str
) -> Tensor:
    if window is None:
        return _dense(q.flatten(1, 3), k.flatten(1, 3), v.flatten(1, 3), backend).view_as(q)
    B, T, H, W, heads, head_dim = q.shape
    gather, scatter = _window_indices(H, W, window.height, window.width, shifted, q.device)
    if window.past is None:
        return _over_all_frames(q, k, v, gather, scatter, backend)
    windows, length = gather.shape
    steps = torch.arange(T, device=q.device).view(T, 1, 1, 1)
    seen = torch.arange(window.past + 1, device=q.device).view(1, 1, -1, 1)
    query_index = steps[..., 0] * H * W + gather  # (T, windows, length)
    key_index = (steps + seen) * H * W + gather[:, None]  # (T, windows, past + 1, length)

    def to_windows(x: Tensor, index: Tensor) -> Tensor:
        x = x.reshape(B, -1, heads * head_dim).index_select(1, index.flatten())
        return x.view(B * T * windows, -1, heads, head_dim)

    out = _dense(to_windows(q, query_index), to_windows(k, key_index), to_windows(v, key_index), backend)
    out = out.reshape(B, T, windows * length, heads * head_dim).index_select(2, scatter)
    return out.view(B, T, H, W, heads, head_dim)


def _over_all_frames(q: Tensor, k: Tensor, v: Tensor, gather: Tensor, scatter: Tensor, backend: str) -> Tensor:
    """Each spatial window, of all frames of the call together."""
    B, T, H, W, heads, head_dim = q.shape
    windows, length = gather.shape

    def to_windows(x: Tensor) -> Tensor:
        x = x.flatten(2, 3).index_select(2, gather.flatten()).unflatten(2, (windows, length))
        return x.transpose(1, 2).reshape(B * windows, T * length, heads, head_dim)

    out = _dense(to_windows(q), to_windows(k), to_windows(v), backend)
    out = out.reshape(B, windows, T, length, heads, head_dim)
    return out.transpose(1, 2).flatten(2, 3).index_select(2, scatter).view_as(q)


def _dense(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """(B, N, heads, head_dim) -> (B, N, heads, head_dim)."""
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    if backend == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _dense(q, k, v, "sdpa")
    few = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[1] <= _FEW_KEYS
    if few and not needs_gradient(q, k, v):
        return _by_products(q, k, v)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `_dense`, the weights of all keys at once."""
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B heads, N, head_dim)
    scores = torch.baddbmm(q.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), values).unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, window: WindowConfig | None, shifted: bool) -> Tensor:
    if window is None:
        return torch.ops.duovsr.attend(q.flatten(1, 3), k.flatten(1, 3), v.flatten(1, 3)).view_as(q)
    past = -1 if window.past is None else window.past
    return torch.ops.duovsr.attend_windows(q, k, v, window.height, window.width, past, shifted)


@torch.compiler.assume_constant_result
def _measured(
    device: int,
    dtype: torch.dtype,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    window: tuple[int, int, int | None] | None,
) -> str:
    """The fastest backend for such shapes; a frozen answer, so that a compiled graph can hold it."""
    return _probe(device, dtype, q_shape, k_shape, window)


@cache
def _probe(
    device: int,
    dtype: torch.dtype,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    window: tuple[int, int, int | None] | None,
) -> str:
    place, heads, head_dim = torch.device("cuda", device), q_shape[4], q_shape[5]
    counts = [_power_of_two(shape[0] * shape[1] * shape[2] * shape[3]) for shape in (q_shape, k_shape)]
    kind = "full" if window is None else "window {}x{} past {}".format(*window)
    shape = f"{kind}, {heads} heads of {head_dim}, {dtype}, {counts[0]} to {counts[1]} tokens"
    if window is None:
        q_shape, k_shape = (
            (s[0], min(s[1] * s[2] * s[3], _PROBED_TOKENS), 1, 1, heads, head_dim) for s in (q_shape, k_shape)
        )
    config = None if window is None else WindowConfig(*window)
    with torch.inference_mode():
        own = torch.Generator(place)  # the global one is the caller's
        q, k, v = (torch.randn(s, generator=own, dtype=dtype, device=place) for s in (q_shape, k_shape, k_shape))
        candidates = {
            name: partial(attention, q, k, v, config, backend=name) for name in usable(place, dtype, head_dim)
        }
        return fastest(shape, candidates, Remembered.of(place), cuda_milliseconds)


def _power_of_two(n: int) -> int:
    """The least that is not below n: classes of like sizes."""
    return 1 << (n - 1).bit_length()


def window_starts(length: int, window: int, shifted: bool) -> list[tuple[int, int, int]]:
    """Windows along one axis as (start of its tokens, first owned token, end of owned tokens).

    Owned ranges tile [0, length); tokens of a window that would leave the frame are moved inwards.
    """
    if length <= window:
        return [(0, 0, length)]
    first = window // 2 if shifted else 0
    edges = sorted({0, *range(first, length, window), length})
    return [
        (min(max(end - window if start == 0 else start, 0), length - window), start, end)
        for start, end in pairwise(edges)
    ]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cache outlives the mode: training may be the next to read it
def _window_indices(
    H: int, W: int, height: int, width: int, shifted: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(windows, tokens a window) positions to gather, and for each position of the frame where its owner left it."""
    rows, columns = window_starts(H, height, shifted), window_starts(W, width, shifted)
    height, width = min(height, H), min(width, W)
    gather = torch.empty(len(rows) * len(columns), height * width, dtype=torch.long)
    scatter = torch.empty(H, W, dtype=torch.long)
    for i, (y, y0, y1) in enumerate(rows):
        for j, (x, x0, x1) in enumerate(columns):
            n = i * len(columns) + j
            ys, xs = torch.arange(y, y + height), torch.arange(x, x + width)
            gather[n] = (ys[:, None] * W + xs[None, :]).flatten()
            slots = n * height * width + torch.arange(height * width).view(height, width)
            scatter[y0:y1, x0:x1] = slots[y0 - y : y1 - y, x0 - x : x1 - x]
    return gather.to(device), scatter.flatten().to(device)

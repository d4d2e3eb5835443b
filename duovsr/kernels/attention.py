"""Scaled dot-product attention, full or in local windows, over q, k, v of shape (B, T, H, W, heads, head_dim).

Windows never need a compiled sparse kernel: every window is gathered into one dense batch, attended, and read back.
Windows clamp inwards at the real border of the frame instead of being padded or masked, so each query always sees a
full window of real tokens, and every backend computes the same mask (DESIGN section 2).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.options import WindowConfig


def attention(q: Tensor, k: Tensor, v: Tensor, window: WindowConfig | None = None, *, shifted: bool = False) -> Tensor:
    """Attend from q (B, T, H, W, heads, head_dim) to k, v; returns the shape of q.

    Without `window`, every query sees every key; k and v may have another length on the first axis after B (text as
    (B, L, 1, 1, heads, head_dim)). With `window`, a query sees the positions of its own spatial window only: of all
    frames where `window.past` is None; else k and v hold `past` more latent frames in front than q, and query frame t
    sees key frames t .. t + past. `shifted` moves the window grid by half a window, for every other layer.
    """
    if window is None:
        return _dense(q.flatten(1, 3), k.flatten(1, 3), v.flatten(1, 3)).view_as(q)
    B, T, H, W, heads, head_dim = q.shape
    gather, scatter = _window_indices(H, W, window.height, window.width, shifted, q.device)
    if window.past is None:
        return _over_all_frames(q, k, v, gather, scatter)
    windows, length = gather.shape
    steps = torch.arange(T, device=q.device).view(T, 1, 1, 1)
    seen = torch.arange(window.past + 1, device=q.device).view(1, 1, -1, 1)
    query_index = steps[..., 0] * H * W + gather  # (T, windows, length)
    key_index = (steps + seen) * H * W + gather[:, None]  # (T, windows, past + 1, length)

    def to_windows(x: Tensor, index: Tensor) -> Tensor:
        x = x.reshape(B, -1, heads * head_dim).index_select(1, index.flatten())
        return x.view(B * T * windows, -1, heads, head_dim)

    out = _dense(to_windows(q, query_index), to_windows(k, key_index), to_windows(v, key_index))
    out = out.reshape(B, T, windows * length, heads * head_dim).index_select(2, scatter)
    return out.view(B, T, H, W, heads, head_dim)


def _over_all_frames(q: Tensor, k: Tensor, v: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
    """Each spatial window, of all frames of the call together."""
    B, T, H, W, heads, head_dim = q.shape
    windows, length = gather.shape

    def to_windows(x: Tensor) -> Tensor:
        x = x.flatten(2, 3).index_select(2, gather.flatten()).unflatten(2, (windows, length))
        return x.transpose(1, 2).reshape(B * windows, T * length, heads, head_dim)

    out = _dense(to_windows(q), to_windows(k), to_windows(v)).reshape(B, windows, T, length, heads, head_dim)
    return out.transpose(1, 2).flatten(2, 3).index_select(2, scatter).view_as(q)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, heads, head_dim) -> (B, N, heads, head_dim)."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


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
        for start, end in zip(edges, edges[1:], strict=False)
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

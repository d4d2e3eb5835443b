# mypy: allow-untyped-defs, allow-incomplete-defs
"""Softmax attention in one pass over the keys: scores never leave the chip, and sums are float32.

A window's tokens are read and written where they lie in the frame: there is no gather and no scatter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from duovsr.kernels.fused import tiles

LOG2_E = 1.4426950408889634


@triton.jit
def _owned(i, length, window: tl.constexpr, first):
    """Window `i` along an axis: its first token and the tokens that it owns, [begin, end). As `window_starts` has it;
    `first` is how many tokens the first one owns."""
    begin = tl.maximum(0, first + (i - 1) * window)
    end = tl.minimum(length, first + i * window)
    return tl.minimum(begin, length - window), begin, end


@triton.jit
def _rows(n, frame, y, x, H, W, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Where token `n` of the window at (frame, y, x) lies among the tokens of all frames. int64, as what follows from
    it may pass 2^31."""
    if WINDOW_H > 0:
        row, column = y + n // WINDOW_W % WINDOW_H, x + n % WINDOW_W
        n = ((frame + n // (WINDOW_H * WINDOW_W)) * H + row) * W + column
    return n.to(tl.int64)


@triton.jit
def _absorb(
    q, k_ptr, v_ptr, rows, k_token, v_token, real, scale, highest, total, mixed,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys and values into the running maximum, sum and mixture. MASKED: not all of its rows are real."""
    d = tl.arange(0, HEAD_DIM)
    k_block = k_ptr + rows[None, :] * k_token + d[:, None]
    v_block = v_ptr + rows[:, None] * v_token + d[None, :]
    if MASKED:
        scores = tl.dot(q, tl.load(k_block, mask=real[None, :], other=0.0), input_precision=PRECISION)
        scores = tl.where(real[None, :], scores, float("-inf"))
        values = tl.load(v_block, mask=real[:, None], other=0.0)
    else:
        scores = tl.dot(q, tl.load(k_block), input_precision=PRECISION)
        values = tl.load(v_block)
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision=PRECISION)
    return new_highest, total, mixed


@triton.jit(do_not_specialize=["queries", "keys", "heads", "H", "W", "windows", "window_columns", "first_h", "first_w"])
def attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, out_batch, out_token, out_head,
    queries, keys, heads, H, W, windows, window_columns, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, first_h, first_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, batch and head). Full attention where WINDOW_H is 0; else `queries` and `keys` are
    those of a window, blocks count through the windows, and a window of frame t sees keys from frame t on."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    out_ptr += batch * out_batch + head * out_head
    blocks = tl.cdiv(queries, BLOCK_M)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    frame, y, x = 0, 0, 0
    written = m < queries
    if WINDOW_H > 0:
        window = tl.program_id(0) // blocks
        frame, window = window // windows, window % windows
        y, top, bottom = _owned(window // window_columns, H, WINDOW_H, first_h)
        x, left, right = _owned(window % window_columns, W, WINDOW_W, first_w)
        row, column = y + m // WINDOW_W % WINDOW_H, x + m % WINDOW_W
        written = written & (row >= top) & (row < bottom) & (column >= left) & (column < right)
    d, n = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_N)
    q_rows = _rows(m, frame, y, x, H, W, WINDOW_H, WINDOW_W)
    q = tl.load(q_ptr + q_rows[:, None] * q_token + d[None, :], mask=(m < queries)[:, None], other=0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        rows = _rows(start + n, frame, y, x, H, W, WINDOW_H, WINDOW_W)
        highest, total, mixed = _absorb(
            q, k_ptr, v_ptr, rows, k_token, v_token, n, scale, highest, total, mixed, HEAD_DIM, False, PRECISION
        )
    if whole < keys:
        rows = _rows(whole + n, frame, y, x, H, W, WINDOW_H, WINDOW_W)
        real = n < keys - whole
        highest, total, mixed = _absorb(
            q, k_ptr, v_ptr, rows, k_token, v_token, real, scale, highest, total, mixed, HEAD_DIM, True, PRECISION
        )
    out = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + q_rows[:, None] * out_token + d[None, :], out, mask=written[:, None])


def config(head_dim: int, dtype: torch.dtype, queries: int, capability: tuple[int, int]) -> dict[str, int]:
    """Block sizes, warps and stages: the largest that spill no register. From a table and not tuned at run time, so
    that a machine always computes the same sums."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if queries <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    if head_dim <= 64:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    if capability[0] == 9:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: int,
    keys: int,
    calls: int,
    frame: tuple[int, ...],
    window: dict[str, int],
) -> Tensor:
    """q (B, Q, heads, head_dim), k and v (B, K, heads, head_dim) -> like q, dense. `calls`: windows of all frames."""
    B, _, heads, head_dim = q.shape
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    blocks = config(head_dim, q.dtype, queries, tiles.capability(q))
    wrap_triton(attend_kernel)[(triton.cdiv(queries, blocks["BLOCK_M"]) * calls, B * heads)](
        *(q, k, v, out),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *(queries, keys, heads, *frame, LOG2_E / head_dim**0.5),
        HEAD_DIM=head_dim,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        **window,
        **blocks,
    )
    return out


@triton_op("duovsr::attend", mutates_args={})
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, Q, heads, head_dim) to all of k and v (B, K, heads, head_dim)."""
    nowhere = {"WINDOW_H": 0, "WINDOW_W": 0, "first_h": 0, "first_w": 0}
    return _launch(q, k, v, q.shape[1], k.shape[1], 1, (1, 1, 1, 1), nowhere)


@triton_op("duovsr::attend_windows", mutates_args={})
def attend_windows(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, past: int, shifted: bool) -> Tensor:
    """As `duovsr.kernels.attention.attention`; all frames of the call see each other where `past` is negative."""
    B, T, H, W, heads, head_dim = q.shape
    rows, first_h = _cut(H, height, shifted)
    columns, first_w = _cut(W, width, shifted)
    height, width = min(height, H), min(width, W)
    tokens = height * width
    queries, keys, steps = (T * tokens, T * tokens, 1) if past < 0 else (tokens, (past + 1) * tokens, T)
    window = {"WINDOW_H": height, "WINDOW_W": width, "first_h": first_h, "first_w": first_w}
    flat_q, flat_k, flat_v = (x.flatten(1, 3) for x in (q, k, v))
    frame = H, W, rows * columns, columns
    return _launch(flat_q, flat_k, flat_v, queries, keys, steps * rows * columns, frame, window).view(q.shape)


def _cut(length: int, window: int, shifted: bool) -> tuple[int, int]:
    """How many windows an axis has, and how many tokens the first one owns."""
    if length <= window:
        return 1, length
    first = window // 2 if shifted and window > 1 else window
    return 1 + triton.cdiv(length - first, window), first

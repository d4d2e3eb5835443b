# mypy: allow-untyped-defs, allow-incomplete-defs
"""Between two convolutions of the Wan2.1 VAE: RMS norm and SiLU, written where the next one reads; and its attention,
whose one head is wider than flash kernels go."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from duovsr.kernels.fused import tiles
from duovsr.kernels.fused.attention import LOG2_E


@triton.jit(do_not_specialize=["rows", "frame", "frames", "earlier"])
def norm_silu_kernel(
    x_ptr, gamma_ptr, before_ptr, out_ptr, rows, frame, frames, earlier, C, root_of_c,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """Rows of C channels. Of `frames` frames of `frame` rows, the first `earlier` ones come from `before` if CARRIED
    and are zeros otherwise; the others are x's, normed."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    clip, t, place = row // (frame * frames), row // frame % frames, row % frame
    is_new = (t >= earlier)[:, None]
    mask = (row < rows)[:, None] & (c < C)[None, :]
    x_row = ((clip * (frames - earlier) + t - earlier) * frame + place).to(tl.int64)
    x = tl.load(x_ptr + x_row[:, None] * C + c[None, :], mask=mask & is_new, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)
    x = x * (root_of_c / length)[:, None] * gamma[None, :]
    out = (x / (1 + tl.exp(-x))).to(out_ptr.dtype.element_ty)
    if CARRIED:
        before_row = ((clip * earlier + t) * frame + place).to(tl.int64)
        before = tl.load(
            before_ptr + before_row[:, None] * C + c[None, :], mask=mask & (t < earlier)[:, None], other=0.0
        )
        out = tl.where(is_new, out, before.to(out.dtype))
    tl.store(out_ptr + row.to(tl.int64)[:, None] * C + c[None, :], out, mask=mask)


@triton_op("duovsr::norm_silu_after", mutates_args={})
def norm_silu_after(x: Tensor, gamma: Tensor, before: Tensor | None, zeros: int) -> Tensor:
    B, C, T, H, W = x.shape
    x = x.contiguous(memory_format=torch.channels_last_3d)
    earlier = zeros if before is None else before.shape[2]
    carried = x if before is None else before.contiguous(memory_format=torch.channels_last_3d)
    out = torch.empty(B, earlier + T, H, W, C, dtype=x.dtype, device=x.device)
    rows, tile = out.numel() // C, tiles.row_tiles(C)
    wrap_triton(norm_silu_kernel)[(triton.cdiv(rows, tile["ROWS"]),)](
        *(x, gamma, carried, out, rows, H * W, earlier + T, earlier, C, C**0.5),
        ROWS=tile["ROWS"],
        BLOCK_C=tile["BLOCK_D"],
        CARRIED=before is not None,
        num_warps=tile["num_warps"],
    )
    return out.permute(0, 4, 1, 2, 3)


@triton.jit
def _third(ptr, rows, token, part, THIRD: tl.constexpr):
    """Pointers to a third of the channels of `rows`: a block's sides are powers of two, and 384 is three of them."""
    return ptr + rows[:, None] * token + (part * THIRD + tl.arange(0, THIRD))[None, :]


@triton.jit(do_not_specialize=["tokens"])
def attend_images_kernel(
    qkv_ptr, out_ptr, tokens, image, token, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, THIRD: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, image) of `tokens` tokens, whose q, k and v of 3 THIRD channels follow each other."""
    qkv_ptr += tl.program_id(1).to(tl.int64) * image
    out_ptr += tl.program_id(1).to(tl.int64) * tokens * (3 * THIRD)
    k_ptr, v_ptr = qkv_ptr + 3 * THIRD, qkv_ptr + 6 * THIRD
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_rows, there = m.to(tl.int64), (m < tokens)[:, None]
    q0 = tl.load(_third(qkv_ptr, q_rows, token, 0, THIRD), mask=there, other=0.0)
    q1 = tl.load(_third(qkv_ptr, q_rows, token, 1, THIRD), mask=there, other=0.0)
    q2 = tl.load(_third(qkv_ptr, q_rows, token, 2, THIRD), mask=there, other=0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed0 = tl.zeros([BLOCK_M, THIRD], tl.float32)
    mixed1 = tl.zeros([BLOCK_M, THIRD], tl.float32)
    mixed2 = tl.zeros([BLOCK_M, THIRD], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        rows, real = n.to(tl.int64), (n < tokens)[:, None]
        scores = tl.dot(q0, tl.load(_third(k_ptr, rows, token, 0, THIRD), mask=real, other=0.0).T)
        scores = tl.dot(q1, tl.load(_third(k_ptr, rows, token, 1, THIRD), mask=real, other=0.0).T, scores)
        scores = tl.dot(q2, tl.load(_third(k_ptr, rows, token, 2, THIRD), mask=real, other=0.0).T, scores)
        scores = tl.where((n < tokens)[None, :], scores * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total, highest = total * shrink + tl.sum(weights, 1), new_highest
        weights = weights.to(q0.dtype)
        v0 = tl.load(_third(v_ptr, rows, token, 0, THIRD), mask=real, other=0.0)
        mixed0 = tl.dot(weights, v0, mixed0 * shrink[:, None])
        v1 = tl.load(_third(v_ptr, rows, token, 1, THIRD), mask=real, other=0.0)
        mixed1 = tl.dot(weights, v1, mixed1 * shrink[:, None])
        v2 = tl.load(_third(v_ptr, rows, token, 2, THIRD), mask=real, other=0.0)
        mixed2 = tl.dot(weights, v2, mixed2 * shrink[:, None])
    out_type = out_ptr.dtype.element_ty
    out_token: tl.constexpr = 3 * THIRD
    tl.store(_third(out_ptr, q_rows, out_token, 0, THIRD), (mixed0 / total[:, None]).to(out_type), mask=there)
    tl.store(_third(out_ptr, q_rows, out_token, 1, THIRD), (mixed1 / total[:, None]).to(out_type), mask=there)
    tl.store(_third(out_ptr, q_rows, out_token, 2, THIRD), (mixed2 / total[:, None]).to(out_type), mask=there)


def image_config(capability: tuple[int, int]) -> dict[str, int]:
    """Block sizes, warps and stages. A second stage needs 100 KiB of shared memory, which only the large GPUs have."""
    large = capability == (8, 0) or capability[0] in (9, 10)
    return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2 if large else 1}


@triton_op("duovsr::attend_images", mutates_args={})
def attend_images(qkv: Tensor) -> Tensor:
    """qkv (N, L, 3 C) -> (N, L, C)."""
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    N, L, channels = qkv.shape
    C = channels // 3
    out = torch.empty(N, L, C, dtype=qkv.dtype, device=qkv.device)
    chosen = image_config(tiles.capability(qkv))
    wrap_triton(attend_images_kernel)[(triton.cdiv(L, chosen["BLOCK_M"]), N)](
        qkv, out, L, qkv.stride(0), qkv.stride(1), LOG2_E / C**0.5, THIRD=C // 3, **chosen
    )
    return out

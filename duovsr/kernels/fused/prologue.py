# mypy: allow-untyped-defs, allow-incomplete-defs
"""Queries and keys on their way from the projections to attention: normed over all channels, then rotated."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from duovsr.kernels.fused import tiles


@triton.jit
def _norm_rows(
    x_ptr, weight_ptr, rotations_ptr, out_ptr, rows, places, D, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Row r stands at place r % `places` of the rotations; it is not rotated where HEAD_DIM is 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    block = row.to(tl.int64)[:, None] * D + d[None, :]
    mask = (row < rows)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + block, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * weight[None, :]
    if HEAD_DIM > 0:
        # A place's rotations are (cos, sin) pairs: HEAD_DIM numbers, which lie as a head's channels do.
        angles = (row % places).to(tl.int64)[:, None] * HEAD_DIM + (d % HEAD_DIM)[None, :]
        cos, sin = tl.split(tl.reshape(tl.load(rotations_ptr + angles, mask=mask, other=0.0), [ROWS, BLOCK_D // 2, 2]))
        even, odd = tl.split(tl.reshape(x, [ROWS, BLOCK_D // 2, 2]))
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [ROWS, BLOCK_D])
    tl.store(out_ptr + block, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "places"])
def prologue_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, rotations_ptr, q_out_ptr, k_out_ptr, rows, places, D, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, 0 for queries or 1 for keys)."""
    if tl.program_id(1) == 0:
        _norm_rows(q_ptr, q_weight_ptr, rotations_ptr, q_out_ptr, rows, places, D, eps, ROWS, BLOCK_D, HEAD_DIM)
    else:
        _norm_rows(k_ptr, k_weight_ptr, rotations_ptr, k_out_ptr, rows, places, D, eps, ROWS, BLOCK_D, HEAD_DIM)


@triton_op("duovsr::rms_norm", mutates_args={})
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    D = x.shape[-1]
    rows, tile = x.numel() // D, tiles.row_tiles(D)
    wrap_triton(prologue_kernel)[(triton.cdiv(rows, tile["ROWS"]), 1)](
        x, x, weight, weight, weight, out, out, rows, 1, D, eps, HEAD_DIM=0, **tile
    )
    return out


@triton_op("duovsr::rotated_norms", mutates_args={})
def rotated_norms(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rotations: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    q, k, angles = q.contiguous(), k.contiguous(), torch.view_as_real(rotations).contiguous()
    D, head_dim = q.shape[-1], 2 * rotations.shape[-1]
    rows, tile = q.numel() // D, tiles.row_tiles(D)
    q_out, k_out = (torch.empty_like(x) for x in (q, k))
    wrap_triton(prologue_kernel)[(triton.cdiv(rows, tile["ROWS"]), 2)](
        *(q, k, q_weight, k_weight, angles, q_out, k_out),
        *(rows, rotations.numel() // rotations.shape[-1], D, eps),
        HEAD_DIM=head_dim,
        **tile,
    )
    heads = D // head_dim
    return q_out.unflatten(-1, (heads, head_dim)), k_out.unflatten(-1, (heads, head_dim))

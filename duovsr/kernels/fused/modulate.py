# mypy: allow-untyped-defs, allow-incomplete-defs
"""The transformer's residual stream: x + gate branch, and LayerNorm of it with a scale and a shift, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from duovsr.kernels.fused import tiles


@triton.jit(do_not_specialize=["rows", "rows_of_batch"])
def residual_norm_kernel(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, sum_ptr, out_ptr, rows, rows_of_batch, D, one, eps,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
    PER_BATCH: tl.constexpr,
):  # fmt: skip
    """x + gate branch where there is a BRANCH (with a GATE), stored; and where there is a NORM, its LayerNorm times
    (`one` + scale) plus shift. Gates have a row for each batch; so have scales and shifts, if PER_BATCH."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    wide = (d < D)[None, :]
    mask = (row < rows)[:, None] & wide
    block = row.to(tl.int64)[:, None] * D + d[None, :]
    of_batch = (row // rows_of_batch)[:, None] * D + d[None, :]
    x = tl.load(x_ptr + block, mask=mask, other=0.0).to(tl.float32)
    if BRANCH:
        branch = tl.load(branch_ptr + block, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            branch *= tl.load(gate_ptr + of_batch, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + branch).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + block, rounded, mask=mask)
        x = rounded.to(tl.float32)
    if NORM:
        centred = tl.where(wide, x - (tl.sum(x, 1) / D)[:, None], 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
        if PER_BATCH:
            scale = tl.load(scale_ptr + of_batch, mask=mask, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + of_batch, mask=mask, other=0.0).to(tl.float32)
        else:
            scale = tl.load(scale_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            shift = tl.load(shift_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        out = normed * (one + scale) + shift
        tl.store(out_ptr + block, out.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The sum and the norm, of which one may be x itself. `norm`: scale, shift, and what is added to the scale."""
    x = x.contiguous()
    summed = x if branch is None else torch.empty_like(x)
    out = x if norm is None else torch.empty_like(x)
    B, D = x.shape[0], x.shape[-1]

    def rows_of(t: Tensor | None) -> Tensor:
        """Parameters (D,), or a row for each of the batch; what is not there is not read."""
        return x if t is None else (t if t.dim() == 1 else t.expand(B, *t.shape[1:])).contiguous()

    scale, shift, one = norm or (None, None, 0.0)
    rows, tile = x.numel() // D, tiles.row_tiles(D)
    wrap_triton(residual_norm_kernel)[(triton.cdiv(rows, tile["ROWS"]),)](
        *(x, x if branch is None else branch.contiguous(), rows_of(gate), rows_of(scale), rows_of(shift), summed, out),
        *(rows, rows // B, D, one, eps),
        BRANCH=branch is not None,
        GATE=gate is not None,
        NORM=norm is not None,
        PER_BATCH=scale is not None and scale.dim() > 1,
        **tile,
    )
    return summed, out


@triton_op("duovsr::modulated_norm", mutates_args={})
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _launch(x, norm=(scale, shift, 1.0), eps=eps)[1]


@triton_op("duovsr::gated_residual", mutates_args={})
def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    return _launch(x, branch, gate)[0]


@triton_op("duovsr::gated_residual_norm", mutates_args={})
def gated_residual_norm(
    x: Tensor, gate: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(x, branch, gate, (weight, bias, 0.0), eps)


@triton_op("duovsr::residual_modulated_norm", mutates_args={})
def residual_modulated_norm(
    x: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(x, branch, norm=(scale, shift, 1.0), eps=eps)

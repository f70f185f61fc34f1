"""LayerNorm over rows that also gives the row mean, LS's GAP of a token, with the residual add in the same pass.

A program holds whole rows in registers: each input is read once, each output written once, and the variance is taken in
two steps. The backward joins the gradients of the norm, the residual path, the skip and the mean in one pass.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong_fast.kernels.common import config_for, dense, narrow, on_device

#: Longest row a program keeps in registers.
MAX_WIDTH = 8192


@triton.jit
def layer_norm_forward_kernel(
    x,  # (M, D)
    branch,  # (M, D), or None: no addition
    weight,  # (D)
    bias,  # (D)
    total,  # (M, D), out where there is a branch: x + branch
    copy,  # (M, D), out, or None: the total in a narrower dtype
    out,  # (M, D), out
    mean,  # (M) fp32, out
    rstd,  # (M) fp32, out
    M,
    D,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = LN(x + branch), with mean and 1/σ of the rows of the stored sum."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    at = rows[:, None] * D + columns[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        value += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        stored = narrow(value, total.dtype.element_ty)
        tl.store(total + at, stored, mask=inside)
        # What the backward and everyone else will read: the statistics are of the rounded sum.
        value = stored.to(tl.float32)
    if copy is not None:
        tl.store(copy + at, narrow(value, copy.dtype.element_ty), mask=inside)
    row_mean = tl.sum(value, 1) / D
    centred = tl.where(inside, value - row_mean[:, None], 0.0)
    row_rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    tl.store(mean + rows, row_mean, mask=rows < M)
    tl.store(rstd + rows, row_rstd, mask=rows < M)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
    normed = centred * row_rstd[:, None] * w[None, :] + b[None, :]
    tl.store(out + at, narrow(normed, out.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_backward_kernel(
    grad_out,  # (M, D): at the normalised output
    grad_mean,  # (M) fp32, or None
    grad_total,  # (M, D), or None: along the residual path
    grad_skip,  # (M, D), or None: along the long skip
    total,  # (M, D): what was normalised
    mean,  # (M) fp32
    rstd,  # (M) fp32
    weight,  # (D)
    grad,  # (M, D), out: of total
    copy,  # (M, D), out, or None: the same in the branch's narrower dtype
    partial,  # (2, programs, D) fp32, out: each program's sums for the weight and the bias
    M,
    D,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad = LN'(grad_out) + grad_total + grad_skip + grad_mean / D.

    A program takes every PROGRAMS-th block of rows and sums its weight and bias gradients in that order, so that a
    repeated call gives the same bits.
    """
    columns = tl.arange(0, BLOCK_D)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    # Summed over rows once, at the end: within the loop that would cost a trip through shared memory per block.
    grad_weight = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_bias = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), PROGRAMS):
        rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (rows < M)[:, None] & (columns < D)[None, :]
        at = rows[:, None] * D + columns[None, :]
        row_mean = tl.load(mean + rows, mask=rows < M, other=0.0)
        row_rstd = tl.load(rstd + rows, mask=rows < M, other=0.0)
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, (value - row_mean[:, None]) * row_rstd[:, None], 0.0)
        grad_weight += g * normed
        grad_bias += g
        g *= w[None, :]
        along = tl.sum(g * normed, 1) / D
        shift = tl.sum(g, 1) / D
        result = (g - normed * along[:, None] - shift[:, None]) * row_rstd[:, None]
        if grad_mean is not None:
            result += (tl.load(grad_mean + rows, mask=rows < M, other=0.0) / D)[:, None]
        if grad_total is not None:
            result += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        if grad_skip is not None:
            result += tl.load(grad_skip + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad + at, narrow(result, grad.dtype.element_ty), mask=inside)
        if copy is not None:
            tl.store(copy + at, narrow(result, copy.dtype.element_ty), mask=inside)
    at = tl.program_id(0) * D + columns
    tl.store(partial + at, tl.sum(grad_weight, 0), mask=columns < D)
    tl.store(partial + tl.num_programs(0) * D + at, tl.sum(grad_bias, 0), mask=columns < D)


@triton.jit
def layer_norm_sum_kernel(
    partial,  # (2, P, D) fp32
    grad_weight,  # (D), out
    grad_bias,  # (D), out
    P,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over P, in a fixed order: the weight's half (program 0 of axis 1) or the bias's."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    half = tl.program_id(1)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & (columns < D)[None, :]
        total += tl.load(partial + (half * P + p)[:, None] * D + columns[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if half == 0:
        tl.store(grad_weight + columns, narrow(result, grad_weight.dtype.element_ty), mask=columns < D)
    else:
        tl.store(grad_bias + columns, narrow(result, grad_bias.dtype.element_ty), mask=columns < D)


class Normed(NamedTuple):
    """What :func:`layer_norm_forward` returns.

    Attributes:
        out: ``(M, D)``: the normalised rows.
        mean, rstd: ``(M,)`` fp32: mean and 1/σ of the rows of ``total``.
        total: ``(M, D)``, dtype of x: x + branch; None without a branch.
        copy: ``total`` in ``copy_dtype``, or None.
    """

    out: Tensor
    mean: Tensor
    rstd: Tensor
    total: Tensor | None
    copy: Tensor | None


def layer_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    copy_dtype: torch.dtype | None = None,
) -> Normed:
    """Normalise the rows of x, or of x + branch, in one launch.

    Args:
        x: ``(..., D)``, D up to :data:`MAX_WIDTH`.
        branch: shape of x, or None.
        weight, bias: ``(D,)``.
        out_dtype: of the normalised rows.
        copy_dtype: dtype of a second, narrower copy of the sum; None writes none. Needs a branch.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    x = dense(x)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    total = None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    copy = None if copy_dtype is None else torch.empty(x.shape, dtype=copy_dtype, device=x.device)
    if rows:
        config = config_for("layer_norm_forward", x, width)
        with on_device(x):
            layer_norm_forward_kernel[(triton.cdiv(rows, config.meta["BLOCK_M"]),)](
                x, None if branch is None else dense(branch), dense(weight), dense(bias), total, copy, out, mean, rstd,
                rows, width, eps, BLOCK_D=triton.next_power_of_2(width), **config.kwargs(),
            )  # fmt: skip
    return Normed(out, mean, rstd, total, copy)


def layer_norm_backward(
    grad_out: Tensor,
    grad_mean: Tensor | None,
    grad_total: Tensor | None,
    grad_skip: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    copy_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Every gradient of :func:`layer_norm_forward`, in one launch over the features and a small one that sums.

    Args:
        grad_out: ``(..., D)``: of the normalised rows.
        grad_mean: ``(...)`` fp32, or None.
        grad_total, grad_skip: ``(..., D)``: gradients that reach the sum by the residual path and by the skip, or None.
        total: what was normalised, contiguous.
        mean, rstd: as the forward returned them.
        weight, bias: ``(D,)``; of the bias only the dtype is read.
        copy_dtype: dtype of a second, narrower copy of the gradient; None writes none.

    Returns:
        Gradient of ``total`` in its dtype, its copy or None, and those of weight and bias in their dtypes.
    """
    width = total.shape[-1]
    rows = total.numel() // width
    grad = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    copy = None if copy_dtype is None else torch.empty(total.shape, dtype=copy_dtype, device=total.device)
    if rows == 0:
        return grad, copy, torch.zeros_like(weight), torch.zeros_like(bias)
    config = config_for("layer_norm_backward", total, width)
    programs = min(config.meta["PROGRAMS"], triton.cdiv(rows, config.meta["BLOCK_M"]))
    partial = torch.empty(2, programs, width, dtype=torch.float32, device=total.device)
    parameters = tuple(torch.empty(width, dtype=t.dtype, device=t.device) for t in (weight, bias))
    with on_device(total):
        layer_norm_backward_kernel[(programs,)](
            dense(grad_out), None if grad_mean is None else dense(grad_mean),
            None if grad_total is None else dense(grad_total), None if grad_skip is None else dense(grad_skip),
            total, mean, rstd, dense(weight), grad, copy, partial, rows, width,
            BLOCK_D=triton.next_power_of_2(width), **config.kwargs(),
        )  # fmt: skip
        config = config_for("layer_norm_sum", total, width)
        layer_norm_sum_kernel[(triton.cdiv(width, config.meta["BLOCK_D"]), 2)](
            partial, *parameters, programs, width, **config.kwargs()
        )
    return grad, copy, *parameters

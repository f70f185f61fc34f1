"""Gradient of the dual product at its weight: dW = dyᵀ · [x | κ ⊙ s].

The sum runs over the rows, which are many where the weight is small: several programs share a tile of dW, each over a
range of rows, and their partial sums are added at the end, in a fixed order. κ scales the tile of dyᵀ: operand A may
come from registers, whereas a scaled operand B would go back to shared memory first. In fp16 κ · dy must stay below
65504, which a κ of at most 1 guarantees.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong_fast.kernels.common import config_for, dense, dot, narrow, on_device
from scalelong_fast.kernels.gemm import load_kappa, precision_of, processors


@triton.jit
def wgrad_kernel(
    grad,  # (M, D_OUT)
    x,  # (M, D_X)
    skip,  # (M, D_S)
    kappa,  # (B, L) by strides
    partial,  # (splits, D_OUT, D_X + D_S), out
    M,
    L,
    kappa_batch_stride,
    kappa_token_stride,
    rows_per_split,
    D_X: tl.constexpr,
    D_S: tl.constexpr,
    D_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of dW and one range of rows per program; BLOCK_M tiles D_OUT, BLOCK_K the rows."""
    EVEN_M: tl.constexpr = D_OUT % BLOCK_M == 0
    EVEN_N: tl.constexpr = D_X % BLOCK_N == 0 and D_S % BLOCK_N == 0
    TILES_X: tl.constexpr = (D_X + BLOCK_N - 1) // BLOCK_N
    TILES_S: tl.constexpr = (D_S + BLOCK_N - 1) // BLOCK_N
    tile_m = tl.program_id(0) // (TILES_X + TILES_S)
    tile_n = tl.program_id(0) % (TILES_X + TILES_S)
    split = tl.program_id(1).to(tl.int64)
    is_skip = tile_n >= TILES_X
    tile_n = tl.where(is_skip, tile_n - TILES_X, tile_n)
    width = tl.where(is_skip, D_S, D_X)
    first = tl.where(is_skip, D_X, 0)
    unit = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * rows_per_split
    end = tl.minimum(begin + rows_per_split, M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if is_skip:
        for start in range(begin, end, BLOCK_K):
            row = start + k
            inside = (row < end)[:, None]
            offset = row.to(tl.int64)[:, None]
            in_grad = inside if EVEN_M else inside & (unit < D_OUT)[None, :]
            in_half = inside if EVEN_N else inside & (column < width)[None, :]
            a = tl.load(grad + offset * D_OUT + unit[None, :], mask=in_grad, other=0.0)
            b = tl.load(skip + offset * D_S + column[None, :], mask=in_half, other=0.0)
            scale = load_kappa(kappa, tl.minimum(row, M - 1), L, kappa_batch_stride, kappa_token_stride)
            a = narrow(tl.trans(a).to(tl.float32) * tl.where(row < end, scale, 0.0)[None, :], grad.dtype.element_ty)
            acc = dot(a, b, acc, PRECISION)
    else:
        for start in range(begin, end, BLOCK_K):
            row = start + k
            inside = (row < end)[:, None]
            offset = row.to(tl.int64)[:, None]
            in_grad = inside if EVEN_M else inside & (unit < D_OUT)[None, :]
            in_half = inside if EVEN_N else inside & (column < width)[None, :]
            a = tl.load(grad + offset * D_OUT + unit[None, :], mask=in_grad, other=0.0)
            b = tl.load(x + offset * D_X + column[None, :], mask=in_half, other=0.0)
            acc = dot(tl.trans(a), b, acc, PRECISION)
    target = partial + split * (D_OUT * (D_X + D_S)) + unit[:, None] * (D_X + D_S) + first + column[None, :]
    stored = narrow(acc, partial.dtype.element_ty)
    if EVEN_M and EVEN_N:
        tl.store(target, stored)
    else:
        tl.store(target, stored, mask=(unit < D_OUT)[:, None] & (column < width)[None, :])


#: Fewest steps of BLOCK_K rows that are worth a program of their own.
LEAST_STEPS = 4


def wgrad(grad: Tensor, x: Tensor, skip: Tensor, kappa: Tensor) -> Tensor:
    """Launch the product.

    Args:
        grad: ``(B, L, D_out)``.
        x, skip, kappa: ``(B, L, D_x)``, ``(B, L, D_s)``, ``(B, L)``.

    Returns:
        ``(D_out, D_x + D_s)`` in the dtype of ``grad``.
    """
    batch, tokens, d_out = grad.shape
    d_x, d_s, rows = x.shape[2], skip.shape[2], batch * tokens
    if rows == 0:
        return torch.zeros(d_out, d_x + d_s, dtype=grad.dtype, device=grad.device)
    config = config_for("wgrad", grad, max(d_x, d_s, d_out))
    block_m, block_n, block_k = (config.meta[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(d_out, block_m) * (triton.cdiv(d_x, block_n) + triton.cdiv(d_s, block_n))
    steps = triton.cdiv(rows, block_k)
    splits = max(1, min(processors(grad) // tiles, steps // LEAST_STEPS))
    rows_per_split = triton.cdiv(steps, splits) * block_k
    dtype = grad.dtype if splits == 1 else torch.float32
    partial = torch.empty(splits, d_out, d_x + d_s, dtype=dtype, device=grad.device)
    with on_device(grad):
        wgrad_kernel[(tiles, splits)](
            dense(grad), dense(x), dense(skip), kappa, partial, rows, tokens, *kappa.stride(), rows_per_split,
            D_X=d_x, D_S=d_s, D_OUT=d_out, PRECISION=precision_of(grad), **config.kwargs(),
        )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0).to(grad.dtype)

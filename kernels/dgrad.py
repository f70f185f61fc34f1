"""Gradients of the dual product at its features: t = dy · W, then dx = t[:, :D_x], ds = κ ⊙ t_s and dκ = Σ t_s ⊙ s.

Either one kernel does it all in its epilogue, or cuBLAS makes t and :func:`skip_rows` the rest in one pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scalelong_fast.kernels.common import config_for, dense, dot, narrow, on_device
from scalelong_fast.kernels.gemm import (
    aligned,
    grouped_tile,
    halves,
    load_kappa,
    precision_of,
    processors,
    store_tile,
)


@triton.jit
def dgrad_kernel(
    grad,  # (M, D_OUT)
    weight,  # (D_OUT, D_X + D_S)
    skip,  # (M, D_S), if KAPPA_GRAD
    kappa,  # (B, L) by strides
    grad_x,  # (M, D_X), out
    grad_skip,  # (M, D_S), out
    grad_kappa,  # (tiles over D_S, M) fp32, out, if KAPPA_GRAD
    M,
    L,
    kappa_batch_stride,
    kappa_token_stride,
    depth,  # D_OUT once more: see dual_gemm_kernel
    D_X: tl.constexpr,
    D_S: tl.constexpr,
    D_OUT: tl.constexpr,
    SCALE: tl.constexpr,
    KAPPA_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile per program, loads by pointers; no tile straddles the border between x and skip."""
    EVEN_K: tl.constexpr = D_OUT % BLOCK_K == 0
    EVEN_N: tl.constexpr = D_X % BLOCK_N == 0 and D_S % BLOCK_N == 0
    TILES_X: tl.constexpr = (D_X + BLOCK_N - 1) // BLOCK_N
    TILES_S: tl.constexpr = (D_S + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), TILES_X + TILES_S, GROUP)
    is_skip = tile_n >= TILES_X
    tile_n = tl.where(is_skip, tile_n - TILES_X, tile_n)
    width = tl.where(is_skip, D_S, D_X)
    first = tl.where(is_skip, D_X, 0)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows outside are clamped, not masked: see dual_gemm_kernel. Columns are masked, since those lie side by side in
    # memory and a clamp would break wide loads.
    safe_row = tl.minimum(row, M - 1)
    a = grad + safe_row.to(tl.int64)[:, None] * D_OUT + k[None, :]
    b = weight + k[:, None] * (D_X + D_S) + first + column[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K and EVEN_N:
            acc = dot(tl.load(a + start), tl.load(b + start * (D_X + D_S)), acc, PRECISION)
        else:
            in_depth = start + k < D_OUT
            left = tl.load(a + start, mask=in_depth[None, :], other=0.0)
            in_weight = in_depth[:, None] & (column < width)[None, :]
            acc = dot(left, tl.load(b + start * (D_X + D_S), mask=in_weight, other=0.0), acc, PRECISION)
    inside = (row < M)[:, None] if EVEN_N else (row < M)[:, None] & (column < width)[None, :]
    offset = row.to(tl.int64)[:, None] * width + column[None, :]
    if is_skip:
        if KAPPA_GRAD:
            s = tl.load(skip + offset, mask=inside, other=0.0).to(tl.float32)
            part = grad_kappa + tile_n.to(tl.int64) * M
            tl.store(part + row, tl.sum(acc * s, 1), mask=row < M)
        if SCALE:
            acc = acc * load_kappa(kappa, safe_row, L, kappa_batch_stride, kappa_token_stride)[:, None]
        tl.store(grad_skip + offset, narrow(acc, grad_skip.dtype.element_ty), mask=inside)
    else:
        tl.store(grad_x + offset, narrow(acc, grad_x.dtype.element_ty), mask=inside)


@triton.jit
def dgrad_tma_kernel(
    grad,  # descriptor of (M, D_OUT)
    weight,  # of (D_OUT, D_X + D_S)
    skip,  # of (M, D_S)
    grad_x,  # of (M, D_X), out
    grad_skip,  # of (M, D_S), out
    kappa,  # (B, L) by strides
    grad_kappa,  # (tiles over D_S, M) fp32, out, if KAPPA_GRAD
    M,
    L,
    kappa_batch_stride,
    kappa_token_stride,
    D_X: tl.constexpr,
    D_S: tl.constexpr,
    D_OUT: tl.constexpr,
    SCALE: tl.constexpr,
    KAPPA_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Persistent programs, loads and stores by tensor descriptors.

    A tile at the end of the x half also multiplies columns of the skip's half; their products fall outside of grad_x
    and are not stored.
    """
    TILES_X: tl.constexpr = (D_X + BLOCK_N - 1) // BLOCK_N
    TILES_S: tl.constexpr = (D_S + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles_m * (TILES_X + TILES_S), tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, TILES_X + TILES_S, GROUP)
        is_skip = tile_n >= TILES_X
        tile_n = tl.where(is_skip, tile_n - TILES_X, tile_n)
        first_row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        weight_column = column + tl.where(is_skip, D_X, 0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, D_OUT, BLOCK_K):
            acc = dot(grad.load([first_row, start]), weight.load([start, weight_column]), acc, "ieee")
        if is_skip:
            row = first_row + tl.arange(0, BLOCK_M)
            if KAPPA_GRAD:
                if CHUNKS == 1:
                    total = tl.sum(acc * skip.load([first_row, column]).to(tl.float32), 1)
                else:
                    left, right = halves(acc)
                    total = tl.sum(left * skip.load([first_row, column]).to(tl.float32), 1)
                    total += tl.sum(right * skip.load([first_row, column + BLOCK_N // 2]).to(tl.float32), 1)
                tl.store(grad_kappa + tile_n.to(tl.int64) * M + row, total, mask=row < M)
            if SCALE:
                scale = load_kappa(kappa, tl.minimum(row, M - 1), L, kappa_batch_stride, kappa_token_stride)
                acc = acc * scale[:, None]
            store_tile(grad_skip, acc, first_row, column, CHUNKS)
        else:
            store_tile(grad_x, acc, first_row, column, CHUNKS)


@triton.jit
def skip_rows_kernel(
    product,  # (M, D): t_s = dy · W_s, if GRAD_SKIP or KAPPA_GRAD
    skip,  # (M, D), if KAPPA_GRAD or SCALED_SKIP
    kappa,  # (B, L) by strides
    grad_gap,  # (M) fp32, if GAP: gradient of the skip's row means
    grad_skip,  # (M, D), out, if GRAD_SKIP: κ · t_s, and grad_gap / D more if GAP; may be product
    scaled_skip,  # (M, D), out, if SCALED_SKIP: κ · s
    grad_kappa,  # (M) fp32, out, if KAPPA_GRAD: Σ t_s · s
    M,
    L,
    kappa_batch_stride,
    kappa_token_stride,
    D: tl.constexpr,
    GRAD_SKIP: tl.constexpr,
    GAP: tl.constexpr,
    SCALED_SKIP: tl.constexpr,
    KAPPA_GRAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of rows per program."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = load_kappa(kappa, tl.minimum(row, M - 1), L, kappa_batch_stride, kappa_token_stride)[:, None]
    if GAP:
        share = tl.load(grad_gap + row, mask=row < M, other=0.0)[:, None] / D
    total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = (row < M)[:, None] & (column < D)[None, :]
        offset = row.to(tl.int64)[:, None] * D + column[None, :]
        if GRAD_SKIP or KAPPA_GRAD:
            t = tl.load(product + offset, mask=inside, other=0.0).to(tl.float32)
        if SCALED_SKIP or KAPPA_GRAD:
            s = tl.load(skip + offset, mask=inside, other=0.0).to(tl.float32)
        if KAPPA_GRAD:
            total += t * s
        if SCALED_SKIP:
            tl.store(scaled_skip + offset, narrow(scale * s, scaled_skip.dtype.element_ty), mask=inside)
        if GRAD_SKIP:
            t = scale * t
            if GAP:
                t += share
            tl.store(grad_skip + offset, narrow(t, grad_skip.dtype.element_ty), mask=inside)
    if KAPPA_GRAD:
        tl.store(grad_kappa + row, tl.sum(total, 1), mask=row < M)


def dgrad(
    grad: Tensor, skip: Tensor, kappa: Tensor, weight: Tensor, *, kappa_grad: bool, scale: bool, tma: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the product with its epilogue.

    Args:
        grad: ``(B, L, D_out)``.
        skip, kappa, weight: ``(B, L, D_s)``, ``(B, L)``, ``(D_out, D_x + D_s)``.
        kappa_grad: make dκ.
        scale: multiply the skip's half by κ; without, t_s itself comes back, for :func:`skip_rows` to finish.
        tma: load by tensor descriptors.

    Returns:
        grad_x ``(B, L, D_x)``, grad_skip ``(B, L, D_s)`` and dκ as partial sums ``(parts, B, L)`` fp32, or None.
    """
    batch, tokens, d_s = skip.shape
    d_out, rows = weight.shape[0], batch * tokens
    d_x = weight.shape[1] - d_s
    grad_x = torch.empty(batch, tokens, d_x, dtype=grad.dtype, device=grad.device)
    grad_skip = torch.empty(batch, tokens, d_s, dtype=grad.dtype, device=grad.device)
    config = config_for("dgrad_tma" if tma else "dgrad", grad, max(d_x, d_s, d_out))
    block_m, block_n, block_k = (config.meta[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    parts = triton.cdiv(d_s, block_n)
    partial = torch.empty(parts, batch, tokens, dtype=torch.float32, device=grad.device) if kappa_grad else None
    if rows == 0:
        return grad_x, grad_skip, partial
    flags = {"D_X": d_x, "D_S": d_s, "D_OUT": d_out, "SCALE": scale, "KAPPA_GRAD": kappa_grad}
    tiles = triton.cdiv(rows, block_m) * (triton.cdiv(d_x, block_n) + parts)
    target = kappa if partial is None else partial
    with on_device(grad):
        if tma:
            chunk = [block_m, block_n // config.meta["CHUNKS"]]
            dgrad_tma_kernel[(min(tiles, processors(grad)),)](
                TensorDescriptor.from_tensor(aligned(grad).view(rows, d_out), [block_m, block_k]),
                TensorDescriptor.from_tensor(aligned(weight), [block_k, block_n]),
                TensorDescriptor.from_tensor(aligned(skip).view(rows, d_s), chunk),
                TensorDescriptor.from_tensor(grad_x.view(rows, d_x), chunk),
                TensorDescriptor.from_tensor(grad_skip.view(rows, d_s), chunk),
                kappa, target, rows, tokens, *kappa.stride(), **flags, **config.kwargs(),
            )  # fmt: skip
        else:
            dgrad_kernel[(tiles,)](
                dense(grad), dense(weight), dense(skip), kappa, grad_x, grad_skip, target, rows, tokens,
                *kappa.stride(), d_out, **flags, PRECISION=precision_of(grad), **config.kwargs(),
            )  # fmt: skip
    return grad_x, grad_skip, partial


def skip_rows(
    product: Tensor | None,
    skip: Tensor,
    kappa: Tensor,
    *,
    grad_gap: Tensor | None = None,
    grad_skip: bool = False,
    scaled_skip: bool = False,
    kappa_grad: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """What remains to be done by row around a product t_s = dy · W_s of PyTorch, in one pass.

    Args:
        product: t_s ``(B, L, D_s)``, contiguous.
        skip, kappa: ``(B, L, D_s)``, ``(B, L)``.
        grad_gap: gradient of the skip's means over D_s, ``(B, L)`` fp32, contiguous; joins grad_skip.
        grad_skip: overwrite ``product`` with κ ⊙ t_s + grad_gap / D_s.
        scaled_skip: make κ ⊙ s, in the dtype of the skip.
        kappa_grad: make dκ = Σ t_s ⊙ s.

    Returns:
        κ ⊙ s ``(B, L, D_s)`` and dκ as partial sums ``(1, B, L)`` fp32; None where not asked for.
    """
    batch, tokens, width = skip.shape
    rows = batch * tokens
    scaled = torch.empty(batch, tokens, width, dtype=skip.dtype, device=skip.device) if scaled_skip else None
    partial = torch.empty(1, batch, tokens, dtype=torch.float32, device=skip.device) if kappa_grad else None
    if rows == 0 or not (grad_skip or scaled_skip or kappa_grad):
        return scaled, partial
    config = config_for("skip_rows", skip, width)
    with on_device(skip):
        skip_rows_kernel[(triton.cdiv(rows, config.meta["BLOCK_M"]),)](
            product, dense(skip), kappa, grad_gap, product, scaled, partial, rows, tokens, *kappa.stride(),
            D=width, GRAD_SKIP=grad_skip, GAP=grad_gap is not None, SCALED_SKIP=scaled_skip, KAPPA_GRAD=kappa_grad,
            **config.kwargs(),
        )  # fmt: skip
    return scaled, partial

"""y = κ ⊙ (s · W_sᵀ) + x · W_xᵀ + b: a Linear over cat[x, κ ⊙ s] without the concat.

κ belongs to a row (a token), so it commutes with the product over features: the accumulator runs over the skip, is
scaled by κ in fp32, and goes on over x. The weight is the untouched ``(D_out, D_x + D_s)`` one of an ``nn.Linear``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scalelong_fast.kernels.common import config_for, dense, dot, narrow, on_device
from scalelong_fast.kernels.gemm import aligned, grouped_tile, load_kappa, precision_of, processors, store_tile


@triton.jit
def dual_gemm_kernel(
    x,  # (M, D_X)
    skip,  # (M, D_S)
    kappa,  # (B, L) by strides
    weight,  # (D_OUT, D_X + D_S)
    bias,  # (D_OUT), if HAS_BIAS
    out,  # (M, D_OUT), out
    M,
    L,
    kappa_batch_stride,
    kappa_token_stride,
    depth_x,  # D_X and D_S once more: what the compiler knows at compile time it would unroll the K loop by, whole
    depth_skip,
    D_X: tl.constexpr,
    D_S: tl.constexpr,
    D_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile per program, loads by pointers."""
    EVEN_K: tl.constexpr = D_X % BLOCK_K == 0 and D_S % BLOCK_K == 0
    EVEN_N: tl.constexpr = D_OUT % BLOCK_N == 0
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D_OUT, BLOCK_N), GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns outside are clamped, not masked: asynchronous copies then need no predicate, and what they bring
    # is dropped at the store.
    safe_row = tl.minimum(row, M - 1)
    safe_column = column if EVEN_N else tl.minimum(column, D_OUT - 1)
    scale = load_kappa(kappa, safe_row, L, kappa_batch_stride, kappa_token_stride)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # One loop body for both halves keeps registers and shared memory those of a single product.
    for half in range(2):
        is_skip = half == 0
        features = tl.where(is_skip, skip, x)
        width = tl.where(is_skip, D_S, D_X)
        first = tl.where(is_skip, D_X, 0)
        a = features + safe_row.to(tl.int64)[:, None] * width + k[None, :]
        b = weight + safe_column[None, :] * (D_X + D_S) + first + k[:, None]
        for start in range(0, tl.where(is_skip, depth_skip, depth_x), BLOCK_K):
            if EVEN_K:
                acc = dot(tl.load(a + start), tl.load(b + start), acc, PRECISION)
            else:
                inside = start + k < width
                left = tl.load(a + start, mask=inside[None, :], other=0.0)
                acc = dot(left, tl.load(b + start, mask=inside[:, None], other=0.0), acc, PRECISION)
        acc = acc * tl.where(is_skip, scale, 1.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + safe_column).to(tl.float32)[None, :]
    inside = (row < M)[:, None] if EVEN_N else (row < M)[:, None] & (column < D_OUT)[None, :]
    target = out + row.to(tl.int64)[:, None] * D_OUT + column[None, :]
    tl.store(target, narrow(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def dual_gemm_tma_kernel(
    x,  # descriptor of (M, D_X)
    skip,  # of (M, D_S)
    weight_x,  # of (D_OUT, D_X)
    weight_skip,  # of (D_OUT, D_S)
    out,  # of (M, D_OUT), out
    kappa,  # (B, L) by strides
    bias,  # (D_OUT), if HAS_BIAS
    M,
    L,
    kappa_batch_stride,
    kappa_token_stride,
    D_X: tl.constexpr,
    D_S: tl.constexpr,
    D_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Persistent programs, loads and stores by tensor descriptors: outside they read zeros and store nothing."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n: tl.constexpr = (D_OUT + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        safe_row = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, D_S, BLOCK_K):
            acc = dot(skip.load([row, start]), weight_skip.load([column, start]).T, acc, "ieee")
        acc = acc * load_kappa(kappa, safe_row, L, kappa_batch_stride, kappa_token_stride)[:, None]
        for start in range(0, D_X, BLOCK_K):
            acc = dot(x.load([row, start]), weight_x.load([column, start]).T, acc, "ieee")
        if HAS_BIAS:
            columns = tl.minimum(column + tl.arange(0, BLOCK_N), D_OUT - 1)
            acc += tl.load(bias + columns).to(tl.float32)[None, :]
        store_tile(out, acc, row, column, CHUNKS)


def dual_gemm(x: Tensor, skip: Tensor, kappa: Tensor, weight: Tensor, bias: Tensor | None, *, tma: bool) -> Tensor:
    """Launch the forward.

    Args:
        x, skip: ``(B, L, D_x)`` and ``(B, L, D_s)``.
        kappa: ``(B, L)``, any strides.
        weight, bias: ``(D_out, D_x + D_s)`` and ``(D_out)`` or None.
        tma: load by tensor descriptors (16-bit dtypes, widths that are multiples of 8, sm_90 and later).

    Returns:
        ``(B, L, D_out)`` in the dtype of x.
    """
    batch, tokens, d_x = x.shape
    d_s, d_out, rows = skip.shape[2], weight.shape[0], batch * tokens
    out = torch.empty(batch, tokens, d_out, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    has_bias = bias is not None
    bias = dense(bias) if has_bias else kappa
    widths = {"D_X": d_x, "D_S": d_s, "D_OUT": d_out, "HAS_BIAS": has_bias}
    config = config_for("dual_gemm_tma" if tma else "dual_gemm", x, max(d_x, d_s, d_out))
    block_m, block_n, block_k = (config.meta[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(d_out, block_n)
    with on_device(x):
        if tma:
            weight = aligned(weight)
            dual_gemm_tma_kernel[(min(tiles, processors(x)),)](
                TensorDescriptor.from_tensor(aligned(x).view(rows, d_x), [block_m, block_k]),
                TensorDescriptor.from_tensor(aligned(skip).view(rows, d_s), [block_m, block_k]),
                TensorDescriptor.from_tensor(weight[:, :d_x], [block_n, block_k]),
                TensorDescriptor.from_tensor(weight[:, d_x:], [block_n, block_k]),
                TensorDescriptor.from_tensor(out.view(rows, d_out), [block_m, block_n // config.meta["CHUNKS"]]),
                kappa, bias, rows, tokens, *kappa.stride(), **widths, **config.kwargs(),
            )  # fmt: skip
        else:
            dual_gemm_kernel[(tiles,)](
                dense(x), dense(skip), kappa, dense(weight), bias, out, rows, tokens, *kappa.stride(),
                d_x, d_s, **widths, PRECISION=precision_of(x), **config.kwargs(),
            )  # fmt: skip
    return out

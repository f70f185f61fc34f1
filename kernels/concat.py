"""Scale and concatenate: out = cat[x, κ ⊙ skip], reading x and skip once and writing out once.

As in pool.py a half is seen as (B, N, P), N gated tokens or channels of P positions each. What a layout means is in
layouts.py; the kernels know strides only, and which dimension is contiguous shows in a stride of 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong_fast.kernels.common import config_for, narrow, on_device
from scalelong_fast.kernels.layouts import Half, concat_dim, concat_shape, empty_in, half_of, halves, in_layout
from scalelong_fast.kernels.pool import parts_for


@triton.jit
def copy_tile(
    pid,
    source,  # (B, N, P) with strides (N · P, stride_n, stride_p)
    out,
    kappa,  # (B, N) with strides (kappa_b, kappa_n); read where SCALE is set
    N,
    P,
    stride_n,
    stride_p,
    out_b,
    out_n,
    out_p,
    offset,
    kappa_b,
    kappa_n,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Tile number ``pid`` of one half, times κ or as it is, to its place in the output."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_p = tl.cdiv(P, BLOCK_P)
    sample = (pid // blocks_p // blocks_n).to(tl.int64)
    n = ((pid // blocks_p) % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = (pid % blocks_p).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (n < N)[:, None] & (p < P)[None, :]
    value = tl.load(source + sample * N * P + n[:, None] * stride_n + p[None, :] * stride_p, mask=inside, other=0.0)
    if SCALE:
        k = tl.load(kappa + sample * kappa_b + n * kappa_n, mask=n < N, other=0.0).to(tl.float32)
        value = narrow(value.to(tl.float32) * k[:, None], out.dtype.element_ty)
    tl.store(out + sample * out_b + offset + n[:, None] * out_n + p[None, :] * out_p, value, mask=inside)


@triton.jit
def scale_concat_kernel(
    x,
    skip,
    kappa,
    out,
    N,
    P,
    stride_n,
    stride_p,
    out_b,
    out_n,
    out_p,
    offset,
    x_N,
    x_P,
    x_stride_n,
    x_stride_p,
    x_out_n,
    x_out_p,
    x_offset,
    kappa_b,
    kappa_n,
    skip_programs,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    X_BLOCK_N: tl.constexpr,
    X_BLOCK_P: tl.constexpr,
):
    """One tile of one half per program: first those of the skip, then those of x."""
    pid = tl.program_id(0)
    if pid < skip_programs:
        copy_tile(
            pid, skip, out, kappa, N, P, stride_n, stride_p, out_b, out_n, out_p, offset, kappa_b, kappa_n,
            True, BLOCK_N, BLOCK_P,
        )  # fmt: skip
    else:
        copy_tile(
            pid - skip_programs, x, out, kappa, x_N, x_P, x_stride_n, x_stride_p, out_b, x_out_n, x_out_p, x_offset,
            kappa_b, kappa_n, False, X_BLOCK_N, X_BLOCK_P,
        )  # fmt: skip


@triton.jit
def skip_backward_kernel(
    grad_out,
    skip,  # (B, N, P); read where REDUCE is set
    kappa,  # (B, N) with strides (kappa_b, kappa_n); read where WRITE is set
    grad_pooled,  # (B, N) fp32: gradient at the mean over P; read where POOLED is set
    grad_gate,  # (B, N) fp32: gradient that reached κ another way; read where GATE is set
    grad_skip,  # (B, N, P), out where WRITE is set
    grad_kappa,  # (PARTS, B, N) fp32, out where REDUCE is set
    N,
    P,
    stride_n,
    stride_p,
    out_b,
    out_n,
    out_p,
    offset,
    kappa_b,
    kappa_n,
    span,  # positions of a part, a multiple of BLOCK_P
    part_stride,  # B · N
    parts,
    REDUCE: tl.constexpr,
    WRITE: tl.constexpr,
    POOLED: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """grad_kappa = Σ_p grad_out · skip and grad_skip = κ · grad_out (+ grad_pooled / P), or one of the two.

    Program (sample, part of P, block of N), the last fastest.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    part = (pid // blocks) % parts
    sample = (pid // blocks // parts).to(tl.int64)
    n = (pid % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    gates = sample * N + n
    first = part.to(tl.int64) * span
    rows = sample * N * P + n[:, None] * stride_n
    grad_rows = grad_out + sample * out_b + offset + n[:, None] * out_n
    if WRITE:
        k = tl.load(kappa + sample * kappa_b + n * kappa_n, mask=n < N, other=0.0).to(tl.float32)
    if POOLED:
        shift = tl.load(grad_pooled + gates, mask=n < N, other=0.0) / P
    if REDUCE:
        total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(first, tl.minimum(first + span, P), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (n < N)[:, None] & (p < P)[None, :]
        g = tl.load(grad_rows + p[None, :] * out_p, mask=inside, other=0.0).to(tl.float32)
        if REDUCE:
            s = tl.load(skip + rows + p[None, :] * stride_p, mask=inside, other=0.0)
            total += g * s.to(tl.float32)
        if WRITE:
            value = g * k[:, None]
            if POOLED:
                value += shift[:, None]
            tl.store(grad_skip + rows + p[None, :] * stride_p, narrow(value, grad_skip.dtype.element_ty), mask=inside)
    if REDUCE:
        result = tl.sum(total, 1)
        if GATE and part == 0:
            result += tl.load(grad_gate + gates, mask=n < N, other=0.0)
        tl.store(grad_kappa + part.to(tl.int64) * part_stride + gates, result, mask=n < N)


def config_name(kernel: str, layout: str) -> str:
    """Which of a kernel's configurations serves a layout."""
    return f"{kernel}_columns" if layout == "pixels" else f"{kernel}_rows"


def contiguous_width(half: Half) -> int:
    """Elements that lie side by side in memory, the width by which configurations are chosen."""
    return half.count if half.strides[0] == 1 else half.positions


def x_blocks(layout: str, block_n: int, block_p: int) -> tuple[int, int]:
    """Tile of x, of as many elements as the skip's: joined planes have one row."""
    return (1, block_n * block_p) if layout == "planes" else (block_n, block_p)


def tiles(half: Half, batch: int, block_n: int, block_p: int) -> int:
    """Tiles of a half."""
    return batch * triton.cdiv(half.count, block_n) * triton.cdiv(half.positions, block_p)


def scale_concat_forward(x: Tensor, skip: Tensor, kappa: Tensor, layout: str, skip_first: bool) -> Tensor:
    """Launch the forward.

    Args:
        x, skip: ``(B, L, D)`` for the layout ``rows``, ``(B, C, *spatial)`` for ``planes`` and ``pixels``, one dtype.
            A half that does not lie densely in ``layout`` is copied.
        kappa: ``(B, L)`` or ``(B, C)`` with any strides, fp32 or the dtype of the feature.
        skip_first: concatenate as cat[κ ⊙ skip, x].

    Returns:
        The concat, in ``layout``.
    """
    out = empty_in(concat_shape(x, skip, layout), layout, x)
    if out.numel() == 0:
        return out
    x, skip = in_layout(x, layout), in_layout(skip, layout)
    of_x, of_skip = halves(x, skip, layout, skip_first)
    config = config_for(config_name("concat", layout), skip, contiguous_width(of_skip))
    blocks = config.meta["BLOCK_N"], config.meta["BLOCK_P"]
    blocks_of_x = x_blocks(layout, *blocks)
    skip_programs = tiles(of_skip, x.shape[0], *blocks)
    with on_device(x):
        scale_concat_kernel[(skip_programs + tiles(of_x, x.shape[0], *blocks_of_x),)](
            x, skip, kappa, out,
            of_skip.count, of_skip.positions, *of_skip.strides, *of_skip.out_strides, of_skip.offset,
            of_x.count, of_x.positions, *of_x.strides, *of_x.out_strides[1:], of_x.offset,
            *kappa.stride(), skip_programs, X_BLOCK_N=blocks_of_x[0], X_BLOCK_P=blocks_of_x[1], **config.kwargs(),
        )  # fmt: skip
    return out


def skip_backward(
    grad_out: Tensor,
    skip: Tensor,
    layout: str,
    skip_first: bool,
    *,
    kappa: Tensor | None = None,
    reduce: bool = True,
    grad_pooled: Tensor | None = None,
    grad_gate: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch one pass over the skip half of ``grad_out``.

    Args:
        grad_out: gradient of the concat, dense in ``layout``.
        skip: dense in ``layout``; its values are read only where ``reduce`` is set.
        kappa: ``(B, N)`` with any strides: write the gradient of the skip.
        reduce: compute the gradient of κ.
        grad_pooled: ``(B, N)`` fp32, contiguous: gradient at the skip's mean, which joins the gradient of the skip.
        grad_gate: ``(B, N)`` fp32, contiguous: joins the gradient of κ.

    Returns:
        Gradient of the skip or None, and gradient of κ or None: partial sums ``(parts, B, N)`` fp32.
    """
    batch, dim = skip.shape[0], concat_dim(layout)
    before = 0 if skip_first else grad_out.shape[dim] - skip.shape[dim]
    half = half_of(tuple(skip.shape), grad_out.shape[dim], before, layout)
    config = config_for(config_name("concat_backward", layout), skip, contiguous_width(half))
    block_n, block_p = config.meta["BLOCK_N"], config.meta["BLOCK_P"]
    steps, blocks = triton.cdiv(half.positions, block_p), triton.cdiv(half.count, block_n)
    parts = parts_for(batch * blocks, steps)
    grad_skip = None if kappa is None else empty_in(tuple(skip.shape), layout, skip)
    partial = None
    if reduce:
        make = torch.zeros if half.positions == 0 else torch.empty
        partial = make(parts, batch, half.count, dtype=torch.float32, device=skip.device)
    if skip.numel() == 0:
        return grad_skip, partial
    with on_device(skip):
        skip_backward_kernel[(batch * parts * blocks,)](
            grad_out, skip, kappa, grad_pooled, grad_gate, grad_skip, partial,
            half.count, half.positions, *half.strides, *half.out_strides, half.offset,
            *((0, 0) if kappa is None else kappa.stride()),
            triton.cdiv(steps, parts) * block_p, batch * half.count, parts,
            REDUCE=reduce, WRITE=kappa is not None, POOLED=grad_pooled is not None, GATE=grad_gate is not None,
            **config.kwargs(),
        )  # fmt: skip
    return grad_skip, partial


def scale_concat_backward(
    grad_out: Tensor, skip: Tensor | None, kappa: Tensor, skip_width: int, layout: str, skip_first: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward of the skip half; that of x is a slice of ``grad_out``.

    Args:
        grad_out: gradient of the concat, any strides.
        skip: as in the forward, or None where no gradient of κ is wanted.
        kappa: as in the forward.
        skip_width: D or C of the skip.

    Returns:
        Gradients of the skip (its dtype and ``layout``) and of κ, ``(B, N)`` fp32, or None.
    """
    grad_out = in_layout(grad_out, layout)
    if skip is None:
        dim = concat_dim(layout)
        # A stand-in of the right shape: its values are not read.
        like = grad_out.narrow(dim, 0, skip_width)
        return skip_backward(grad_out, like, layout, skip_first, kappa=kappa, reduce=False)
    grad_skip, partial = skip_backward(grad_out, in_layout(skip, layout), layout, skip_first, kappa=kappa)
    return grad_skip, partial[0] if partial.shape[0] == 1 else partial.sum(0)

"""The SE gate κ = σ(W_up ψ(W_down · pooled + b_down) + b_up): one program per sample, everything in fp32.

The weights have rows of N elements, N often odd (257 tokens): they are loaded element by element, from L1 and L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong_fast.kernels.common import (
    ACTIVATION_IDS,
    activate,
    activate_derivative,
    config_for,
    dense,
    dot,
    on_device,
)


@triton.jit
def se_hidden(pooled, w_down, b_down, sample, N, H, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pre-activation z = W_down · pooled[sample] + b_down, (BLOCK_H,) fp32, zero beyond H."""
    h = tl.arange(0, BLOCK_H)
    z = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        p = tl.load(pooled + sample * N + n, mask=n < N, other=0.0).to(tl.float32)
        inside = (h < H)[:, None] & (n < N)[None, :]
        w = tl.load(w_down + h[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
        z += tl.sum(w * p[None, :], 1)
    return z + tl.load(b_down + h, mask=h < H, other=0.0).to(tl.float32)


@triton.jit
def se_kappa(z, w_up, b_up, n, N, H, ACTIVATION: tl.constexpr, BLOCK_H: tl.constexpr):
    """κ of channels or tokens ``n`` from the pre-activation z (BLOCK_H,)."""
    h = tl.arange(0, BLOCK_H)
    a = tl.where(h < H, activate(z, ACTIVATION), 0.0)
    inside = (n < N)[:, None] & (h < H)[None, :]
    w = tl.load(w_up + n[:, None] * H + h[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.sigmoid(tl.sum(w * a[None, :], 1) + tl.load(b_up + n, mask=n < N, other=0.0).to(tl.float32))


@triton.jit
def se_forward_kernel(
    pooled,  # (B, N)
    w_down,  # (H, N)
    b_down,  # (H)
    w_up,  # (N, H)
    b_up,  # (N)
    hidden,  # (B, H) fp32, out: pre-activation z
    kappa,  # (B, N) fp32, out
    N,
    H,
    ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    z = se_hidden(pooled, w_down, b_down, sample, N, H, BLOCK_H, BLOCK_N)
    h = tl.arange(0, BLOCK_H)
    tl.store(hidden + sample * H + h, z, mask=h < H)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        tl.store(kappa + sample * N + n, se_kappa(z, w_up, b_up, n, N, H, ACTIVATION, BLOCK_H), mask=n < N)


@triton.jit
def se_backward_kernel(
    grad_kappa,  # (PARTS, B, N) fp32: partial sums, added here
    kappa,  # (B, N) fp32
    hidden,  # (B, H) fp32
    w_down,  # (H, N)
    w_up,  # (N, H)
    grad_logit,  # (B, N) fp32, out: gradient at the sigmoid's argument
    grad_hidden,  # (B, H) fp32, out: gradient at z
    grad_pooled,  # (B, N) fp32, out
    N,
    H,
    part_stride,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    grad_a = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        g = tl.zeros((BLOCK_N,), tl.float32)
        for part in tl.static_range(PARTS):
            g += tl.load(grad_kappa + part * part_stride + sample * N + n, mask=n < N, other=0.0)
        k = tl.load(kappa + sample * N + n, mask=n < N, other=0.0)
        g = g * k * (1.0 - k)
        tl.store(grad_logit + sample * N + n, g, mask=n < N)
        inside = (n < N)[:, None] & (h < H)[None, :]
        w = tl.load(w_up + n[:, None] * H + h[None, :], mask=inside, other=0.0).to(tl.float32)
        grad_a += tl.sum(w * g[:, None], 0)
    z = tl.load(hidden + sample * H + h, mask=h < H, other=0.0)
    grad_z = tl.where(h < H, grad_a * activate_derivative(z, ACTIVATION), 0.0)
    tl.store(grad_hidden + sample * H + h, grad_z, mask=h < H)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (h < H)[:, None] & (n < N)[None, :]
        w = tl.load(w_down + h[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_pooled + sample * N + n, tl.sum(w * grad_z[:, None], 0), mask=n < N)


@triton.jit
def se_weight_grad_kernel(
    pooled,  # (B, N)
    hidden,  # (B, H) fp32
    grad_logit,  # (B, N) fp32
    grad_hidden,  # (B, H) fp32
    grad_w_down,  # (H, N), out
    grad_b_down,  # (H), out
    grad_w_up,  # (N, H), out
    grad_b_up,  # (N), out
    B,
    N,
    H,
    ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """All four parameter gradients, a block of channels or tokens per program; sums over the batch in a fixed order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.arange(0, BLOCK_H)
    down = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    bias_down = tl.zeros((BLOCK_H,), tl.float32)
    bias_up = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, B, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        in_n = (b < B)[:, None] & (n < N)[None, :]
        in_h = (b < B)[:, None] & (h < H)[None, :]
        p = tl.load(pooled + b[:, None] * N + n[None, :], mask=in_n, other=0.0).to(tl.float32)
        g = tl.load(grad_logit + b[:, None] * N + n[None, :], mask=in_n, other=0.0)
        z = tl.load(hidden + b[:, None] * H + h[None, :], mask=in_h, other=0.0)
        d = tl.load(grad_hidden + b[:, None] * H + h[None, :], mask=in_h, other=0.0)
        a = tl.where(in_h, activate(z, ACTIVATION), 0.0)
        down = dot(tl.trans(d), p, down, "ieee")
        up = dot(tl.trans(a), g, up, "ieee")
        bias_down += tl.sum(d, 0)
        bias_up += tl.sum(g, 0)
    inside = (h < H)[:, None] & (n < N)[None, :]
    tl.store(grad_w_down + h[:, None] * N + n[None, :], down.to(grad_w_down.dtype.element_ty), mask=inside)
    tl.store(grad_w_up + n[None, :] * H + h[:, None], up.to(grad_w_up.dtype.element_ty), mask=inside)
    tl.store(grad_b_up + n, bias_up.to(grad_b_up.dtype.element_ty), mask=n < N)
    if tl.program_id(0) == 0:
        tl.store(grad_b_down + h, bias_down.to(grad_b_down.dtype.element_ty), mask=h < H)


#: Largest hidden width a program keeps in registers.
MAX_HIDDEN = 1024


def se_blocks(hidden: int) -> tuple[int, int]:
    """(BLOCK_H, BLOCK_N): all hidden units at once, and as many tokens as keep the weight tile at 4096 elements."""
    block_h = max(16, triton.next_power_of_2(hidden))
    return block_h, max(16, min(128, 4096 // block_h))


def se_forward(
    pooled: Tensor, w_down: Tensor, b_down: Tensor, w_up: Tensor, b_up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Launch the gate.

    Args:
        pooled: ``(B, N)``, contiguous.
        w_down, b_down, w_up, b_up: ``(H, N)``, ``(H)``, ``(N, H)``, ``(N)``, contiguous.

    Returns:
        κ ``(B, N)`` and the pre-activation z ``(B, H)``, both fp32.
    """
    batch, width = pooled.shape
    hidden = w_down.shape[0]
    kappa = torch.empty(batch, width, dtype=torch.float32, device=pooled.device)
    z = torch.empty(batch, hidden, dtype=torch.float32, device=pooled.device)
    if batch == 0:
        return kappa, z
    block_h, block_n = se_blocks(hidden)
    with on_device(pooled):
        se_forward_kernel[(batch,)](
            dense(pooled), dense(w_down), dense(b_down), dense(w_up), dense(b_up), z, kappa, width, hidden,
            ACTIVATION=ACTIVATION_IDS[activation], BLOCK_H=block_h, BLOCK_N=block_n,
            **config_for("se", pooled, hidden).kwargs(),
        )  # fmt: skip
    return kappa, z


def se_backward(
    grad_kappa: Tensor, kappa: Tensor, hidden: Tensor, w_down: Tensor, w_up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at the gate's inputs.

    Args:
        grad_kappa: ``(B, N)``, or partial sums ``(parts, B, N)``, fp32, contiguous.
        kappa, hidden: as :func:`se_forward` returned them.

    Returns:
        Gradients at the logits ``(B, N)``, at z ``(B, H)`` and at pooled ``(B, N)``, all fp32.
    """
    batch, width = kappa.shape
    grads = (torch.empty_like(kappa), torch.empty_like(hidden), torch.empty_like(kappa))
    if batch == 0:
        return grads
    parts = grad_kappa.shape[0] if grad_kappa.dim() == 3 else 1
    block_h, block_n = se_blocks(hidden.shape[1])
    with on_device(kappa):
        se_backward_kernel[(batch,)](
            dense(grad_kappa), kappa, hidden, dense(w_down), dense(w_up), *grads, width, hidden.shape[1], batch * width,
            PARTS=parts, ACTIVATION=ACTIVATION_IDS[activation], BLOCK_H=block_h, BLOCK_N=block_n,
            **config_for("se", kappa, hidden.shape[1]).kwargs(),
        )  # fmt: skip
    return grads


def se_weight_grad(
    pooled: Tensor,
    hidden: Tensor,
    grad_logit: Tensor,
    grad_hidden: Tensor,
    activation: str,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w_down, b_down, w_up and b_up, in ``dtypes``, in one launch."""
    batch, width = pooled.shape
    h = hidden.shape[1]
    shapes = ((h, width), (h,), (width, h), (width,))
    if batch == 0 or width == 0:
        return tuple(torch.zeros(s, dtype=t, device=pooled.device) for s, t in zip(shapes, dtypes, strict=True))
    grads = tuple(torch.empty(s, dtype=t, device=pooled.device) for s, t in zip(shapes, dtypes, strict=True))
    block_h, _ = se_blocks(h)
    block_n = 16
    with on_device(pooled):
        se_weight_grad_kernel[(triton.cdiv(width, block_n),)](
            dense(pooled), hidden, grad_logit, grad_hidden, *grads, batch, width, h,
            ACTIVATION=ACTIVATION_IDS[activation], BLOCK_H=block_h, BLOCK_N=block_n, BLOCK_B=16,
            **config_for("se", pooled, h).kwargs(),
        )  # fmt: skip
    return grads

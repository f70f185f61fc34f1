"""The sums over positions from which every coefficient of GroupNorm's backward follows: see group_norm_backward.py.

The features and ``grad_out`` are read once, g is computed on the way. Parts of a long P are left apart; who reads the
sums adds them in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong_fast.kernels.channel_stats import position_in_sample
from scalelong_fast.kernels.group_norm import ACTIVATIONS, NormShape, norm_config, tiles_of_halves
from scalelong_fast.kernels.pool import parts_for


@triton.jit
def norm_activation_gradient(grad, u, ACTIVATION: tl.constexpr):
    """grad · act'(u) in fp32."""
    if ACTIVATION == 1:
        s = tl.sigmoid(u)
        grad *= s * (1.0 + u * (1.0 - s))
    return grad


@triton.jit
def norm_sums_half(
    pid,
    feature,  # (B, N, P), dense
    channel_mean,  # (B, N) fp32: of the feature
    kappa,  # (B, N) with strides (kappa_b, kappa_n); read where SCALE is set
    mean,  # (B, G) fp32
    rstd,  # (B, G) fp32
    weight,  # (B, C) with strides (weight_b, weight_c)
    bias,  # (B, C) with strides (bias_b, bias_c)
    grad_out,  # (B, C, P), dense
    grad_concat,  # (B, C, P), dense, or None; read where SCALE is set
    sums,  # (3, PARTS, B, C) fp32, out: Σ g, Σ g · (v − mean), Σ grad_concat · v
    N,
    P,
    C,
    first,
    groups,
    group_width,
    span,  # positions of a part, a multiple of BLOCK_P
    part_stride,  # B · C
    parts,
    kappa_b,
    kappa_n,
    weight_b,
    weight_c,
    bias_b,
    bias_c,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (sample, part, block of N) of one half, the last fastest."""
    blocks = tl.cdiv(N, BLOCK_N)
    part = ((pid // blocks) % parts).to(tl.int64)
    sample = (pid // blocks // parts).to(tl.int64)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = sample * groups + (first + n) // group_width  # before n gets 64 bits, in which a division is slow
    n = n.to(tl.int64)
    channels = first + n
    centre = tl.load(channel_mean + sample * N + n, mask=n < N, other=0.0)
    if ACTIVATION != 0:
        slope = tl.load(rstd + group, mask=n < N, other=0.0)
        slope *= tl.load(weight + sample * weight_b + channels * weight_c, mask=n < N, other=0.0).to(tl.float32)
        shift = tl.load(bias + sample * bias_b + channels * bias_c, mask=n < N, other=0.0).to(tl.float32)
        scaled = centre
        if SCALE:
            k = tl.load(kappa + sample * kappa_b + n * kappa_n, mask=n < N, other=0.0).to(tl.float32)
            scaled = k * centre
        shift += slope * (scaled - tl.load(mean + group, mask=n < N, other=0.0))
        if SCALE:
            slope *= k
    begin = part * span
    end = tl.minimum(begin + span, P)
    total = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    along = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if SCALE and grad_concat is not None:
        direct = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (n < N)[:, None] & (p < end)[None, :]
        at = sample * N * P + position_in_sample(n[:, None], p[None, :], N, P, PIXELS)
        of_out = sample * C * P + position_in_sample(channels[:, None], p[None, :], C, P, PIXELS)
        value = tl.load(feature + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_out + of_out, mask=inside, other=0.0).to(tl.float32)
        deviation = value - centre[:, None]
        if ACTIVATION != 0:
            grad = norm_activation_gradient(grad, slope[:, None] * deviation + shift[:, None], ACTIVATION)
        total += grad
        along += grad * deviation
        if SCALE and grad_concat is not None:
            direct += tl.load(grad_concat + of_out, mask=inside, other=0.0).to(tl.float32) * value
    to = sums + (part * part_stride + sample * C + channels)
    sums_stride = tl.cast(part_stride, tl.int64) * parts
    tl.store(to, tl.sum(total, 1), mask=n < N)
    tl.store(to + sums_stride, tl.sum(along, 1), mask=n < N)
    if SCALE and grad_concat is not None:
        tl.store(to + 2 * sums_stride, tl.sum(direct, 1), mask=n < N)


@triton.jit
def group_norm_sums_kernel(
    x,
    skip,  # or None
    x_mean,
    skip_mean,
    kappa,
    mean,
    rstd,
    weight,
    bias,
    grad_out,
    grad_concat,
    sums,
    x_width,
    skip_width,
    x_first,
    skip_first,
    P,
    C,
    groups,
    group_width,
    span,
    part_stride,
    parts,
    kappa_b,
    kappa_n,
    weight_b,
    weight_c,
    bias_b,
    bias_c,
    skip_programs,
    ACTIVATION: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The sums of both halves: first the skip's programs, then those of x."""
    pid = tl.program_id(0)
    if skip is None:
        norm_sums_half(
            pid, x, x_mean, kappa, mean, rstd, weight, bias, grad_out, grad_concat, sums, x_width, P, C, x_first,
            groups, group_width, span, part_stride, parts, kappa_b, kappa_n, weight_b, weight_c, bias_b, bias_c,
            False, ACTIVATION, PIXELS, BLOCK_N, BLOCK_P,
        )  # fmt: skip
    else:
        if pid < skip_programs:
            norm_sums_half(
                pid, skip, skip_mean, kappa, mean, rstd, weight, bias, grad_out, grad_concat, sums, skip_width, P, C,
                skip_first, groups, group_width, span, part_stride, parts, kappa_b, kappa_n, weight_b, weight_c,
                bias_b, bias_c, True, ACTIVATION, PIXELS, BLOCK_N, BLOCK_P,
            )  # fmt: skip
        else:
            norm_sums_half(
                pid - skip_programs, x, x_mean, kappa, mean, rstd, weight, bias, grad_out, grad_concat, sums, x_width,
                P, C, x_first, groups, group_width, span, part_stride, parts, kappa_b, kappa_n, weight_b, weight_c,
                bias_b, bias_c, False, ACTIVATION, PIXELS, BLOCK_N, BLOCK_P,
            )  # fmt: skip


def group_norm_sums(
    x: Tensor,
    skip: Tensor | None,
    moments: tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]],
    kappa: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_out: Tensor,
    grad_concat: Tensor | None,
    shape: NormShape,
    strides: tuple[int, ...],
    activation: str,
    layout: str,
) -> Tensor:
    """Launch the pass of sums: (2, parts, B, C) fp32, or (3, parts, B, C) where grad_concat is given."""
    config = norm_config("group_norm_sums", x, shape, layout)
    block_n, block_p = config.meta["BLOCK_N"], config.meta["BLOCK_P"]
    steps = triton.cdiv(shape.positions, block_p)
    x_programs, skip_programs = tiles_of_halves(shape, block_n, shape.positions)
    parts = parts_for(x_programs + skip_programs, steps)
    sums = torch.empty(
        2 if grad_concat is None else 3, parts, shape.batch, shape.width, dtype=torch.float32, device=x.device
    )
    group_norm_sums_kernel[((x_programs + skip_programs) * parts,)](
        x, skip, moments[0][0], moments[1][0], kappa, mean, rstd, weight, bias, grad_out, grad_concat, sums,
        *shape.halves, shape.positions, shape.width, shape.groups, shape.width // shape.groups,
        triton.cdiv(steps, parts) * block_p, shape.batch * shape.width, parts, *strides, skip_programs * parts,
        ACTIVATION=ACTIVATIONS[activation], PIXELS=layout == "pixels", **config.kwargs(),
    )  # fmt: skip
    return sums

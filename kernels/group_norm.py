"""GroupNorm of cat[x, κ ⊙ skip] with its activation: x and skip are read once, the result is written once.

The statistics of the groups follow from those of the channels of x and of the unscaled skip (channel_stats.py): a
channel times κ has the mean κ · mean and the sum of squared deviations κ² · M2. What remains for a feature's value v is
act(A · (v − mean) + S) with the mean, A and S of its channel: in this form a large mean cancels nothing. The backward
is in group_norm_backward.py.

Channels are counted in the concat; its groups may hold channels of both halves.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong_fast.kernels.channel_stats import position_in_sample
from scalelong_fast.kernels.common import config_for, dense, narrow, on_device
from scalelong_fast.kernels.concat import config_name
from scalelong_fast.kernels.configs import LaunchConfig
from scalelong_fast.kernels.layouts import empty_in

#: Activations after the norm by name; kernels take the number.
ACTIVATIONS = {"none": 0, "silu": 1}


@triton.jit
def norm_activation(u, ACTIVATION: tl.constexpr):
    """act(u) in fp32: 0 u itself, 1 SiLU."""
    if ACTIVATION == 1:
        u *= tl.sigmoid(u)
    return u


@triton.jit
def channel_moments(
    channels,  # of the concat
    inside,
    sample,
    x_mean,
    x_m2,
    skip_mean,
    skip_m2,
    kappa,
    x_width,
    skip_width,
    x_first,
    skip_first,
    kappa_b,
    kappa_n,
):
    """Mean and M2 of channels of x and of the unscaled skip, and the κ they are multiplied by: 1 for those of x."""
    n = channels - x_first
    of_x = inside & (n >= 0) & (n < x_width)
    mean = tl.load(x_mean + sample * x_width + n, mask=of_x, other=0.0)
    m2 = tl.load(x_m2 + sample * x_width + n, mask=of_x, other=0.0)
    k = tl.full(mean.shape, 1.0, tl.float32)
    if skip_mean is not None:
        n = channels - skip_first
        of_skip = inside & (n >= 0) & (n < skip_width)
        mean = tl.where(of_skip, tl.load(skip_mean + sample * skip_width + n, mask=of_skip, other=0.0), mean)
        m2 = tl.where(of_skip, tl.load(skip_m2 + sample * skip_width + n, mask=of_skip, other=0.0), m2)
        k = tl.where(
            of_skip, tl.load(kappa + sample * kappa_b + n * kappa_n, mask=of_skip, other=1.0).to(tl.float32), k
        )
    return mean, m2, k


@triton.jit
def group_norm_coefficients_kernel(
    x_mean,  # (B, x_width) fp32
    x_m2,  # (B, x_width) fp32
    skip_mean,  # (B, skip_width) fp32, or None: no skip
    skip_m2,  # (B, skip_width) fp32
    kappa,  # (B, skip_width) with strides (kappa_b, kappa_n)
    weight,  # (B, C) with strides (weight_b, weight_c)
    bias,  # (B, C) with strides (bias_b, bias_c)
    affine,  # (2, B, C) fp32, out: A and S
    mean,  # (B, G) fp32, out
    rstd,  # (B, G) fp32, out
    x_width,
    skip_width,
    x_first,  # first channel of x in the concat
    skip_first,  # first channel of the skip
    P,
    groups,
    group_width,  # channels of a group
    affine_stride,  # B · C
    eps,
    kappa_b,
    kappa_n,
    weight_b,
    weight_c,
    bias_b,
    bias_c,
    BLOCK_C: tl.constexpr,
):
    """Mean and 1/σ of one group of one sample, and A and S of its channels."""
    sample = (tl.program_id(0) // groups).to(tl.int64)
    group = (tl.program_id(0) % groups).to(tl.int64)
    start_of_group = group * group_width
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, group_width, BLOCK_C):
        offset = start + tl.arange(0, BLOCK_C)
        inside = offset < group_width
        channel_mean, _, k = channel_moments(
            start_of_group + offset, inside, sample, x_mean, x_m2, skip_mean, skip_m2, kappa, x_width, skip_width,
            x_first, skip_first, kappa_b, kappa_n,
        )  # fmt: skip
        total += k * channel_mean
    group_mean = tl.sum(total, 0) / group_width
    # In two steps, as Chan's formula has it: the deviations within the channels and those of their means.
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, group_width, BLOCK_C):
        offset = start + tl.arange(0, BLOCK_C)
        inside = offset < group_width
        channel_mean, m2, k = channel_moments(
            start_of_group + offset, inside, sample, x_mean, x_m2, skip_mean, skip_m2, kappa, x_width, skip_width,
            x_first, skip_first, kappa_b, kappa_n,
        )  # fmt: skip
        off = k * channel_mean - group_mean
        total += tl.where(inside, k * k * (m2 / P) + off * off, 0.0)
    group_rstd = 1.0 / tl.sqrt(tl.sum(total, 0) / group_width + eps)
    tl.store(mean + sample * groups + group, group_mean)
    tl.store(rstd + sample * groups + group, group_rstd)
    for start in range(0, group_width, BLOCK_C):
        offset = start + tl.arange(0, BLOCK_C)
        inside = offset < group_width
        channels = start_of_group + offset
        w = tl.load(weight + sample * weight_b + channels * weight_c, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(bias + sample * bias_b + channels * bias_c, mask=inside, other=0.0).to(tl.float32)
        slope = group_rstd * w
        centre, _, k = channel_moments(
            channels, inside, sample, x_mean, x_m2, skip_mean, skip_m2, kappa, x_width, skip_width,
            x_first, skip_first, kappa_b, kappa_n,
        )  # fmt: skip
        to = affine + sample * groups * group_width + channels
        tl.store(to, k * slope, mask=inside)
        tl.store(to + affine_stride, b + slope * (k * centre - group_mean), mask=inside)


@triton.jit
def tile_of(pid, N, P, PIXELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sample, channels and positions of tile number ``pid``: neighbours in memory go to neighbouring programs."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_p = tl.cdiv(P, BLOCK_P)
    if PIXELS:
        block_n, block_p = pid % blocks_n, (pid // blocks_n) % blocks_p
    else:
        block_n, block_p = (pid // blocks_p) % blocks_n, pid % blocks_p
    sample = (pid // blocks_p // blocks_n).to(tl.int64)
    n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = block_p.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    return sample, n, p


@triton.jit
def norm_tile(
    pid,
    feature,  # (B, N, P), dense
    channel_mean,  # (B, N) fp32: of the feature
    kappa,  # (B, N) with strides (kappa_b, kappa_n); read where SCALE is set
    affine,  # (2, B, C) fp32: A and S
    out,  # (B, C, P), dense
    concat,  # (B, C, P), dense, or None
    N,
    P,
    C,
    first,  # first channel of this half in the concat
    affine_stride,
    kappa_b,
    kappa_n,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Tile number ``pid`` of one half to its place in the output, and, raw or times κ, in the concat."""
    sample, n, p = tile_of(pid, N, P, PIXELS, BLOCK_N, BLOCK_P)
    inside = (n < N)[:, None] & (p < P)[None, :]
    at = sample * N * P + position_in_sample(n[:, None], p[None, :], N, P, PIXELS)
    to = sample * C * P + position_in_sample(n[:, None] + first, p[None, :], C, P, PIXELS)
    stored = tl.load(feature + at, mask=inside, other=0.0)
    value = stored.to(tl.float32)
    centre = tl.load(channel_mean + sample * N + n, mask=n < N, other=0.0)
    of_channel = affine + sample * C + first + n
    slope = tl.load(of_channel, mask=n < N, other=0.0)
    shift = tl.load(of_channel + affine_stride, mask=n < N, other=0.0)
    result = norm_activation(slope[:, None] * (value - centre[:, None]) + shift[:, None], ACTIVATION)
    tl.store(out + to, narrow(result, out.dtype.element_ty), mask=inside)
    if concat is not None:
        if SCALE:
            k = tl.load(kappa + sample * kappa_b + n * kappa_n, mask=n < N, other=0.0).to(tl.float32)
            stored = narrow(value * k[:, None], concat.dtype.element_ty)
        tl.store(concat + to, stored, mask=inside)


@triton.jit
def group_norm_kernel(
    x,
    skip,  # or None
    x_mean,
    skip_mean,
    kappa,
    affine,
    out,
    concat,  # or None
    x_width,
    skip_width,
    x_first,
    skip_first,
    P,
    C,
    affine_stride,
    kappa_b,
    kappa_n,
    skip_programs,
    ACTIVATION: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of one half per program: first those of the skip, then those of x."""
    pid = tl.program_id(0)
    if skip is None:
        norm_tile(
            pid, x, x_mean, kappa, affine, out, concat, x_width, P, C, x_first, affine_stride, kappa_b, kappa_n,
            False, ACTIVATION, PIXELS, BLOCK_N, BLOCK_P,
        )  # fmt: skip
    else:
        if pid < skip_programs:
            norm_tile(
                pid, skip, skip_mean, kappa, affine, out, concat, skip_width, P, C, skip_first, affine_stride,
                kappa_b, kappa_n, True, ACTIVATION, PIXELS, BLOCK_N, BLOCK_P,
            )  # fmt: skip
        else:
            norm_tile(
                pid - skip_programs, x, x_mean, kappa, affine, out, concat, x_width, P, C, x_first, affine_stride,
                kappa_b, kappa_n, False, ACTIVATION, PIXELS, BLOCK_N, BLOCK_P,
            )  # fmt: skip


class NormShape(NamedTuple):
    """Sizes of a norm over one feature or over a concat.

    Attributes:
        batch, positions: B and P.
        x_width, skip_width: channels of x and of the skip, 0 without one.
        x_first, skip_first: where the halves begin in the concat.
        groups: their number.
    """

    batch: int
    positions: int
    x_width: int
    skip_width: int
    x_first: int
    skip_first: int
    groups: int

    @property
    def width(self) -> int:
        """Channels of the concat."""
        return self.x_width + self.skip_width

    @property
    def halves(self) -> tuple[int, int, int, int]:
        """What kernels are told of the halves."""
        return self.x_width, self.skip_width, self.x_first, self.skip_first


def norm_shape(x: Tensor, skip: Tensor | None, num_groups: int, skip_first: bool) -> NormShape:
    """Sizes of the norm of x, or of the concat of x and skip."""
    batch, x_width, *spatial = x.shape
    skip_width = 0 if skip is None else skip.shape[1]
    firsts = (skip_width, 0) if skip_first else (0, x_width)
    return NormShape(batch, math.prod(spatial), x_width, skip_width, *firsts, num_groups)


def norm_config(kernel: str, x: Tensor, shape: NormShape, layout: str) -> LaunchConfig:
    """Launch configuration of a kernel over the features, by the narrower half where channels lie side by side."""
    width = min(w for w in (shape.x_width, shape.skip_width) if w) if layout == "pixels" else shape.positions
    return config_for(config_name(kernel, layout), x, width)


def tiles_of_halves(shape: NormShape, block_n: int, block_p: int) -> tuple[int, int]:
    """Tiles of x and of the skip."""
    tiles = shape.batch * triton.cdiv(shape.positions, block_p)
    return tiles * triton.cdiv(shape.x_width, block_n), tiles * triton.cdiv(shape.skip_width, block_n)


def kappa_strides(kappa: Tensor | None) -> tuple[int, int]:
    """Strides of κ (B, C_skip), which is absent without a skip."""
    return (0, 0) if kappa is None else kappa.stride()


def parameter_strides(parameter: Tensor) -> tuple[int, int]:
    """Strides of a norm's weight or bias as (B, C): one for all samples has none along B."""
    return (0, parameter.stride(0)) if parameter.dim() == 1 else parameter.stride()


def dense_stats(stats: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Mean and M2 as kernels read them: fp32 and contiguous."""
    return (None, None) if stats is None else tuple(dense(t.float()) for t in stats)


class GroupNormForward(NamedTuple):
    """What :func:`group_norm_forward` returns.

    Attributes:
        out: ``(B, C, *spatial)``: the normalised and activated concat.
        concat: the raw concat cat[x, κ ⊙ skip], or None.
        mean, rstd: ``(B, G)`` fp32: mean and 1/σ of the groups.
    """

    out: Tensor
    concat: Tensor | None
    mean: Tensor
    rstd: Tensor


def group_norm_forward(
    x: Tensor,
    skip: Tensor | None,
    kappa: Tensor | None,
    stats_x: tuple[Tensor, Tensor],
    stats_skip: tuple[Tensor, Tensor] | None,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    activation: str,
    layout: str,
    skip_first: bool,
    return_concat: bool,
) -> GroupNormForward:
    """act(GroupNorm(cat[x, κ ⊙ skip])), or of x alone, in a launch over (sample, group) and one over the features.

    Args:
        x, skip: ``(B, C, *spatial)`` of one dtype, dense in ``layout``: ``planes`` or ``pixels``. Skip, κ and
            ``stats_skip`` are None together.
        kappa: ``(B, C_skip)`` with any strides, fp32 or the dtype of the feature.
        stats_x, stats_skip: mean and M2 of the channels of x and of the unscaled skip, ``(B, C)``.
        num_groups: divides the channels of the concat.
        weight, bias: ``(C,)`` or ``(B, C)`` in the order of the concat, any strides and floating dtype.
        activation: one of :data:`ACTIVATIONS`.
        skip_first: the concat is cat[κ ⊙ skip, x].
        return_concat: write the raw concat too.
    """
    shape = norm_shape(x, skip, num_groups, skip_first)
    out_shape = (shape.batch, shape.width, *x.shape[2:])
    out = empty_in(out_shape, layout, x)
    concat = empty_in(out_shape, layout, x) if return_concat else None
    mean, rstd = (torch.empty(shape.batch, num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    if out.numel() == 0:
        return GroupNormForward(out, concat, mean.zero_(), rstd.zero_())
    affine = torch.empty(2, shape.batch, shape.width, dtype=torch.float32, device=x.device)
    group_width = shape.width // num_groups
    coefficients = config_for("group_norm_coefficients", x, group_width)
    config = norm_config("group_norm", x, shape, layout)
    x_programs, skip_programs = tiles_of_halves(shape, config.meta["BLOCK_N"], config.meta["BLOCK_P"])
    of_x, of_skip = dense_stats(stats_x), dense_stats(stats_skip)
    with on_device(x):
        group_norm_coefficients_kernel[(shape.batch * num_groups,)](
            *of_x, *of_skip, kappa, weight, bias, affine, mean, rstd,
            *shape.halves, shape.positions, num_groups, group_width, shape.batch * shape.width, eps,
            *kappa_strides(kappa), *parameter_strides(weight), *parameter_strides(bias), **coefficients.kwargs(),
        )  # fmt: skip
        group_norm_kernel[(skip_programs + x_programs,)](
            x, skip, of_x[0], of_skip[0], kappa, affine, out, concat, *shape.halves, shape.positions, shape.width,
            shape.batch * shape.width, *kappa_strides(kappa), skip_programs,
            ACTIVATION=ACTIVATIONS[activation], PIXELS=layout == "pixels", **config.kwargs(),
        )  # fmt: skip
    return GroupNormForward(out, concat, mean, rstd)

"""What ``python -m benchmarks aot`` compiles: for every host function of kernels/ the calls that launch its kernels.

A new kernel joins by an entry in :data:`CASES`: a function that calls its host function with tensors of the ``meta``
device, and what the compiled code must show. Constexprs and launch configurations follow from the call and the tables.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_code import TARGETS

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
FLOATS = (BF16, FP16, FP32)
HALVES = (BF16, FP16)


@dataclass(frozen=True)
class Tokens:
    """Sizes of (B, L, D) features, and the hidden width of the gate over L."""

    name: str
    batch: int
    tokens: int
    width: int
    hidden: int = 16


@dataclass(frozen=True)
class Image:
    """Sizes of (B, C, side, side) features in contiguous planes or channels_last pixels."""

    name: str
    batch: int
    channels: int
    side: int
    layout: str

    @property
    def hidden(self) -> int:
        """Hidden width of the gate over C, at the reduction 16."""
        return max(1, self.channels // 16)


@dataclass(frozen=True)
class Pair:
    """Sizes of x and skip, (B, C, side, side) with C of their own, in one layout, and of the norm over their concat."""

    name: str
    batch: int
    x_channels: int
    skip_channels: int
    side: int
    layout: str
    groups: int = 32


#: The project's models; what is compiled for M/4, D = 768, differs from L/4 in nothing but numbers.
S2 = Tokens("U-ViT-S/2", 128, 257, 512)
L4 = Tokens("U-ViT-L/4", 128, 258, 1024)
T2I = Tokens("U-ViT-t2i", 256, 334, 512, 20)
#: Row lengths that the tables have lines for and no model of ours has.
OTHER_WIDTHS = tuple(Tokens(f"D = {width}", 128, 256, width) for width in (128, 256, 2048, 4096, 8192))
#: Decoder levels of the CIFAR-10 UNet: one for every line of the tables.
PLANES = tuple(Image(f"{c} × {s}²", 128, c, s, "planes") for c, s in ((128, 32), (256, 16), (256, 8), (256, 4)))
PIXELS = tuple(Image(f"{c} × {s}², channels_last", 128, c, s, "pixels") for c, s in ((128, 32), (32, 32)))

#: What is too little to fill a GPU without cutting sums into parts.
SINGLE = tuple(Image(f"320 × 64², {layout}, one sample", 1, 320, 64, layout) for layout in ("planes", "pixels"))


def _pair(batch: int, x_channels: int, skip_channels: int, side: int, layout: str) -> Pair:
    name = f"{x_channels} + {skip_channels} × {side}²{', channels_last' if layout == 'pixels' else ''}"
    return Pair(name, batch, x_channels, skip_channels, side, layout)


#: Decoder levels of the UNets; the small ones are there for the lines of the tables, the largest for its wide groups.
PIXEL_PAIRS = (
    _pair(128, 256, 256, 16, "pixels"),
    _pair(128, 256, 128, 32, "pixels"),
    _pair(64, 640, 480, 16, "pixels"),
    _pair(64, 320, 160, 64, "pixels"),
    _pair(8, 1280, 1280, 16, "pixels"),
    _pair(64, 32, 32, 32, "pixels"),
)
PLANE_PAIRS = (
    _pair(128, 256, 256, 16, "planes"),
    _pair(128, 256, 128, 32, "planes"),
    _pair(64, 320, 160, 64, "planes"),
    _pair(128, 256, 256, 8, "planes"),
    _pair(128, 256, 256, 4, "planes"),
)


@dataclass(frozen=True)
class Needs:
    """What the compiled code of a kernel must show.

    Attributes:
        matrix: the target's own matrix instructions, where the features have 16 bits.
        loads: at least so many 16-byte loads: one for each feature tensor that is read.
        stores: at least so many 16-byte stores: one for each feature tensor that is written.
    """

    matrix: bool = False
    loads: int = 0
    stores: int = 0


@dataclass(frozen=True)
class Case:
    """Calls of host functions.

    Attributes:
        name: for ``--only``.
        kernels: the kernels that this case is there for, by name, and what they need; others that the calls launch
            are left to their own cases.
        call: takes a shape and a dtype and calls host functions.
        shapes, dtypes, targets: each combination is one call.
    """

    name: str
    kernels: Mapping[str, Needs]
    call: Callable[[Any, torch.dtype], object]
    shapes: Sequence[Tokens | Image | Pair] = (S2, L4)
    dtypes: Sequence[torch.dtype] = FLOATS
    targets: Sequence[str] = tuple(TARGETS)


def _new(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _tokens(shape: Tokens, dtype: torch.dtype) -> Tensor:
    return _new(shape.batch, shape.tokens, shape.width, dtype=dtype)


def _kappa(shape: Tokens) -> Tensor:
    """κ as the gate makes it."""
    return _new(shape.batch, shape.tokens)


def _image(shape: Image, dtype: torch.dtype) -> Tensor:
    image = _new(shape.batch, shape.channels, shape.side, shape.side, dtype=dtype)
    return image.contiguous(memory_format=torch.channels_last) if shape.layout == "pixels" else image


def _halves(shape: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and skip."""
    x, skip = (
        _image(Image(shape.name, shape.batch, channels, shape.side, shape.layout), dtype)
        for channels in (shape.x_channels, shape.skip_channels)
    )
    return x, skip


def _gate(count: int, hidden: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w_down, b_down, w_up, b_up."""
    shapes = (hidden, count), (hidden,), (count, hidden), (count,)
    return tuple(_new(*shape, dtype=dtype) for shape in shapes)


def _se(shape: Tokens, dtype: torch.dtype) -> None:
    """``dtype`` is that of the parameters; pooled features are fp32 always."""
    from scalelong_fast.kernels import se

    gate, pooled = _gate(shape.tokens, shape.hidden, dtype), _new(shape.batch, shape.tokens)
    kappa, hidden = se.se_forward(pooled, *gate, "relu")
    grads = se.se_backward(kappa, kappa, hidden, gate[0], gate[2], "relu")
    se.se_weight_grad(pooled, hidden, grads[0], grads[1], "relu", (dtype,) * 4)


def _gap(shape: Tokens | Image, dtype: torch.dtype) -> None:
    from scalelong_fast.kernels import pool

    if isinstance(shape, Tokens):
        pool.gap_rows(_new(shape.batch * shape.tokens, shape.width, dtype=dtype))
    elif shape.layout == "planes":
        pool.gap_rows(_new(shape.batch * shape.channels, shape.side**2, dtype=dtype))
    else:
        pool.gap_columns(_new(shape.batch, shape.side**2, shape.channels, dtype=dtype))


def _feature(shape: Tokens | Image, dtype: torch.dtype) -> tuple[Tensor, str]:
    """A feature and the name of its layout."""
    return (_tokens(shape, dtype), "rows") if isinstance(shape, Tokens) else (_image(shape, dtype), shape.layout)


def _concat(shape: Tokens | Image, dtype: torch.dtype) -> None:
    from scalelong_fast.kernels import concat

    feature, layout = _feature(shape, dtype)
    kappa = _new(*feature.shape[:2])
    out = concat.scale_concat_forward(feature, feature, kappa, layout, False)
    width = feature.shape[2 if layout == "rows" else 1]
    concat.scale_concat_backward(out, feature, kappa, width, layout, False)


def _ls_concat(form: str) -> Callable[[Tokens | Image, torch.dtype], None]:
    def call(shape: Tokens | Image, dtype: torch.dtype) -> None:
        from scalelong_fast.kernels import ls_concat

        feature, layout = _feature(shape, dtype)
        gate = _gate(feature.shape[1], shape.hidden)
        out, kappa, pooled, hidden = ls_concat.ls_concat_forward(
            feature, feature, *gate, None, "relu", layout, False, form
        )
        ls_concat.ls_concat_backward(
            out, kappa, feature, kappa, hidden, pooled, *gate, False, "relu", layout, False
        )  # fmt: skip

    return call


def _channel_stats(shape: Image, dtype: torch.dtype) -> None:
    from scalelong_fast.kernels import channel_stats

    channel_stats.channel_stats_forward(_image(shape, dtype), shape.layout)


def _group_norm(concat: bool) -> Callable[[Pair, torch.dtype], None]:
    """A norm over the concat of both halves; ``concat``: the raw concat is written and has a gradient."""

    def call(shape: Pair, dtype: torch.dtype) -> None:
        from scalelong_fast.kernels import group_norm, group_norm_backward

        x, skip = _halves(shape, dtype)
        kappa, parameter = _new(shape.batch, shape.skip_channels), _new(shape.x_channels + shape.skip_channels)
        stats = (_new(*x.shape[:2]),) * 2, (_new(*skip.shape[:2]),) * 2
        normed = group_norm.group_norm_forward(
            x, skip, kappa, *stats, shape.groups, parameter, parameter, 1e-5, "silu", shape.layout, False, concat
        )
        group_norm_backward.group_norm_backward(
            normed.out, normed.concat, None, x, skip, kappa, *stats, normed.mean, normed.rstd, shape.groups, parameter,
            parameter, "silu", shape.layout, False,
        )  # fmt: skip

    return call


def _group_norm_alone(shape: Pair, dtype: torch.dtype) -> None:
    """A norm over x, whose mean has a gradient; weight and bias are each sample's own."""
    from scalelong_fast.kernels import group_norm, group_norm_backward

    x, _ = _halves(shape, dtype)
    of_channels = _new(*x.shape[:2])
    stats = of_channels, of_channels
    normed = group_norm.group_norm_forward(
        x, None, None, stats, None, shape.groups, of_channels, of_channels, 1e-5, "silu", shape.layout, False, False
    )
    group_norm_backward.group_norm_backward(
        normed.out, None, of_channels, x, None, None, stats, None, normed.mean, normed.rstd, shape.groups, of_channels,
        of_channels, "silu", shape.layout, False,
    )  # fmt: skip


def _layer_norm(shape: Tokens, dtype: torch.dtype) -> None:
    """A norm alone."""
    from scalelong_fast.kernels import layer_norm

    x, parameter = _tokens(shape, dtype), _new(shape.width)
    normed = layer_norm.layer_norm_forward(x, None, parameter, parameter, 1e-5, dtype)
    layer_norm.layer_norm_backward(x, normed.mean, None, None, x, normed.mean, normed.rstd, parameter, parameter)


def _add_layer_norm(shape: Tokens, dtype: torch.dtype) -> None:
    """Residual stream, branch and result in one dtype."""
    from scalelong_fast.kernels import layer_norm

    x, parameter = _tokens(shape, dtype), _new(shape.width)
    normed = layer_norm.layer_norm_forward(x, x, parameter, parameter, 1e-5, dtype)
    layer_norm.layer_norm_backward(x, normed.mean, x, x, x, normed.mean, normed.rstd, parameter, parameter)


def _add_layer_norm_mixed(shape: Tokens, dtype: torch.dtype) -> None:
    """An fp32 residual stream under autocast: branch, result and skip in ``dtype``."""
    from scalelong_fast.kernels import layer_norm

    x, half, parameter = _tokens(shape, FP32), _tokens(shape, dtype), _new(shape.width)
    full = layer_norm.layer_norm_forward(x, half, parameter, parameter, 1e-5, dtype, dtype)
    layer_norm.layer_norm_backward(half, full.mean, x, half, x, full.mean, full.rstd, parameter, parameter, dtype)


def _dual_gemm(tma: bool) -> Callable[[Tokens, torch.dtype], None]:
    def call(shape: Tokens, dtype: torch.dtype) -> None:
        from scalelong_fast.kernels import dual_gemm

        feature, weight = _tokens(shape, dtype), _new(shape.width, 2 * shape.width, dtype=dtype)
        dual_gemm.dual_gemm(feature, feature, _kappa(shape), weight, _new(shape.width, dtype=dtype), tma=tma)

    return call


def _dgrad(tma: bool, scale: bool = True) -> Callable[[Tokens, torch.dtype], None]:
    def call(shape: Tokens, dtype: torch.dtype) -> None:
        from scalelong_fast.kernels import dgrad

        feature, weight = _tokens(shape, dtype), _new(shape.width, 2 * shape.width, dtype=dtype)
        dgrad.dgrad(feature, feature, _kappa(shape), weight, kappa_grad=True, scale=scale, tma=tma)

    return call


def _skip_rows(shape: Tokens, dtype: torch.dtype) -> None:
    from scalelong_fast.kernels import dgrad

    feature, kappa = _tokens(shape, dtype), _kappa(shape)
    dgrad.skip_rows(feature, feature, kappa, grad_skip=True, scaled_skip=True, kappa_grad=True)


def _skip_rows_gap(shape: Tokens, dtype: torch.dtype) -> None:
    from scalelong_fast.kernels import dgrad

    feature, kappa = _tokens(shape, dtype), _kappa(shape)
    dgrad.skip_rows(feature, feature, kappa, grad_gap=kappa, grad_skip=True)


def _wgrad(shape: Tokens, dtype: torch.dtype) -> None:
    from scalelong_fast.kernels import wgrad

    feature = _tokens(shape, dtype)
    wgrad.wgrad(feature, feature, feature, _kappa(shape))


_GEMM_SHAPES = (S2, L4)
_FORMS = (S2, PLANES[2], PIXELS[0])
_TMA = ("sm_90", "sm_100")

CASES = (
    # Its weights have rows of 257 elements, so that they are loaded one by one.
    Case(
        "se",
        {"se_forward_kernel": Needs(), "se_backward_kernel": Needs(), "se_weight_grad_kernel": Needs()},
        _se,
        shapes=(S2, T2I),
        dtypes=(FP32, BF16),
    ),
    Case("gap", {"gap_kernel": Needs(loads=1)}, _gap, shapes=(S2, *PLANES, *PIXELS)),
    Case(
        "concat",
        {"scale_concat_kernel": Needs(loads=2, stores=2), "skip_backward_kernel": Needs(loads=2, stores=1)},
        _concat,
        shapes=(S2, *PLANES, *PIXELS),
    ),
    Case(
        "ls_concat",
        {"gated_concat_kernel": Needs(loads=2, stores=2)},
        _ls_concat("two_launch"),
        shapes=(S2, T2I, *PLANES[1:], *PIXELS),
    ),
    Case("ls_concat_backward", {"skip_backward_kernel": Needs(loads=1)}, _ls_concat("two_launch"), (S2, PIXELS[0])),
    Case(
        "ls_concat_single",
        {"sample_concat_kernel": Needs(loads=2, stores=2)},
        _ls_concat("single_launch"),
        shapes=_FORMS,
    ),
    Case(
        "ls_concat_cooperative",
        {"cooperative_concat_kernel": Needs(loads=2, stores=2)},
        _ls_concat("cooperative"),
        shapes=_FORMS,
    ),
    Case("channel_stats", {"channel_stats_kernel": Needs(loads=2)}, _channel_stats, shapes=(*PLANES, *PIXELS)),
    Case(
        "channel_stats_parts",
        {"channel_stats_kernel": Needs(loads=2), "channel_stats_join_kernel": Needs(loads=3)},
        _channel_stats,
        shapes=SINGLE,
        dtypes=(BF16,),
    ),
    Case(
        "group_norm",
        {
            "group_norm_coefficients_kernel": Needs(),
            "group_norm_kernel": Needs(loads=2, stores=4),
            "group_norm_sums_kernel": Needs(loads=5),
            "group_norm_backward_coefficients_kernel": Needs(),
            "group_norm_backward_kernel": Needs(loads=6, stores=2),
        },
        _group_norm(concat=True),
        shapes=(*PIXEL_PAIRS, *PLANE_PAIRS),
        dtypes=(BF16, FP32),
    ),
    Case(
        "group_norm_without_concat",
        {
            "group_norm_kernel": Needs(loads=2, stores=2),
            "group_norm_sums_kernel": Needs(loads=4),
            "group_norm_backward_kernel": Needs(loads=4, stores=2),
        },
        _group_norm(concat=False),
        shapes=(PIXEL_PAIRS[0], PLANE_PAIRS[0]),
        dtypes=HALVES,
    ),
    Case(
        "group_norm_alone",
        {
            "group_norm_kernel": Needs(loads=1, stores=1),
            "group_norm_sums_kernel": Needs(loads=2),
            "group_norm_backward_kernel": Needs(loads=2, stores=1),
        },
        _group_norm_alone,
        shapes=(PIXEL_PAIRS[0], PLANE_PAIRS[0]),
        dtypes=HALVES,
    ),
    Case(
        "layer_norm",
        {
            "layer_norm_forward_kernel": Needs(loads=1, stores=1),
            "layer_norm_backward_kernel": Needs(loads=2, stores=1),
            "layer_norm_sum_kernel": Needs(loads=1),
        },
        _layer_norm,
        shapes=(S2,),
    ),
    Case(
        "add_layer_norm",
        {
            "layer_norm_forward_kernel": Needs(loads=2, stores=2),
            "layer_norm_backward_kernel": Needs(loads=4, stores=1),
        },
        _add_layer_norm,
        shapes=(S2, L4, *OTHER_WIDTHS),
    ),
    Case(
        "add_layer_norm_mixed",
        {
            "layer_norm_forward_kernel": Needs(loads=2, stores=2),
            "layer_norm_backward_kernel": Needs(loads=4, stores=1),
        },
        _add_layer_norm_mixed,
        shapes=(S2, L4),
        dtypes=(BF16,),
    ),
    Case("dual_gemm", {"dual_gemm_kernel": Needs(True, loads=2, stores=1)}, _dual_gemm(False), _GEMM_SHAPES),
    Case(
        "dual_gemm_tma",
        {"dual_gemm_tma_kernel": Needs(True, loads=4, stores=1)},
        _dual_gemm(True),
        _GEMM_SHAPES,
        HALVES,
        _TMA,
    ),
    Case("dgrad", {"dgrad_kernel": Needs(True, loads=3, stores=2)}, _dgrad(False), _GEMM_SHAPES),
    Case(
        "dgrad_tma",
        {"dgrad_tma_kernel": Needs(True, loads=3, stores=2)},
        _dgrad(True),
        _GEMM_SHAPES,
        HALVES,
        _TMA,
    ),
    Case("dgrad_raw", {"dgrad_kernel": Needs(True, loads=3, stores=2)}, _dgrad(False, False), (S2,), (BF16,)),
    Case("skip_rows", {"skip_rows_kernel": Needs(loads=2, stores=2)}, _skip_rows),
    Case("skip_rows_gap", {"skip_rows_kernel": Needs(loads=1, stores=1)}, _skip_rows_gap, dtypes=HALVES),
    Case("wgrad", {"wgrad_kernel": Needs(True, loads=4, stores=1)}, _wgrad, _GEMM_SHAPES),
)


def covered() -> dict[str, set[str]]:
    """For every kernel that a case is there for the targets it is compiled for."""
    targets: dict[str, set[str]] = {}
    for case in CASES:
        for kernel in case.kernels:
            targets.setdefault(kernel, set()).update(case.targets)
    return targets

"""The time a call cannot go below: bytes that must move and products that must be taken, at this machine's speeds.

A :class:`Pass` is one kernel's worth of work that must happen in the best form known: each of its inputs read once
and its outputs written once. Counted are features, parameters and the pooled statistics; FLOP are those of matrix
products and of the SE gate, as in the ops' own formulas.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import environment
from benchmarks.op_cases import Case

#: Reduction of the SE gates, as in :func:`scalelong_fast.ops.examples.example_arguments`.
REDUCTION = 16

DIRECTIONS = ("fwd", "bwd", "fwd_bwd")


@dataclass(frozen=True)
class Product:
    """A matrix product (m, k) · (k, n); ``kind`` says how the operands lie, as a Linear's three products have them."""

    kind: str
    """nt: y = a · wᵀ (forward); nn: dx = dy · w; tn: dw = dyᵀ · x."""
    m: int
    n: int
    k: int

    @property
    def flop(self) -> int:
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Pass:
    """What one kernel must do at least."""

    name: str
    bytes: int
    flop: int = 0
    product: Product | None = None


def _gate(batch: int, width: int, *, backward: bool) -> Pass:
    hidden = max(1, width // REDUCTION)
    weights = 2 * width * hidden + width + hidden
    if not backward:  # pooled to κ
        return Pass("gate", 4 * (2 * batch * width + weights), 4 * batch * width * hidden)
    # dκ, κ and pooled read, the gradient of pooled written; weights read, their gradients written.
    return Pass("gate gradient", 4 * (4 * batch * width + 2 * weights), 8 * batch * width * hidden)


def _halves(case: Case) -> tuple[int, int, int]:
    """Elements of x and of the skip, and number of κ's."""
    if case.layout == "rows":
        batch, tokens, width = case.shape
        return batch * tokens * width, batch * tokens * width, batch * tokens
    batch, channels_x, channels_skip, *spatial = case.shape
    pixels = batch * torch.Size(spatial).numel()
    return pixels * channels_x, pixels * channels_skip, batch * channels_skip


def _se_gate(case: Case, backward: bool) -> list[Pass]:
    return [_gate(*case.shape, backward=backward)]


def _scale_concat(case: Case, backward: bool) -> list[Pass]:
    x, skip, count = _halves(case)
    size = case.dtype.itemsize
    if not backward:
        return [Pass("concat", 2 * (x + skip) * size + 4 * count)]
    # The gradient of x is a view of the concat's: nothing moves.
    return [Pass("concat gradient", 3 * skip * size + 8 * count)]


def _ls_scale_concat(case: Case, backward: bool) -> list[Pass]:
    _, skip, count = _halves(case)
    size = case.dtype.itemsize
    gate = _gate(case.shape[0], count // case.shape[0], backward=backward)
    if not backward:
        pool = [] if case.pooled else [Pass("pool", skip * size + 4 * count)]
        return [*pool, gate, *_scale_concat(case, backward=False)]
    if case.pooled:
        return [Pass("concat gradient", 3 * skip * size + 8 * count), gate]
    # All of dκ must be known before the gradient that comes back through the pooling is.
    return [
        Pass("κ's gradient", 2 * skip * size + 4 * count),
        gate,
        Pass("skip's gradient", 2 * skip * size + 8 * count),
    ]


def _scale_concat_linear(case: Case, backward: bool) -> list[Pass]:
    batch, tokens, width = case.shape
    rows = batch * tokens
    feature, size = (case.stream or case.dtype).itemsize, case.dtype.itemsize
    elements, weight, kappa = rows * width, 2 * width * width * size, 4 * rows
    if not backward:
        product = Product("nt", rows, width, 2 * width)
        return [Pass("product", elements * (2 * feature + size) + weight + kappa, product.flop, product)]
    input_product, weight_product = Product("nn", rows, 2 * width, width), Product("tn", width, 2 * width, rows)
    return [
        # dy and skip read (the latter for dκ), dx and dskip written.
        Pass(
            "input gradients",
            elements * (size + 3 * feature) + weight + 2 * kappa,
            input_product.flop,
            input_product,
        ),
        Pass(
            "weight gradient",
            elements * (size + 2 * feature) + weight + kappa,
            weight_product.flop,
            weight_product,
        ),
    ]


def _ls_skip_linear(case: Case, backward: bool) -> list[Pass]:
    batch, tokens, width = case.shape
    rows, feature = batch * tokens, (case.stream or case.dtype).itemsize
    gate = _gate(batch, tokens, backward=backward)
    products = _scale_concat_linear(case, backward)
    if not backward:
        pool = [] if case.pooled else [Pass("pool", rows * (width * feature + 4))]
        return [*pool, gate, *products]
    # The pooling's gradient needs all of dκ, so the skip's gradient is touched a second time.
    pool = [] if case.pooled else [Pass("pool's gradient", rows * (2 * width * feature + 4))]
    return [products[0], gate, *pool, products[1]]


def _layer_norm_gap(case: Case, backward: bool) -> list[Pass]:
    batch, tokens, width = case.shape
    rows, feature, size = batch * tokens, (case.stream or case.dtype).itemsize, case.dtype.itemsize
    if not backward:
        return [Pass("norm", rows * (width * (feature + size) + 4) + 8 * width)]
    return [Pass("norm's gradient", rows * (width * (size + 2 * feature) + 4) + 12 * width)]


def _add_layer_norm_gap(case: Case, backward: bool) -> list[Pass]:
    batch, tokens, width = case.shape
    rows, feature, size = batch * tokens, (case.stream or case.dtype).itemsize, case.dtype.itemsize
    narrow = case.stream is not None  # then the skip's handle, and the branch's gradient, are copies of their own
    if not backward:  # x and branch to the sum and its norm
        copy = size if narrow else 0
        return [Pass("add and norm", rows * (width * (2 * feature + 2 * size + copy) + 4) + 8 * width)]
    # The gradients of norm, sum and skip, and the sum, to the gradient of x.
    copy = size if narrow else 0
    return [Pass("joined gradient", rows * (width * (2 * size + 3 * feature + copy) + 4) + 12 * width)]


def _image(case: Case) -> tuple[int, int, int]:
    """Pixels of all samples, samples, and channels of an image of its own."""
    batch, channels, *spatial = case.shape
    return batch * torch.Size(spatial).numel(), batch, channels


def _channel_stats(case: Case, backward: bool) -> list[Pass]:
    pixels, batch, channels = _image(case)
    if not backward:  # mean and m2
        return [Pass("statistics", pixels * channels * case.dtype.itemsize + 8 * batch * channels)]
    # All pixels of a channel have the same gradient: an expanded tensor, which fills no memory.
    return [Pass("mean's gradient", batch * channels * (4 + case.dtype.itemsize))]


def _group_norm(feature: int, statistics: int, channels: int, backward: bool, **extra: int) -> list[Pass]:
    """A norm whose statistics are known, forward; or its backward: sums over all pixels, then the gradients.

    Args:
        feature: bytes of what is normalised.
        statistics: bytes of the mean and m2 of its channels.
        channels: C, of weight and bias.
        backward: which.
        extra: bytes that passes touch besides: ``norm``; ``sums``, ``gradients``.
    """
    if not backward:
        return [Pass("norm", 2 * feature + statistics + 8 * channels + extra.get("norm", 0))]
    return [
        # dy and x read, and the norm's weight and bias; their gradients written.
        Pass("sums", 2 * feature + statistics + 16 * channels + extra.get("sums", 0)),
        # dy and x read again, dx written.
        Pass("gradients", 3 * feature + statistics + 8 * channels + extra.get("gradients", 0)),
    ]


def _group_norm_gap(case: Case, backward: bool) -> list[Pass]:
    pixels, batch, channels = _image(case)
    feature, statistics = pixels * channels * case.dtype.itemsize, 8 * batch * channels
    means = 4 * batch * channels  # the gradient of the mean joins in the second pass
    passes = _group_norm(feature, statistics, channels, backward, gradients=means)
    return passes if backward else [*_channel_stats(case, backward=False), *passes]


def _scale_concat_group_norm(case: Case, backward: bool) -> list[Pass]:
    x, skip, count = _halves(case)
    size, batch = case.dtype.itemsize, case.shape[0]
    concat, kappa = (x + skip) * size, 4 * count
    of_x, of_skip = 8 * batch * case.shape[1], 8 * count  # mean and m2
    # The raw concat is written next to the norm; its gradient is read for κ's, as far as the skip goes, and joins in.
    norm, sums, gradients = kappa, 2 * kappa, kappa
    if case.raw:
        norm, sums, gradients = norm + concat, sums + skip * size, gradients + concat
    passes = _group_norm(
        concat, of_x + of_skip, case.shape[1] + case.shape[2], backward, norm=norm, sums=sums, gradients=gradients
    )
    if backward:
        return passes
    pool = [] if case.pooled else [Pass("statistics of the skip", skip * size + of_skip)]
    return [*pool, Pass("statistics of x", x * size + of_x), *passes]


def _scale_concat_conv1x1(case: Case, backward: bool) -> list[Pass]:
    x, skip, count = _halves(case)
    size, channels_x, channels = case.dtype.itemsize, case.shape[1], case.shape[1] + case.shape[2]
    rows, out, kappa = x // channels_x, channels_x, 4 * count  # as many channels come out as x has
    inputs, output, weight = (x + skip) * size, rows * out * size, out * channels * size
    if not backward:
        product = Product("nt", rows, out, channels)
        return [Pass("product", inputs + output + weight + kappa, product.flop, product)]
    input_product, weight_product = Product("nn", rows, channels, out), Product("tn", out, channels, rows)
    return [
        # dy, and the skip for dκ, read; dx and dskip written.
        Pass("input gradients", output + skip * size + inputs + weight + 2 * kappa, input_product.flop, input_product),
        Pass("weight gradient", output + inputs + weight + kappa, weight_product.flop, weight_product),
    ]


_PASSES: dict[str, Callable[[Case, bool], list[Pass]]] = {
    "se_gate": _se_gate,
    "scale_concat": _scale_concat,
    "ls_scale_concat": _ls_scale_concat,
    "scale_concat_linear": _scale_concat_linear,
    "ls_skip_linear": _ls_skip_linear,
    "layer_norm_gap": _layer_norm_gap,
    "add_layer_norm_gap": _add_layer_norm_gap,
    "channel_stats": _channel_stats,
    "group_norm_gap": _group_norm_gap,
    "scale_concat_group_norm": _scale_concat_group_norm,
    "scale_concat_conv1x1": _scale_concat_conv1x1,
}


def passes(case: Case, direction: str) -> list[Pass]:
    """The passes of a call; ``direction`` is one of :data:`DIRECTIONS`."""
    forward = [] if direction == "bwd" else _PASSES[case.op](case, False)
    backward = [] if direction == "fwd" else _PASSES[case.op](case, True)
    return forward + backward


def total_bytes(case: Case, direction: str) -> int:
    """Bytes of all passes."""
    return sum(step.bytes for step in passes(case, direction))


def total_flop(case: Case, direction: str) -> int:
    """FLOP of all passes."""
    return sum(step.flop for step in passes(case, direction))


class Limits:
    """Speeds of this machine, measured in this run: copy bandwidth, and PyTorch's own product at each shape asked for.

    Args:
        device: where.
        seconds: time spent on each measurement.
    """

    def __init__(self, device: torch.device, seconds: float = 0.3):
        self.device, self.seconds = device, seconds
        self.ceilings = environment.ceilings(device, seconds)
        self._rates: dict[tuple[Product, torch.dtype], float] = {}

    def rate(self, product: Product, dtype: torch.dtype) -> float:
        """FLOP a second of PyTorch's product at this shape, random data."""
        key = product, dtype
        if key not in self._rates:
            self._rates[key] = product.flop / self._seconds(product, dtype)
        return self._rates[key]

    def _seconds(self, product: Product, dtype: torch.dtype) -> float:
        def draw(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=self.device, dtype=dtype)

        m, n, k = product.m, product.n, product.k
        a = draw(k, m).t() if product.kind == "tn" else draw(m, k)
        b = draw(n, k).t() if product.kind == "nt" else draw(k, n)
        return environment.fastest(lambda: a @ b, self.device, self.seconds)

    def floor(self, case: Case, direction: str) -> float:
        """Seconds: each pass takes at least its bytes over the copy bandwidth or its product at PyTorch's rate."""
        bandwidth = self.ceilings["copy_gb_s"] * 1e9
        total = 0.0
        for step in passes(case, direction):
            arithmetic = step.flop / self.rate(step.product, case.dtype) if step.product else 0.0
            total += max(step.bytes / bandwidth, arithmetic)
        return total

    def as_json(self) -> dict[str, Any]:
        """The ceilings of a result file, with the rates of single shapes."""
        shapes = [
            {
                "kind": product.kind,
                "m_n_k": [product.m, product.n, product.k],
                "dtype": str(dtype).removeprefix("torch."),
                "tflop_s": round(rate / 1e12, 4),
            }
            for (product, dtype), rate in self._rates.items()
        ]
        return {**self.ceilings, "products": shapes}

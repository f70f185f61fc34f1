"""A scaled long skip whose product and concat are put off until it is known which layer reads them.

``torch.cat([x, skip])`` of a patched network is followed by a Linear, by a GroupNorm or by something else. The first
two are done by an op that reads x and skip as they are (:mod:`scalelong_fast.ops`); for everything else the concat is
made by ``scale_concat``, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalelong_fast.integrations.patching.concat_layout import common_layout, dense_strides
from scalelong_fast.integrations.patching.promise import Deferred, Promise, defer
from scalelong_fast.kernels.layouts import concat_shape, is_dense
from scalelong_fast.ops import scale_concat, scale_concat_group_norm, scale_concat_linear
from scalelong_fast.ops.autocast import no_autocast
from scalelong_fast.ops.differentiable import plain
from scalelong_fast.ops.plans import resolve
from scalelong_fast.scaling import scale_skip
from scalelong_fast.scaling.base import Kappa

#: Least size of a long skip, in bytes, that is deferred. Deferring takes the host some 0.3 ms a skip, and spares the
#: device about eight passes over it, 0.07 ms at this size and 4 TB/s, and as many in the backward, beside
#: convolutions that take longer. Reckoned, not measured.
WORTH_BYTES = 32 * 2**20

_forced = False


@contextmanager
def always_defer() -> Iterator[None]:
    """Defer inside the block whatever can be deferred, on any device, and take the ops whatever their plan.

    For tests: on a CPU this gains nothing.
    """
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def defer_skip(
    skip: Tensor, kappa: Kappa, reader: nn.Module | None = None, note: Callable[[str], Any] | None = None
) -> Tensor:
    """κ ⊙ skip for a network that will concatenate it, computed now or, where that gains, together with what follows.

    Args:
        skip: the encoder's feature ``(B, C, *spatial)`` or ``(B, L, D)``.
        kappa: as :meth:`scalelong_fast.scaling.LongSkipScaling.kappa` gives it.
        reader: the module that concatenates; where it or a part of it is compiled nothing is deferred, since the
            compiler fuses by itself and would stop at a deferred tensor.
        note: is told in a few words what became of the skip, where it was deferred.

    Returns:
        A tensor that is κ ⊙ skip to whoever reads it; ``skip`` itself for a float of 1. With x in
        ``torch.cat([x, it], dim)``, either side first, it becomes a concat that F.linear, F.group_norm (with a F.silu
        after it) and what follows take unfinished.
    """
    if isinstance(kappa, float) and kappa == 1.0:
        return skip
    if not _gains(skip, kappa) or (reader is not None and _holds_compiled(reader)):
        return scale_skip(skip, kappa)
    return defer(DeferredSkip(skip, kappa, note or _tell_nobody))


def _tell_nobody(text: str) -> None:
    pass


def _holds_compiled(module: nn.Module) -> bool:
    return any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in module.modules())


def _gains(skip: Tensor, kappa: Kappa) -> bool:
    """Whether the product is worth putting off, and nobody is at work who could not see through it."""
    large = skip.device.type == "cuda" and skip.numel() * skip.element_size() >= WORTH_BYTES
    if not (large or _forced):
        return False
    gate = kappa if isinstance(kappa, Tensor) else None
    if torch.jit.is_tracing() or torch.is_inference_mode_enabled() or not plain(skip, gate):
        return False
    if gate is not None and (gate.dtype not in (torch.float32, skip.dtype) or gate.device != skip.device):
        return False
    if torch.autograd.forward_ad._current_level >= 0:  # the ops know the backward only
        return False
    if skip.is_inference() or skip.layout is not torch.strided or not 3 <= skip.dim() <= 5 or skip.numel() == 0:
        return False
    return skip.dtype in (torch.float32, torch.float16, torch.bfloat16) and _is_dense(skip)


def _is_dense(tensor: Tensor) -> bool:
    return is_dense(tensor, "planes") or is_dense(tensor, "pixels")


def _with(kappa: Kappa) -> tuple[Tensor, ...]:
    return (kappa,) if isinstance(kappa, Tensor) else ()


class DeferredSkip(Promise):
    """κ ⊙ skip."""

    def __init__(self, skip: Tensor, kappa: Kappa, note: Callable[[str], Any]):
        self.note = note
        self.number = None if isinstance(kappa, Tensor) else kappa
        super().__init__((skip, *_with(kappa)), skip.shape, skip.stride(), skip.dtype)

    def compute(self, skip: Tensor, kappa: Tensor | None = None) -> Tensor:
        self.note("multiply")
        return scale_skip(skip, self.number if kappa is None else kappa)

    def concatenate(self, tensors: Any = (), dim: int = 0, *, axis: int | None = None, out: Any = None) -> Any:
        """``torch.cat`` of it and one other."""
        dim = dim if axis is None else axis
        if out is not None or not isinstance(tensors, (tuple, list)) or len(tensors) != 2:
            return NotImplemented
        skip_first = isinstance(tensors[0], Deferred)
        x = tensors[1 if skip_first else 0]
        skip, *gate = self.unchanged()
        layout = common_layout(x, skip, dim)
        if layout is None or not plain(x):
            return NotImplemented
        return defer(DeferredConcat(x, skip, gate[0] if gate else self.number, layout, skip_first, self.note))


DeferredSkip.readers = dict.fromkeys((torch.cat, torch.concat, torch.concatenate), DeferredSkip.concatenate)


class DeferredConcat(Promise):
    """cat[x, κ ⊙ skip].

    Args:
        x, skip: dense in ``layout``.
        kappa: of the skip.
        layout: as in :class:`scalelong_fast.ops.problem.Problem`.
        skip_first: cat[κ ⊙ skip, x].
        note: of :func:`defer_skip`.
    """

    def __init__(
        self, x: Tensor, skip: Tensor, kappa: Kappa, layout: str, skip_first: bool, note: Callable[[str], Any]
    ):
        self.note = note
        self.number = None if isinstance(kappa, Tensor) else kappa
        self.layout, self.skip_first = layout, skip_first
        shape = concat_shape(x, skip, layout)
        super().__init__((x, skip, *_with(kappa)), torch.Size(shape), dense_strides(shape, layout), x.dtype)

    def parts(self) -> tuple[Tensor, Tensor, Kappa]:
        """x, skip and κ."""
        x, skip, *gate = self.unchanged()
        return x, skip, gate[0] if gate else self.number

    def compute(self, x: Tensor, skip: Tensor, kappa: Tensor | None = None) -> Tensor:
        dim = -1 if self.layout == "rows" else 1
        self.note("scale_concat")
        return scale_concat(x, skip, self.number if kappa is None else kappa, dim=dim, skip_first=self.skip_first)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        """``F.linear``."""
        # With the skip in front the halves of the weight would have to change places, which is a copy of it.
        if self.layout != "rows" or self.skip_first or not plain(weight, bias) or weight.dim() != 2:
            return NotImplemented
        if weight.shape[1] != self.shape[-1] or weight.is_inference():
            return NotImplemented
        x, skip, kappa = self.parts()
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            known = (torch.float32, torch.get_autocast_dtype(kind))
        elif weight.dtype == self.dtype:
            known = (self.dtype,)
        else:
            return NotImplemented
        if bias is not None and bias.dtype not in known:
            return NotImplemented
        if isinstance(kappa, Tensor) and kappa.dtype not in (torch.float32, *known):
            return NotImplemented
        arguments = (x, skip, kappa, weight, bias)
        if not _forced and resolve("scale_concat_linear", *arguments)[1] == "eager":
            return NotImplemented
        self.note("scale_concat_linear")
        return scale_concat_linear(*arguments)

    def group_norm(
        self,
        input: Deferred,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        """``F.group_norm``: put off as well, until it is known whether a SiLU follows."""
        if self.layout == "rows" or weight is None or bias is None or not plain(weight, bias):
            return NotImplemented
        channels = (self.shape[1],)
        if weight.shape != channels or bias.shape != channels or num_groups < 1 or channels[0] % num_groups:
            return NotImplemented
        if weight.dtype not in (torch.float32, self.dtype) or bias.dtype != weight.dtype or not eps > 0:
            return NotImplemented
        if weight.is_inference() or (self.device.type == "cpu" and weight.dtype != self.dtype):
            return NotImplemented
        norm = DeferredNorm(input, num_groups, weight, bias, float(eps))
        with no_autocast(self.device.type):
            if not _forced and resolve("scale_concat_group_norm", *norm.arguments(), return_concat=True)[1] == "eager":
                return NotImplemented
        return defer(norm)

    def read_written(self, *arguments: Any, function: Callable[..., Any], **kwargs: Any) -> Any:
        """A function that only reads, of the concat that the norm wrote: both gradients then meet in its backward."""
        written = next(value.written for value in (*arguments, *kwargs.values()) if isinstance(value, Deferred))
        if written is None:
            return NotImplemented
        arguments = tuple(written if isinstance(value, Deferred) else value for value in arguments)
        kwargs = {name: written if isinstance(value, Deferred) else value for name, value in kwargs.items()}
        return function(*arguments, **kwargs)


#: What a residual block does with the raw concat, next to its norm.
_READING = (F.conv1d, F.conv2d, F.conv3d, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
DeferredConcat.readers = {F.linear: DeferredConcat.linear, F.group_norm: DeferredConcat.group_norm} | {
    function: functools.partial(DeferredConcat.read_written, function=function) for function in _READING
}


class DeferredNorm(Promise):
    """GroupNorm(cat[x, κ ⊙ skip]).

    Args:
        concat: what is normalised.
        num_groups, weight, bias, eps: of the norm.
    """

    def __init__(self, concat: Deferred, num_groups: int, weight: Tensor, bias: Tensor, eps: float):
        self.concat, self.num_groups, self.eps = concat, num_groups, eps
        self.of: DeferredConcat = concat.promise
        # Autocast has GroupNorm in float32 on a GPU.
        wide = self.of.device.type != "cpu" and torch.is_autocast_enabled(self.of.device.type)
        dtype = torch.float32 if wide else self.of.dtype
        # Views, since a hook after the norm may put other memory into its parameters (offloading does).
        tensors = (*self.of.unchanged(), weight.view_as(weight), bias.view_as(bias))
        super().__init__(tensors, self.of.shape, self.of.strides, dtype)

    def arguments(self) -> tuple:
        """Of ``scale_concat_group_norm``."""
        x, skip, *gate, weight, bias = self.unchanged()
        return x, skip, gate[0] if gate else self.of.number, self.num_groups, weight, bias, self.eps

    def compute(self, x: Tensor, skip: Tensor, *others: Tensor) -> Tensor:
        *gate, weight, bias = others
        kappa = gate[0] if gate else self.of.number
        if self.dtype != x.dtype:
            concat = self.of.compute(x, skip, *gate).to(self.dtype)
            return F.group_norm(concat, self.num_groups, weight.to(self.dtype), bias.to(self.dtype), self.eps)
        self.of.note("scale_concat_group_norm")
        return scale_concat_group_norm(
            x, skip, kappa, self.num_groups, weight, bias, self.eps, "none", skip_first=self.of.skip_first
        )

    def silu(self, input: Tensor, inplace: bool = False) -> Any:
        """``F.silu``."""
        if inplace:
            return NotImplemented
        self.of.note("scale_concat_group_norm, with the SiLU")
        with no_autocast(self.device.type):
            out, written = scale_concat_group_norm(
                *self.arguments(), "silu", return_concat=True, skip_first=self.of.skip_first
            )
        if self.concat.is_open():
            self.concat.written = written
        return out.to(self.dtype)


DeferredNorm.readers = {F.silu: DeferredNorm.silu}

"""Joins a forward and a backward torch op, with a short cut past the dispatcher for eager calls.

A registered op costs 12 to 18 µs of host time a call, which small inputs feel; a bare ``autograd.Function`` costs 3 to
8 µs. Both run the same functions: :func:`differentiable` builds the pair and picks per call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def plain(*tensors: Tensor | None) -> bool:
    """True where nothing watches the dispatcher: no compiler, no mode, no functorch level, no tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._is_torch_function_mode_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def call(op: Any, *args: Any) -> Any:
    """Call a custom op, directly where nothing watches the dispatcher."""
    if plain(*(a for a in args if isinstance(a, Tensor))):
        return op._init_fn(*args)
    return op(*args)


def refuse_second_derivative(name: str) -> NotImplementedError:
    """The error of a double backward, the same in every plan."""
    return NotImplementedError(
        f"{name}: got a second derivative (backward through a backward), which is not supported. Differentiate the "
        f"reference in scalelong_fast.ops.{name} (function {name}_reference) instead."
    )


class _OnceDifferentiable(torch.autograd.Function):
    """Identity whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        ctx.set_materialize_grads(False)
        # An output of no elements: all that the seal needs of the graph, without keeping a feature alive.
        anchor = tensors[0].new_empty(0)
        ctx.save_for_backward(anchor)
        return anchor, *tensors

    @staticmethod
    def backward(ctx: Any, _: None, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, *sealed(ctx.name, grads, ctx.saved_tensors)


class _Sealed(torch.autograd.Function):
    """Identity on gradients that raises when somebody differentiates them."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise refuse_second_derivative(ctx.name)


def sealed(
    name: str, grads: tuple[Tensor | None, ...], anchors: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """``grads`` as they are, or, under ``create_graph=True``, sealed against a second backward.

    ``anchors`` tie the seal to the graph, so that a second backward that asks for some inputs only passes through it.
    """
    present = [g for g in grads if g is not None]
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not present:
        return grads
    out = iter(_Sealed.apply(name, len(present), *present, *(t for t in anchors if t is not None and t.requires_grad)))
    return tuple(None if g is None else next(out) for g in grads)


class _Opened:
    """A context whose saved tensors were unpacked once: checkpointing allows no more."""

    def __init__(self, ctx: Any):
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once_differentiable(name: str, *outputs: Tensor) -> tuple[Tensor, ...]:
    """Outputs of a plan made of PyTorch calls, with the double backward refused as in the fused plans."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not any(t.requires_grad for t in outputs):
        return outputs
    return _OnceDifferentiable.apply(name, *outputs)[1:]


def differentiable(
    name: str,
    forward: Any,
    backward: Any,
    setup: Callable[[Any, tuple, Any], None],
    gradient: Callable[..., tuple],
) -> Callable[..., Any]:
    """Register autograd for ``forward`` and return the function to call.

    Args:
        name: of the public op, for messages.
        forward: custom op (``torch.library.custom_op`` with a fake).
        backward: custom op that :func:`gradient` calls through :func:`call`.
        setup: ``(ctx, inputs, output)``: what the backward needs; the plan is among the inputs, so that the backward's
            plan is fixed here (autograd's threads do not see context managers).
        gradient: ``(ctx, *grads)`` to one gradient (or None) per input of ``forward``; a missing output gradient
            arrives as zeros unless ``setup`` turned that off.

    Returns:
        Function with the arguments of ``forward``.
    """

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise refuse_second_derivative(name)

    forward.register_autograd(gradient, setup_context=setup)
    backward.register_autograd(refuse)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = forward._init_fn(*args)
            setup(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple:
            if not torch.is_grad_enabled():
                return gradient(ctx, *grads)
            opened = _Opened(ctx)
            with torch.no_grad():
                out = gradient(opened, *grads)
            # A gradient that depends on nothing but the output's, as that of a linear op, is tied by the latter.
            return sealed(name, out, (*opened.saved_tensors, *grads))

    Direct.__name__ = Direct.__qualname__ = f"{name}_direct"

    def run(*args: Any) -> Any:
        if not plain(*(a for a in args if isinstance(a, Tensor))):
            return forward(*args)
        return Direct.apply(*args)

    return run

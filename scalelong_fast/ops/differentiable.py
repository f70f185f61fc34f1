"""Joins a forward and a backward torch op, with a short cut past the dispatcher for eager calls.

A registered op costs 12 to 18 µs of host time a call, which small inputs feel; a bare ``autograd.Function`` costs 3 to
8 µs. Both run the same functions: :func:`differentiable` builds the pair and picks per call.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def under_functorch() -> bool:
    """Whether a functorch transform (vmap, grad, ...) is at work."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def plain(*tensors: Tensor | None) -> bool:
    """True where nothing watches the dispatcher: no compiler, no mode, no functorch level, no tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._is_torch_function_mode_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    # The dispatcher also makes a pending negation real.
    return all(t is None or (type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg()) for t in tensors)


def call(op: Any, *args: Any) -> Any:
    """Call a custom op, directly where nothing watches the dispatcher and nothing is to be recorded."""
    if not torch.is_grad_enabled() and plain(*(a for a in args if isinstance(a, Tensor))):
        return op._init_fn(*args)
    return op(*args)


def refuse_second_derivative(name: str) -> NotImplementedError:
    """The error of a double backward, the same in every plan."""
    return NotImplementedError(
        f"{name}: got a second derivative (backward through a backward), which is not supported. Differentiate the "
        f"reference in scalelong_fast.ops.{name} (function {name}_reference) instead."
    )


class _Anchor(torch.autograd.Function):
    """A tensor of no elements, tied to the graph of ``tensors`` without keeping any of them alive."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.count = len(tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.count


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


def once_differentiable(name: str, inputs: Iterable[Any], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``outputs`` of a plan made of PyTorch calls, with the double backward refused as in the fused plans.

    A hook seals the gradient that comes in, if it is to be differentiated; what PyTorch makes of it is then tied to
    ``inputs`` through the seal. The outputs stay ordinary tensors, which may be changed in place.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or under_functorch():
        return outputs
    # Weakly: the hook must not keep a feature alive. One that is gone can only be asked for through what it was made
    # from, and there PyTorch's own second derivative, which is right, is what comes out.
    references = [weakref.ref(t) for t in inputs if isinstance(t, Tensor) and t.requires_grad]

    def seal(grad: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        alive = [t for reference in references if (t := reference()) is not None]
        return _Sealed.apply(name, 1, grad, _Anchor.apply(*alive))[0] if alive else None

    if references:
        for output in outputs:
            if output.requires_grad:
                output.register_hook(seal)
    return outputs


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
        if under_functorch():
            raise NotImplementedError(
                f"{name}: the demanded plan does not support functorch transforms (torch.func, vmap). Drop the demand: "
                "the op then takes its eager plan there, which does."
            )
        if not plain(*(a for a in args if isinstance(a, Tensor))):
            return forward(*args)
        return Direct.apply(*args)

    return run

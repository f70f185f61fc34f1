"""``ls_scale_concat``: learnable scaling LS from the skip to the concat, GAP, gate, scale and concat as one op."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from scalelong_fast.errors import invalid
from scalelong_fast.kernels.layouts import concat_dim, concat_shape, empty_in
from scalelong_fast.ops.checks import check_activation, check_gate, check_parameter_dtype, check_tensor, shape_of
from scalelong_fast.ops.differentiable import call, differentiable, once_differentiable
from scalelong_fast.ops.plans import Plan, register_plans, resolve
from scalelong_fast.ops.problem import Problem
from scalelong_fast.ops.scale_concat import feature_problem, parts, scale_concat_reference, scale_into_buffer
from scalelong_fast.ops.se_gate import gate_flops, gate_obstacle, se_gate_reference


def ls_scale_concat(
    x: Tensor,
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    *,
    pooled: Tensor | None = None,
    activation: str = "relu",
    dim: int = 1,
    skip_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """cat[x, κ ⊙ skip] with κ = σ(W_up ψ(W_down · GAP(skip) + b_down) + b_up), ScaleLong's LS (Eq. 10 and 11).

    Args:
        x, skip, dim, skip_first: as :func:`scalelong_fast.ops.scale_concat` takes them.
        w_down, b_down, w_up, b_up: ``(H, N)``, ``(H,)``, ``(N, H)``, ``(N,)`` with N the channels or tokens of the skip
            (its dim 1); float32 or the dtype of the feature.
        pooled: ``(B, N)``, GAP of the skip, where its producer has it: the mean over all dimensions but the first two
            of the feature as stored, float32 or the dtype of the feature. Differentiable; the gradient of the mean then
            is the producer's affair.
        activation: ψ, one of ``relu``, ``elu``, ``mish``.

    Returns:
        The concat, as of :func:`scalelong_fast.ops.scale_concat`, and κ ``(B, N)`` float32 (float64 for float64
        features). Both are differentiable, once, in every tensor. Autocast casts x and skip and nothing else.

    Raises:
        UserError: wrong shapes, dtypes, devices or activation.
        NotImplementedError: a forced plan that cannot serve the call; a double backward.
    """
    gate = (w_down, b_down, w_up, b_up)
    kwargs = {"pooled": pooled, "activation": activation, "dim": dim, "skip_first": skip_first}
    problem, plan = resolve("ls_scale_concat", x, skip, *gate, **kwargs)
    x, skip = x.to(problem.dtype), skip.to(problem.dtype)
    if plan == "eager":
        out = ls_scale_concat_reference(x, skip, *gate, **kwargs)
        return once_differentiable("ls_scale_concat", (x, skip, *gate, pooled), out)
    if plan == "cat_buffer":
        kappa = _gate(skip, *gate, pooled, activation)
        out = scale_into_buffer(x, skip, kappa, dim=dim, skip_first=skip_first)
        return once_differentiable("ls_scale_concat", (x, skip, *gate, pooled), (out, kappa))
    return _run(x, skip, *gate, pooled, activation, problem.layout, skip_first, plan)[:2]


def ls_scale_concat_reference(
    x: Tensor,
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    *,
    pooled: Tensor | None = None,
    activation: str = "relu",
    dim: int = 1,
    skip_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`ls_scale_concat` in PyTorch; arguments as there, unchecked."""
    kappa = _gate(skip, w_down, b_down, w_up, b_up, pooled, activation)
    return scale_concat_reference(x, skip, kappa, dim=dim, skip_first=skip_first), kappa


def _gate(
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    pooled: Tensor | None,
    activation: str,
) -> Tensor:
    if pooled is None:
        dtype = torch.promote_types(skip.dtype, torch.float32)
        pooled = skip.mean(tuple(range(2, skip.dim())), dtype=dtype)
    return se_gate_reference(pooled, w_down, b_down, w_up, b_up, activation)


def _problem(
    x: Tensor,
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    *,
    pooled: Tensor | None = None,
    activation: str = "relu",
    dim: int = 1,
    skip_first: bool = False,
) -> Problem:
    check_tensor("w_down", w_down)
    hidden = w_down.shape[0] if w_down.dim() else 0
    problem = feature_problem("ls_scale_concat", x, skip, dim, hidden)
    if 0 in skip.shape[1:]:
        raise invalid("skip", shape_of(skip), "a feature with something to pool: no empty dimension but the batch")
    count = skip.shape[1]
    check_gate(w_down, b_down, w_up, b_up, width=count, dtype=problem.dtype, device=skip.device)
    if pooled is not None:
        check_tensor("pooled", pooled, shape=(skip.shape[0], count), device=skip.device)
        check_parameter_dtype("pooled", pooled, problem.dtype)
    check_activation(activation)
    return problem


@torch.library.custom_op("scalelong_fast::ls_scale_concat", mutates_args=())
def _forward(
    x: Tensor,
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    pooled: Tensor | None,
    activation: str,
    layout: str,
    skip_first: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The concat, κ (B, N), the GAP (B, N; empty where pooled was given) and the pre-activation z (B, H)."""
    from scalelong_fast.kernels.ls_concat import ls_concat_forward

    out, kappa, gap, hidden = ls_concat_forward(
        x, skip, w_down, b_down, w_up, b_up, pooled, activation, layout, skip_first, plan
    )
    return out, kappa, kappa.new_empty(0) if gap is None else gap, hidden


@_forward.register_fake
def _(x, skip, w_down, b_down, w_up, b_up, pooled, activation, layout, skip_first, plan):
    kappa = torch.empty(skip.shape[:2], dtype=torch.float32, device=x.device)
    gap = torch.empty_like(kappa) if pooled is None else kappa.new_empty(0)
    hidden = kappa.new_empty(skip.shape[0], w_down.shape[0])
    return empty_in(concat_shape(x, skip, layout), layout, x), kappa, gap, hidden


@torch.library.custom_op("scalelong_fast::ls_scale_concat_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_kappa: Tensor | None,
    skip: Tensor,
    kappa: Tensor,
    hidden: Tensor,
    pooled: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    pooled_given: bool,
    activation: str,
    layout: str,
    skip_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of skip, pooled (empty where the skip was pooled here), w_down, b_down, w_up, b_up."""
    from scalelong_fast.kernels.ls_concat import ls_concat_backward

    grad_skip, grad_pooled, *grads = ls_concat_backward(
        grad_out, grad_kappa, skip, kappa, hidden, pooled, w_down, b_down, w_up, b_up, pooled_given, activation,
        layout, skip_first,
    )  # fmt: skip
    return grad_skip, pooled.new_empty(0) if grad_pooled is None else grad_pooled.to(pooled.dtype), *grads


@_backward.register_fake
def _(grad_out, grad_kappa, skip, kappa, hidden, pooled, w_down, b_down, w_up, b_up, pooled_given, *args):
    grad_pooled = torch.empty_like(pooled, memory_format=torch.contiguous_format)
    weights = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (w_down, b_down, w_up, b_up))
    return empty_in(skip.shape, args[1], skip), grad_pooled if pooled_given else pooled.new_empty(0), *weights


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, skip, *gate, pooled, ctx.activation, ctx.layout, ctx.skip_first, _ = inputs
    _, kappa, gap, hidden = output
    ctx.pooled_given = pooled is not None
    ctx.skip_width = skip.shape[concat_dim(ctx.layout)]
    ctx.save_for_backward(skip, kappa, hidden, gap if pooled is None else pooled, *gate)
    ctx.mark_non_differentiable(gap, hidden)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_kappa: Tensor | None, *_: None) -> tuple:
    skip, *saved = ctx.saved_tensors
    grad_x = None
    if grad_out is None:
        # Only κ was used: a concat of the skip alone stands in.
        grad_out = torch.zeros_like(skip)
    else:
        grad_x, _ = parts(grad_out, ctx.skip_width, ctx.layout, ctx.skip_first)
    grad_skip, grad_pooled, *gate = call(
        _backward, grad_out, grad_kappa, skip, *saved, ctx.pooled_given, ctx.activation, ctx.layout, ctx.skip_first
    )
    return grad_x, grad_skip, *gate, grad_pooled if ctx.pooled_given else None, None, None, None, None


_run = differentiable("ls_scale_concat", _forward, _backward, _setup, _gradient)


def _cooperative_obstacle(problem: Problem) -> str | None:
    if problem.arch == "cpu":
        return "it takes a GPU: in the interpreter programs run one after the other and cannot wait for each other"
    return gate_obstacle(problem)


register_plans(
    "ls_scale_concat",
    [
        Plan("two_launch", "a kernel that pools, and one that gates, scales and concatenates", gate_obstacle),
        Plan("single_launch", "one kernel, one program per sample", gate_obstacle),
        Plan("cooperative", "one kernel, programs of a sample wait for each other", _cooperative_obstacle),
        Plan("cat_buffer", "PyTorch, the product written into the concat"),
        Plan("eager", "PyTorch"),
    ],
    _problem,
)


@register_flop_formula(torch.ops.scalelong_fast.ls_scale_concat)
def _(x, skip, w_down, *args, out_shape=None, **kwargs) -> int:
    return gate_flops(skip[0], skip[1], w_down[0])


@register_flop_formula(torch.ops.scalelong_fast.ls_scale_concat_backward)
def _(grad_out, grad_kappa, skip, kappa, hidden, *args, out_shape=None, **kwargs) -> int:
    return 2 * gate_flops(kappa[0], kappa[1], hidden[1])

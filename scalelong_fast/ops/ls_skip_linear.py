"""``ls_skip_linear``: a U-ViT's whole LS long skip, from the two features to the Linear's output, as one op."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from scalelong_fast.ops.autocast import no_autocast
from scalelong_fast.ops.checks import check_activation, check_gate, check_parameter_dtype, check_tensor
from scalelong_fast.ops.differentiable import call, differentiable, once_differentiable
from scalelong_fast.ops.plans import Plan, register_plans, resolve
from scalelong_fast.ops.problem import Problem
from scalelong_fast.ops.scale_concat_linear import (
    FUSED_PLANS,
    bias_grad,
    linear,
    product_flops,
    product_forward,
    product_input_grad,
    product_plans,
    product_problem,
    product_weight_grad,
    scale_concat_linear_reference,
    two_gemm,
)
from scalelong_fast.ops.se_gate import gate_flops, gate_obstacle, se_gate, se_gate_reference


def ls_skip_linear(
    x: Tensor,
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pooled: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """Linear(cat[x, κ ⊙ skip]) with κ = σ(SE(GAP(skip))): learnable scaling LS, ScaleLong Eq. 10 and 11, in a U-ViT.

    Args:
        x: the decoder's feature ``(B, L, D_x)``.
        skip: the encoder's feature ``(B, L, D_s)``, of the same dtype.
        w_down, b_down, w_up, b_up: the SE gate over L tokens: ``(H, L)``, ``(H,)``, ``(L, H)``, ``(L,)``; float32 or
            the dtype of the feature.
        weight, bias: ``(D_out, D_x + D_s)`` of the feature's dtype, and ``(D_out,)`` or None, float32 or that dtype.
        pooled: GAP of the skip ``(B, L)`` where somebody has it already (``layer_norm_gap``), float32 or the dtype of
            the feature; differentiable. Without it the op pools, and the pooling's gradient is part of the skip's.
        activation: ψ, one of ``relu``, ``elu``, ``mish``.

    Returns:
        The Linear's output ``(B, L, D_out)`` in the dtype of x, and κ ``(B, L)``, float32 (float64 for float64), both
        differentiable once. Under autocast x, skip and weight are cast to its dtype, and the op pools the cast skip.

    Raises:
        UserError: wrong shapes, dtypes, devices or activation.
        NotImplementedError: a forced plan that cannot serve the call; a double backward.
    """
    gate = (w_down, b_down, w_up, b_up)
    problem, plan = resolve("ls_skip_linear", x, skip, *gate, weight, bias, pooled=pooled, activation=activation)
    x, skip, weight = x.to(problem.dtype), skip.to(problem.dtype), weight.to(problem.dtype)
    if plan in FUSED_PLANS:
        return _run(x, skip, *gate, weight, bias, pooled, activation, plan)[:2]
    with no_autocast(x.device.type):
        out = _COMPOSITES[plan](x, skip, *gate, weight, bias, pooled=pooled, activation=activation)
    return once_differentiable("ls_skip_linear", (x, skip, *gate, weight, bias, pooled), out)


def ls_skip_linear_reference(
    x: Tensor,
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pooled: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`ls_skip_linear` in PyTorch; arguments as there, unchecked."""
    kappa = se_gate_reference(_pool(skip, pooled), w_down, b_down, w_up, b_up, activation)
    return scale_concat_linear_reference(x, skip, kappa, weight, bias), kappa


def _pool(skip: Tensor, pooled: Tensor | None) -> Tensor:
    """GAP in float32 of the stored skip, unless it is there."""
    if pooled is not None:
        return pooled
    return skip.mean(-1, dtype=torch.promote_types(skip.dtype, torch.float32))


def _two_gemm(
    x: Tensor, skip: Tensor, *rest: Tensor | None, pooled: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    *gate, weight, bias = rest
    dtype = torch.promote_types(skip.dtype, torch.float32)
    kappa = se_gate(_pool(skip, pooled).to(dtype), *(p.to(dtype) for p in gate), activation)
    return two_gemm(x, skip, kappa, weight, bias), kappa


def _concat_gemm(
    x: Tensor, skip: Tensor, *rest: Tensor | None, pooled: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    from scalelong_fast.ops.ls_scale_concat import ls_scale_concat

    *gate, weight, bias = rest
    out, kappa = ls_scale_concat(x, skip, *gate, pooled=pooled, activation=activation, dim=-1)
    return linear(out, weight, bias), kappa


_COMPOSITES = {"eager": ls_skip_linear_reference, "two_gemm": _two_gemm, "concat_gemm": _concat_gemm}


def _problem(
    x: Tensor,
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pooled: Tensor | None = None,
    activation: str = "relu",
) -> Problem:
    hidden = w_down.shape[0] if isinstance(w_down, Tensor) and w_down.dim() == 2 else 0
    problem = product_problem("ls_skip_linear", x, skip, weight, bias, hidden=hidden)
    batch, tokens = x.shape[:2]
    check_gate(w_down, b_down, w_up, b_up, width=tokens, dtype=problem.dtype, device=x.device)
    if pooled is not None:
        check_tensor("pooled", pooled, shape=(batch, tokens), device=x.device)
        check_parameter_dtype("pooled", pooled, problem.dtype)
    check_activation(activation)
    return problem


@torch.library.custom_op("scalelong_fast::ls_skip_linear", mutates_args=())
def _forward(
    x: Tensor,
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pooled: Tensor | None,
    activation: str,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, κ (B, L), the gate's pre-activation (B, H), and the GAP (B, L) where it was not given, else empty."""
    from scalelong_fast.kernels.common import dense
    from scalelong_fast.kernels.pool import gap_rows
    from scalelong_fast.kernels.se import se_forward

    gap = gap_rows(dense(skip).view(-1, skip.shape[2])).view(skip.shape[:2]) if pooled is None else None
    kappa, hidden = se_forward(gap if pooled is None else pooled, w_down, b_down, w_up, b_up, activation)
    out = product_forward(plan, x, skip, kappa, weight, bias)
    return out, kappa, hidden, kappa.new_empty(0) if gap is None else gap


@_forward.register_fake
def _(x, skip, w_down, b_down, w_up, b_up, weight, bias, pooled, activation, plan):
    batch, tokens = x.shape[:2]
    kappa = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    gap = kappa.new_empty(batch, tokens) if pooled is None else kappa.new_empty(0)
    return x.new_empty(batch, tokens, weight.shape[0]), kappa, kappa.new_empty(batch, w_down.shape[0]), gap


@torch.library.custom_op("scalelong_fast::ls_skip_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_kappa: Tensor | None,
    x: Tensor,
    skip: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    weight: Tensor,
    pooled: Tensor,
    kappa: Tensor,
    hidden: Tensor,
    bias_dtype: torch.dtype | None,
    pooled_here: bool,
    weight_grad: bool,
    activation: str,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, skip, w_down, b_down, w_up, b_up, weight, bias, pooled; empty where not wanted."""
    from scalelong_fast.kernels.dgrad import skip_rows
    from scalelong_fast.kernels.se import se_backward, se_weight_grad

    # A backward may run under autocast, which would change the dtypes of the products in it.
    with no_autocast(grad.device.type):
        # The skip's gradient is complete only once the GAP's is known, which needs dκ of all tokens: where the GAP was
        # made here, the skip's half stays unscaled, and the pass that adds the GAP's gradient scales it as well.
        grad_x, grad_skip, partial, scaled = product_input_grad(
            plan, grad, skip, kappa, weight, scale=not pooled_here, kappa_grad=True, weight_grad=weight_grad
        )
        if grad_kappa is not None:
            partial[0] += grad_kappa
        logit, z, grad_pooled = se_backward(partial, kappa, hidden, w_down, w_up, activation)
        if pooled_here:
            skip_rows(grad_skip, skip, kappa, grad_gap=grad_pooled, grad_skip=True)
        dtypes = (w_down.dtype, b_down.dtype, w_up.dtype, b_up.dtype)
        return (
            grad_x,
            grad_skip,
            *se_weight_grad(pooled, hidden, logit, z, activation, dtypes),
            product_weight_grad(plan, grad, x, skip, kappa, scaled) if weight_grad else grad.new_empty(0),
            grad.new_empty(0) if bias_dtype is None else bias_grad(grad, bias_dtype),
            grad.new_empty(0) if pooled_here else grad_pooled.to(pooled.dtype),
        )


@_backward.register_fake
def _(
    grad, grad_kappa, x, skip, w_down, b_down, w_up, b_up, weight, pooled, kappa, hidden, bias_dtype, here, wants, *_
):
    def like(tensor: Tensor, wanted: bool = True) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=grad.device) if wanted else grad.new_empty(0)

    bias = grad.new_empty(weight.shape[0], dtype=bias_dtype) if bias_dtype is not None else grad.new_empty(0)
    gate = (like(t) for t in (w_down, b_down, w_up, b_up))
    return like(x), like(skip), *gate, like(weight, wants), bias, like(pooled, not here)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, skip, w_down, b_down, w_up, b_up, weight, bias, pooled, ctx.activation, ctx.plan = inputs
    _, kappa, hidden, gap = output
    ctx.mark_non_differentiable(hidden, gap)
    # κ is often not differentiated any further: its gradient then stays None instead of becoming zeros.
    ctx.set_materialize_grads(False)
    ctx.pooled_here = pooled is None
    ctx.bias_dtype = None if bias is None else bias.dtype
    given = gap if pooled is None else pooled
    ctx.save_for_backward(x, skip, w_down, b_down, w_up, b_up, weight, given, kappa, hidden)


def _gradient(ctx: Any, grad: Tensor | None, grad_kappa: Tensor | None, *_: None) -> tuple:
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    x, weight = saved[0], saved[6]
    if grad is None:
        grad = x.new_zeros(x.shape[0], x.shape[1], weight.shape[0])
    weight_grad = ctx.needs_input_grad[6]
    bias_dtype = ctx.bias_dtype if ctx.needs_input_grad[7] else None
    options = (bias_dtype, ctx.pooled_here, weight_grad, ctx.activation, ctx.plan)
    *grads, bias, pooled = call(_backward, grad, grad_kappa, *saved, *options)
    if not weight_grad:
        grads[6] = None
    return *grads, None if bias_dtype is None else bias, None if ctx.pooled_here else pooled, None, None


_run = differentiable("ls_skip_linear", _forward, _backward, _setup, _gradient)


def _with_gate(plan: Plan) -> Plan:
    """The plan with the obstacles of the gate's kernel besides, where it launches that."""
    if plan.name not in FUSED_PLANS:
        return plan
    summary = f"GAP, gate and {plan.summary}"
    return Plan(plan.name, summary, lambda problem: plan.obstacle(problem) or gate_obstacle(problem))


register_plans("ls_skip_linear", [_with_gate(plan) for plan in product_plans()], _problem)


@register_flop_formula(torch.ops.scalelong_fast.ls_skip_linear)
def _(x, skip, w_down, b_down, w_up, b_up, weight, *args, out_shape=None, **kwargs) -> int:
    return product_flops(x[0] * x[1], weight) + gate_flops(x[0], x[1], w_down[0])


@register_flop_formula(torch.ops.scalelong_fast.ls_skip_linear_backward)
def _(grad, grad_kappa, x, skip, w_down, b_down, w_up, b_up, weight, *args, out_shape=None, **kwargs) -> int:
    weight_grad = args[5]
    return (2 if weight_grad else 1) * product_flops(x[0] * x[1], weight) + 2 * gate_flops(x[0], x[1], w_down[0])

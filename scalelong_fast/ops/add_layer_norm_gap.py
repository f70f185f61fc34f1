"""``add_layer_norm_gap``: residual add, LayerNorm and GAP in one pass, and all their gradients in one pass back."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from scalelong_fast.errors import invalid
from scalelong_fast.ops.checks import check_tensor, name_of
from scalelong_fast.ops.differentiable import call, differentiable, once_differentiable, sealed
from scalelong_fast.ops.layer_norm_gap import (
    check_norm,
    join_without_norm,
    layer_norm_gap_reference,
    norm_obstacle,
    norm_problem,
)
from scalelong_fast.ops.native_layer_norm import native_backward, native_forward, native_obstacle
from scalelong_fast.ops.plans import Plan, register_plans, resolve
from scalelong_fast.ops.problem import Problem


def add_layer_norm_gap(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    skip_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s = x + branch, LayerNorm(s) and the row mean of s: the end of one pre-norm block and the head of the next.

    In a U-ViT s goes three ways: into the norm, along the residual stream, and down the long skip; and its row mean is
    the GAP from which LS gates that skip (ScaleLong Eq. 10). Four gradients come back. s is returned under two
    handles, so that the backward receives those of residual stream and skip apart and sums all four in one pass.

    Args:
        x: ``(..., D)``, at least 2-D, floating: the residual stream. Its dtype is kept, under autocast too.
        branch: shape of x: what attention or MLP adds; dtype of x or a narrower one.
        weight, bias: ``(D,)``, float32 or the dtype of x.
        eps: added to the variance.
        out_dtype: of LN(s), for instance the autocast dtype that the next Linear wants; x's where None.
        skip_dtype: of the handle for the skip; x's where None. A narrower one costs an extra write here and spares the
            skip's consumer a pass that casts.

    Returns:
        ``(y, mean, s, s_skip)``: y = LN(s) in ``out_dtype``; the mean of the rows of s as it is stored (rounded to x's
        dtype), shape ``x.shape[:-1]``, float32 (float64 for float64); s, in x's dtype; and s once more for the skip,
        a view of s unless ``skip_dtype`` differs, so change neither in place. All differentiable once.

    Raises:
        UserError: wrong shapes, dtypes, devices or eps.
        NotImplementedError: a forced plan that cannot serve the call; a double backward.
    """
    _, plan = resolve("add_layer_norm_gap", x, branch, weight, bias, eps, out_dtype=out_dtype, skip_dtype=skip_dtype)
    out_dtype, skip_dtype = out_dtype or x.dtype, skip_dtype or x.dtype
    if plan == "eager":
        out = add_layer_norm_gap_reference(x, branch, weight, bias, eps, out_dtype=out_dtype, skip_dtype=skip_dtype)
        return once_differentiable("add_layer_norm_gap", (x, branch, weight, bias), out)
    if plan == "triton" and skip_dtype != x.dtype:
        out, mean, _, total, skip = _run(x, branch, weight, bias, float(eps), out_dtype, skip_dtype, plan)
        return out, mean, total, skip
    out, mean, total, skip = _TwoHandles.apply(x, branch, weight, bias, float(eps), out_dtype, plan)
    return out, mean, total, skip.to(skip_dtype)


def add_layer_norm_gap_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    skip_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition of :func:`add_layer_norm_gap` in PyTorch; arguments as there, unchecked."""
    total = x + branch
    out, mean = layer_norm_gap_reference(total, weight, bias, eps, out_dtype=out_dtype)
    # A view, never the same object: whoever changes one handle in place must not find the other one replaced.
    skip = total.view_as(total) if skip_dtype in (None, x.dtype) else total.to(skip_dtype)
    return out, mean, total, skip


def _problem(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    skip_dtype: torch.dtype | None = None,
) -> Problem:
    check_norm(x, weight, bias, eps, out_dtype)
    check_tensor("branch", branch, shape=tuple(x.shape), device=x.device)
    if torch.promote_types(x.dtype, branch.dtype) != x.dtype:
        raise invalid(
            "branch",
            name_of(branch.dtype),
            f"{name_of(x.dtype)}, the dtype of x, or a narrower one",
            "Convert it: branch.to(x.dtype).",
        )
    if skip_dtype not in (None, x.dtype, torch.float16, torch.bfloat16) or (
        skip_dtype is not None and torch.promote_types(x.dtype, skip_dtype) != x.dtype
    ):
        raise invalid("skip_dtype", skip_dtype, f"the dtype of x, torch.{name_of(x.dtype)}, or a narrower one")
    return norm_problem("add_layer_norm_gap", x)


@torch.library.custom_op("scalelong_fast::add_layer_norm_gap", mutates_args=())
def _forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    skip_dtype: torch.dtype | None,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LN(s), mean and 1/σ of the rows of s, s, and s in ``skip_dtype`` (without one, an empty tensor)."""
    from scalelong_fast.kernels.layer_norm import layer_norm_forward

    normed = layer_norm_forward(x, branch, weight, bias, eps, out_dtype, skip_dtype)
    copy = x.new_empty(0) if normed.copy is None else normed.copy
    return normed.out, normed.mean, normed.rstd, normed.total, copy


@_forward.register_fake
def _(x, branch, weight, bias, eps, out_dtype, skip_dtype, plan):
    def like_x(dtype: torch.dtype) -> Tensor:
        return torch.empty(x.shape, dtype=dtype, device=x.device)

    statistic = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    copy = x.new_empty(0) if skip_dtype is None else like_x(skip_dtype)
    return like_x(out_dtype), statistic, torch.empty_like(statistic), like_x(x.dtype), copy


@torch.library.custom_op("scalelong_fast::add_layer_norm_gap_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_mean: Tensor | None,
    grad_total: Tensor | None,
    grad_skip: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of s in its dtype and in the branch's (where that is the same, an empty tensor), of weight and bias."""
    from scalelong_fast.kernels.common import dense
    from scalelong_fast.kernels.layer_norm import layer_norm_backward

    grad, copy, grad_weight, grad_bias = layer_norm_backward(
        grad_out, grad_mean, grad_total, grad_skip, dense(total), mean, rstd, weight, bias,
        None if branch_dtype == total.dtype else branch_dtype,
    )  # fmt: skip
    copy = grad.new_empty(0) if copy is None else copy
    return grad, copy, grad_weight, grad_bias


@_backward.register_fake
def _(grad_out, grad_mean, grad_total, grad_skip, total, mean, rstd, weight, bias, branch_dtype):
    def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)

    copy = total.new_empty(0) if branch_dtype == total.dtype else like(total, branch_dtype)
    return like(total, total.dtype), copy, like(weight, weight.dtype), like(bias, bias.dtype)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, branch, weight, bias, *_, skip_dtype, ctx.plan = inputs
    _, mean, rstd, total, copy = output
    ctx.branch_dtype = branch.dtype
    ctx.save_for_backward(total, mean, rstd, weight, bias)
    ctx.mark_non_differentiable(rstd, *([copy] if skip_dtype is None else []))
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_mean: Tensor | None,
    grad_total: Tensor | None,
    grad_skip: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, branch, weight, bias; ``saved`` are s, mean, 1/σ, weight, bias."""
    total = saved[0]
    if grad_out is None:
        grad = join_without_norm((grad_total, grad_skip), grad_mean, total.shape, total.dtype)
        return grad, None if grad is None else grad.to(ctx.branch_dtype), None, None
    grads = (grad_out, grad_mean, grad_total, grad_skip, *saved)
    if ctx.plan == "native":
        grad, *parameters = native_backward(*grads)
        return grad, grad.to(ctx.branch_dtype), *parameters
    grad, copy, *parameters = call(_backward, *grads, ctx.branch_dtype)
    return grad, grad if ctx.branch_dtype == total.dtype else copy, *parameters


def _gradient(
    ctx: Any,
    grad_out: Tensor | None,
    grad_mean: Tensor | None,
    _: None,
    grad_total: Tensor | None,
    grad_skip: Tensor | None,
) -> tuple:
    return *_gradients(ctx, ctx.saved_tensors, grad_out, grad_mean, grad_total, grad_skip), None, None, None, None


_run = differentiable("add_layer_norm_gap", _forward, _backward, _setup, _gradient)


class _TwoHandles(torch.autograd.Function):
    """Returns s twice, of which a torch op is not capable: the second time as a view."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype, plan: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if plan == "native":
            total = x + branch
            out, mean, rstd = native_forward(total, weight, bias, eps, out_dtype)
        else:
            out, mean, rstd, total, _ = call(_forward, x, branch, weight, bias, eps, out_dtype, None, plan)
        ctx.plan, ctx.branch_dtype = plan, branch.dtype
        ctx.save_for_backward(total, mean, rstd, weight, bias)
        ctx.set_materialize_grads(False)
        return out, mean, total, total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        saved = ctx.saved_tensors
        with torch.no_grad():
            out = _gradients(ctx, saved, *grads)
        return *sealed("add_layer_norm_gap", out, (*saved, *grads)), None, None, None


register_plans(
    "add_layer_norm_gap",
    [
        Plan("triton", "one kernel for add, norm and mean, one for all gradients", norm_obstacle),
        Plan("native", "PyTorch's CPU kernel, whose mean is put to use", native_obstacle),
        Plan("eager", "PyTorch"),
    ],
    _problem,
)


@register_flop_formula(torch.ops.scalelong_fast.add_layer_norm_gap)
def _(*args, out_shape=None, **kwargs) -> int:
    # As in PyTorch's own counter, only products of matrices count.
    return 0


@register_flop_formula(torch.ops.scalelong_fast.add_layer_norm_gap_backward)
def _(*args, out_shape=None, **kwargs) -> int:
    return 0

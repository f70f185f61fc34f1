"""``scale_concat_linear``: Linear(cat[x, κ ⊙ skip]) without the concat."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from scalelong_fast.errors import invalid
from scalelong_fast.ops.autocast import autocast_dtype, no_autocast
from scalelong_fast.ops.checks import check_parameter_dtype, check_same_dtype, check_tensor, name_of, shape_of
from scalelong_fast.ops.differentiable import call, differentiable, once_differentiable
from scalelong_fast.ops.kappa import Kappa, check_kappa, expand_kappa
from scalelong_fast.ops.plans import Plan, register_plans, resolve
from scalelong_fast.ops.problem import Problem, architecture, triton_obstacle
from scalelong_fast.ops.scale_concat import scale_concat, scale_concat_reference


def scale_concat_linear(x: Tensor, skip: Tensor, kappa: Kappa, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear(cat[x, κ ⊙ skip]), the scaled long skip of ScaleLong Eq. 4 as a U-ViT takes it, without the concat.

    It is x · W_xᵀ + κ ⊙ (skip · W_sᵀ) + b with [W_x | W_s] = weight.

    Args:
        x: the decoder's feature ``(B, L, D_x)``.
        skip: the encoder's feature ``(B, L, D_s)``, of the same dtype.
        kappa: a float, a 0-dim tensor, ``(L,)`` or ``(B, L)``, one for each token; float32 or the dtype of the feature.
            A tensor is differentiable and never read by the host.
        weight: ``(D_out, D_x + D_s)``, of the same dtype; the one of the ``nn.Linear`` that took the concat.
        bias: ``(D_out,)`` or None; float32 or the dtype of the feature.

    Returns:
        ``(B, L, D_out)``, contiguous, in the dtype of x, accumulated in float32. Under autocast x, skip and weight are
        cast to its dtype. Differentiable once in every tensor.

    Raises:
        UserError: wrong shapes, dtypes, devices or κ.
        NotImplementedError: a forced plan that cannot serve the call; a double backward.
    """
    problem, plan = resolve("scale_concat_linear", x, skip, kappa, weight, bias)
    x, skip, weight = x.to(problem.dtype), skip.to(problem.dtype), weight.to(problem.dtype)
    if plan in FUSED_PLANS:
        plain = not isinstance(kappa, Tensor) and kappa == 1
        gate = None if plain else expand_kappa(kappa, batch=skip.shape[0], count=skip.shape[1], device=skip.device)
        return _run(x, skip, gate, weight, bias, plan)
    with no_autocast(x.device.type):
        out = _COMPOSITES[plan](x, skip, kappa, weight, bias)
    return once_differentiable("scale_concat_linear", (x, skip, kappa, weight, bias), (out,))[0]


def scale_concat_linear_reference(
    x: Tensor, skip: Tensor, kappa: Kappa, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The definition of :func:`scale_concat_linear` in PyTorch; arguments as there, unchecked."""
    return linear(scale_concat_reference(x, skip, kappa, dim=-1), weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` with a bias that may be float32 beside narrower features."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def two_gemm(x: Tensor, skip: Tensor, kappa: Kappa, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`scale_concat_linear_reference` as two products, each over its half of the weight."""
    gate = expand_kappa(kappa, batch=skip.shape[0], count=skip.shape[1], device=skip.device)[..., None]
    width = x.shape[-1]
    half = linear(x, weight[:, :width], bias)
    return torch.addcmul(half, F.linear(skip, weight[:, width:]), gate).to(x.dtype)


def concat_gemm(x: Tensor, skip: Tensor, kappa: Kappa, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`scale_concat_linear_reference` with the concat made by the op ``scale_concat``."""
    return linear(scale_concat(x, skip, kappa, dim=-1), weight, bias)


_COMPOSITES = {"eager": scale_concat_linear_reference, "two_gemm": two_gemm, "concat_gemm": concat_gemm}


def product_problem(
    op: str, x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, *, hidden: int = 0
) -> Problem:
    """Check features, weight and bias of a product over two halves, and say what there is to do.

    Args:
        op: name of the op.
        x, skip, weight, bias: as :func:`scale_concat_linear` takes them.
        hidden: of :class:`Problem`.

    Raises:
        UserError: what does not fit.
    """
    check_tensor("x", x)
    if x.dim() != 3 or x.shape[2] < 1:
        raise invalid("x", shape_of(x), "shape (B, L, D_x)")
    check_tensor("skip", skip, device=x.device)
    batch, tokens, d_x = x.shape
    if skip.dim() != 3 or skip.shape[0] != batch or skip.shape[1] != tokens or skip.shape[2] < 1:
        raise invalid("skip", shape_of(skip), f"shape ({int(batch)}, {int(tokens)}, D_s): batch and tokens of x")
    d_s = skip.shape[2]
    check_tensor("weight", weight, device=x.device)
    if weight.dim() != 2 or weight.shape[1] != d_x + d_s or weight.shape[0] < 1:
        raise invalid(
            "weight",
            shape_of(weight),
            f"shape (D_out, {int(d_x)} + {int(d_s)}): the features of x and of skip",
            "A weight made for cat[skip, x] fits by its shape, but needs its halves exchanged." if d_x != d_s else "",
        )
    d_out = weight.shape[0]
    dtype = autocast_dtype(x)
    for argument, value in (("skip", skip), ("weight", weight)):
        if autocast_dtype(value) != dtype:
            check_same_dtype(argument, value, "x", x.dtype)
    if bias is not None:
        check_tensor("bias", bias, shape=(d_out,), device=x.device)
        check_parameter_dtype("bias", bias, dtype)
    widths = (d_x, d_s, d_out)
    return Problem(
        op,
        architecture(x.device),
        dtype,
        rows=batch * tokens,
        widths=widths,
        batch=batch,
        hidden=hidden,
        aligned=all(width * dtype.itemsize % 16 == 0 for width in widths),
    )


def _problem(x: Tensor, skip: Tensor, kappa: Kappa, weight: Tensor, bias: Tensor | None = None) -> Problem:
    problem = product_problem("scale_concat_linear", x, skip, weight, bias)
    check_kappa(kappa, batch=skip.shape[0], count=skip.shape[1], dtype=problem.dtype, device=skip.device)
    return problem


#: Most rows of a product: 2^31 less the largest tile.
MAX_ROWS = 2**31 - 1024


def pointer_obstacle(problem: Problem) -> str | None:
    """Why the kernels that load by pointers cannot serve a problem, or None."""
    # Rows and weights are counted in 32 bits, the rows of the last tile included.
    if problem.rows > MAX_ROWS:
        return f"{problem.rows} rows ({MAX_ROWS} at most)"
    if problem.widths[2] * (problem.widths[0] + problem.widths[1]) >= 2**31:
        return (
            f"a weight of {problem.widths[2]} x ({problem.widths[0]} + {problem.widths[1]}) numbers (2^31 - 1 at most)"
        )
    return triton_obstacle(problem)


def tma_obstacle(problem: Problem) -> str | None:
    """Why the kernels that load by tensor descriptors cannot serve a problem, or None."""
    obstacle = pointer_obstacle(problem)
    if obstacle is not None:
        return obstacle
    if problem.arch not in ("sm_90", "sm_100", "cpu"):
        return f"tensor descriptors need sm_90 (Hopper) or sm_100 (Blackwell), and the tensors are on {problem.arch}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"it is for float16 and bfloat16, and the features are {name_of(problem.dtype)}"
    if not problem.aligned:
        sizes = tuple(int(width) for width in problem.widths)
        return f"tensor descriptors need widths that are multiples of 8, and (D_x, D_s, D_out) is {sizes}"
    return None


#: Plans that launch the kernels of dual_gemm.py.
FUSED_PLANS = ("tma", "pointer", "tma_cublas", "pointer_cublas")


def product_forward(plan: str, x: Tensor, skip: Tensor, kappa: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output of a fused plan; κ is (B, L) with any strides."""
    from scalelong_fast.kernels.dual_gemm import dual_gemm

    return dual_gemm(x, skip, kappa, weight, bias, tma=plan.startswith("tma"))


def product_input_grad(
    plan: str,
    grad: Tensor,
    skip: Tensor,
    kappa: Tensor,
    weight: Tensor,
    *,
    scale: bool,
    kappa_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of a fused plan at its features.

    Args:
        scale: finish grad_skip; otherwise it is dy · W_s still, and :func:`skip_rows` finishes it.
        kappa_grad, weight_grad: which gradients are wanted besides.

    Returns:
        grad_x, grad_skip, dκ as partial sums ``(parts, B, L)`` fp32 or None, and κ ⊙ skip where this plan's product for
        the weight wants it, else None.
    """
    from scalelong_fast.kernels.dgrad import dgrad, skip_rows

    if not plan.endswith("_cublas"):
        tma = plan == "tma"
        return *dgrad(grad, skip, kappa, weight, kappa_grad=kappa_grad, scale=scale, tma=tma), None
    batch, tokens, d_s = skip.shape
    d_x = weight.shape[1] - d_s
    rows = grad.reshape(batch * tokens, weight.shape[0])
    grad_x = torch.mm(rows, weight[:, :d_x]).view(batch, tokens, d_x)
    grad_skip = torch.mm(rows, weight[:, d_x:]).view(batch, tokens, d_s)
    # The pass that reads skip for dκ writes κ ⊙ skip at the cost of the write alone.
    scaled, partial = skip_rows(grad_skip, skip, kappa, grad_skip=scale, scaled_skip=weight_grad, kappa_grad=kappa_grad)
    return grad_x, grad_skip, partial, scaled


def product_weight_grad(
    plan: str, grad: Tensor, x: Tensor, skip: Tensor, kappa: Tensor, scaled_skip: Tensor | None
) -> Tensor:
    """Gradient of a fused plan at its weight; ``scaled_skip`` as :func:`product_input_grad` returned it."""
    from scalelong_fast.kernels.wgrad import wgrad

    if scaled_skip is None:
        return wgrad(grad, x, skip, kappa)
    d_x, d_s, d_out = x.shape[2], skip.shape[2], grad.shape[2]
    rows = grad.reshape(-1, d_out).t()
    out = torch.empty(d_out, d_x + d_s, dtype=grad.dtype, device=grad.device)
    torch.mm(rows, x.reshape(-1, d_x), out=out[:, :d_x])
    torch.mm(rows, scaled_skip.reshape(-1, d_s), out=out[:, d_x:])
    return out


def bias_grad(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the bias, accumulated in float32."""
    return grad.sum((0, 1), dtype=torch.float32).to(dtype)


@torch.library.custom_op("scalelong_fast::scale_concat_linear", mutates_args=())
def _forward(x: Tensor, skip: Tensor, kappa: Tensor | None, weight: Tensor, bias: Tensor | None, plan: str) -> Tensor:
    """The product; κ is (B, L) with any strides, None for a long skip that is not scaled."""
    return product_forward(plan, x, skip, _or_one(kappa, skip), weight, bias)


def _or_one(kappa: Tensor | None, skip: Tensor) -> Tensor:
    return expand_kappa(1.0, batch=skip.shape[0], count=skip.shape[1], device=skip.device) if kappa is None else kappa


@_forward.register_fake
def _(x: Tensor, skip: Tensor, kappa: Tensor | None, weight: Tensor, bias: Tensor | None, plan: str):
    return torch.empty(x.shape[0], x.shape[1], weight.shape[0], dtype=x.dtype, device=x.device)


@torch.library.custom_op("scalelong_fast::scale_concat_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    skip: Tensor,
    kappa: Tensor | None,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    kappa_grad: bool,
    weight_grad: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, skip, κ (B, L), weight and bias; the last three are empty where not wanted."""
    scale = kappa is not None
    kappa = _or_one(kappa, skip)
    wants_scaled = weight_grad and scale
    # A backward may run under autocast, which would change the dtypes of the products in it.
    with no_autocast(grad.device.type):
        grad_x, grad_skip, partial, scaled = product_input_grad(
            plan, grad, skip, kappa, weight, scale=scale, kappa_grad=kappa_grad, weight_grad=wants_scaled
        )
        if plan.endswith("_cublas") and weight_grad and not scale:
            scaled = skip  # κ ⊙ s is s itself: no pass over it
        return (
            grad_x,
            grad_skip,
            grad.new_empty(0) if partial is None else partial.sum(0).to(kappa.dtype),
            product_weight_grad(plan, grad, x, skip, kappa, scaled) if weight_grad else grad.new_empty(0),
            grad.new_empty(0) if bias_dtype is None else bias_grad(grad, bias_dtype),
        )


@_backward.register_fake
def _(grad, x, skip, kappa, weight, bias_dtype, kappa_grad, weight_grad, plan):
    def like(tensor: Tensor, wanted: bool = True) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=grad.device) if wanted else grad.new_empty(0)

    bias = grad.new_empty(weight.shape[0], dtype=bias_dtype) if bias_dtype is not None else grad.new_empty(0)
    return like(x), like(skip), like(kappa, kappa_grad), like(weight, weight_grad), bias


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, skip, kappa, weight, bias, ctx.plan = inputs
    ctx.save_for_backward(x, skip, kappa, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(ctx: Any, grad: Tensor) -> tuple:
    _, _, kappa_grad, weight_grad, bias_wanted = ctx.needs_input_grad[:5]
    bias_dtype = ctx.bias_dtype if bias_wanted else None
    grads = call(_backward, grad, *ctx.saved_tensors, bias_dtype, kappa_grad, weight_grad, ctx.plan)
    wanted = (True, True, kappa_grad, weight_grad, bias_dtype is not None)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None


_run = differentiable("scale_concat_linear", _forward, _backward, _setup, _gradient)


def product_plans() -> list[Plan]:
    """The plans of the ops that end in this product."""
    return [
        Plan("tma", "dual product by tensor descriptors, forward and dgrad; Triton wgrad", tma_obstacle),
        Plan("pointer", "dual product by pointers, forward and dgrad; Triton wgrad", pointer_obstacle),
        Plan("tma_cublas", "dual product by tensor descriptors; backward by cuBLAS and one pass", tma_obstacle),
        Plan("pointer_cublas", "dual product by pointers; backward by cuBLAS and one pass", pointer_obstacle),
        Plan("concat_gemm", "fused scale and concat, then PyTorch's Linear"),
        Plan("two_gemm", "two products in PyTorch, the skip's scaled by κ"),
        Plan("eager", "PyTorch"),
    ]


register_plans("scale_concat_linear", product_plans(), _problem)


def product_flops(rows: int, weight: tuple[int, ...] | torch.Size) -> int:
    """FLOP of the forward's product."""
    return 2 * rows * weight[0] * weight[1]


@register_flop_formula(torch.ops.scalelong_fast.scale_concat_linear)
def _(x, skip, kappa, weight, *args, out_shape=None, **kwargs) -> int:
    return product_flops(x[0] * x[1], weight)


@register_flop_formula(torch.ops.scalelong_fast.scale_concat_linear_backward)
def _(grad, x, skip, kappa, weight, bias_dtype, kappa_grad, weight_grad, *args, out_shape=None, **kwargs) -> int:
    return (2 if weight_grad else 1) * product_flops(x[0] * x[1], weight)

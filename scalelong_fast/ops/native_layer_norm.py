"""LayerNorm by PyTorch's own CPU kernel, with the row mean that kernel computes anyway put to use.

``torch.native_layer_norm`` returns the mean, but as a constant: a gradient that arrives there is lost. Here forward and
backward are called one by one, so that the mean's gradient can be added.
"""

import torch
from torch import Tensor

from scalelong_fast.ops.problem import Problem


def native_obstacle(problem: Problem) -> str | None:
    """Why this path cannot serve a problem, or None."""
    if problem.arch != "cpu":
        return f"it calls PyTorch's CPU kernel, and the tensors are on {problem.arch}"
    return None


def native_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the rows of x ``(..., D)``.

    Returns:
        LN(x) in ``out_dtype``; mean and 1/σ of the rows ``(...)``, float32 (float64 for float64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    # With 16-bit parameters too, the kernel would round the statistics to 16 bits.
    weight, bias = weight.to(wide), bias.to(wide)
    value = x.to(torch.promote_types(x.dtype, out_dtype))
    out, mean, rstd = torch.native_layer_norm(value, (x.shape[-1],), weight, bias, eps)
    return out.to(out_dtype), mean.squeeze(-1), rstd.squeeze(-1)


def native_backward(
    grad_out: Tensor,
    grad_mean: Tensor | None,
    grad_total: Tensor | None,
    grad_skip: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normalised, of weight and of bias; arguments as in the Triton kernel's launch."""
    wide = torch.promote_types(total.dtype, torch.float32)
    width = total.shape[-1]
    # Raised to float32 first: on bf16 rows the kernel sums the parameters' gradients in bf16, 10 % off at 8000 rows.
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_out.to(wide), total.to(wide), (width,), mean.unsqueeze(-1), rstd.unsqueeze(-1),
        weight.to(wide), bias.to(wide), [True, True, True],
    )  # fmt: skip
    if grad_mean is not None:
        grad = grad.add_((grad_mean / width).unsqueeze(-1))
    for other in (grad_total, grad_skip):
        if other is not None:
            grad = grad.add_(other)
    return grad.to(total.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)

"""bf16 Linear layers for CPUs, in pieces that suit oneDNN.

oneDNN's bf16 product of many rows with a small matrix is slow on the shapes of a U-ViT, most so where the weight comes
transposed, as a Linear hands it over. The same product by pieces of some 1000 rows, with the weight laid out the other
way round first (it is small), is half as fast again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalelong_fast.ops.problem import on_cpu
from scalelong_fast.plain import is_plain

#: Rows multiplied at a time.
CHUNK_ROWS = 1024
#: Rows from which pieces pay.
LEAST_ROWS = 6 * CHUNK_ROWS


def _pieces(rows: int) -> Iterator[slice]:
    """Equal slices of about CHUNK_ROWS rows."""
    count = max(1, round(rows / CHUNK_ROWS))
    size = -(-rows // count)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size)) if rows else iter(())


def _multiply(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix`` piece by piece."""
    out = torch.empty(rows.shape[0], matrix.shape[1], dtype=rows.dtype, device=rows.device)
    with torch.autocast("cpu", enabled=False):
        for piece in _pieces(rows.shape[0]):
            torch.mm(rows[piece], matrix, out=out[piece])
    return out


@torch.library.custom_op("scalelong_fast::cpu_linear", mutates_args=())
def cpu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · Wᵀ.

    Args:
        x: ``(..., K)``, on a CPU; any floating dtype, made for bf16.
        weight: ``(N, K)`` of the same dtype.

    Returns:
        ``(..., N)``. Differentiable once.
    """
    out = _multiply(x.reshape(-1, x.shape[-1]), weight.t().contiguous())
    return out.view(*x.shape[:-1], weight.shape[0])


@cpu_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)


@torch.library.custom_op("scalelong_fast::cpu_linear_backward", mutates_args=())
def cpu_linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`cpu_linear` with respect to x and weight, given that of its output ``(..., N)``."""
    grad, rows = grad.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
    grad_x = _multiply(grad, weight.contiguous()).view(x.shape)
    with torch.autocast("cpu", enabled=False):
        # The wider factor on the right: the product transposed costs nothing to turn round.
        if weight.shape[0] >= weight.shape[1]:
            return grad_x, torch.mm(rows.t(), grad).t().contiguous()
        return grad_x, torch.mm(grad.t(), rows)


@cpu_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    return like(x), like(weight)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    return cpu_linear_backward(grad, *ctx.saved_tensors)


cpu_linear.register_autograd(_backward, setup_context=_setup)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, by :func:`cpu_linear` where many rows of bf16 are multiplied on a CPU.

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``.
        bias: ``(N,)`` or None.

    Returns:
        ``(..., N)`` in the dtype that ``F.linear`` gives it.
    """
    autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    few = x.shape[:-1].numel() < LEAST_ROWS
    if few or not on_cpu(x) or dtype != torch.bfloat16 or (not autocast and weight.dtype != dtype):
        return F.linear(x, weight, bias)
    out = cpu_linear(x.to(dtype), weight.to(dtype))
    return out if bias is None else out + bias.to(dtype)


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``, by :func:`linear` on a CPU where nobody listens in on the layer.

    Args:
        layer: K to N.
        x: ``(..., K)``.

    Returns:
        ``(..., N)`` in the dtype that ``layer(x)`` has.
    """
    if x.device.type != "cpu" or not is_plain(layer, nn.Linear):
        return layer(x)
    return linear(x, layer.weight, layer.bias)

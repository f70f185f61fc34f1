"""``se_gate``: the calibration gate of learnable scaling LS, from pooled skip to κ (ScaleLong Eq. 10 and 11)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from scalelong_fast.errors import invalid
from scalelong_fast.ops.autocast import no_autocast
from scalelong_fast.ops.checks import check_activation, check_gate, check_tensor, shape_of
from scalelong_fast.ops.differentiable import call, differentiable, once_differentiable
from scalelong_fast.ops.plans import Plan, register_plans, resolve
from scalelong_fast.ops.problem import Problem, architecture, triton_obstacle

_ACTIVATIONS = {"relu": F.relu, "elu": F.elu, "mish": F.mish}


def se_gate(
    pooled: Tensor, w_down: Tensor, b_down: Tensor, w_up: Tensor, b_up: Tensor, activation: str = "relu"
) -> Tensor:
    """κ = σ(W_up ψ(W_down · pooled + b_down) + b_up), the SE gate of ScaleLong Eq. 10 and 11.

    Args:
        pooled: GAP of the long skip ``(B, N)``, floating; N channels (UNet) or tokens (U-ViT).
        w_down, b_down: ``(H, N)`` and ``(H,)``, H = max(1, N // r); float32 or the dtype of ``pooled``.
        w_up, b_up: ``(N, H)`` and ``(N,)``.
        activation: ψ, one of ``relu``, ``elu``, ``mish``.

    Returns:
        κ ``(B, N)`` in (0, 1), float32 (float64 for a float64 ``pooled``), also under autocast. Differentiable once in
        every tensor.

    Raises:
        UserError: wrong shapes, dtypes, devices or activation.
        NotImplementedError: a forced plan that cannot serve the call; a double backward.
    """
    args = (pooled, w_down, b_down, w_up, b_up, activation)
    _, plan = resolve("se_gate", *args)
    if plan == "eager":
        return once_differentiable("se_gate", args, (se_gate_reference(*args),))[0]
    return _run(*args, plan)[0]


def se_gate_reference(
    pooled: Tensor, w_down: Tensor, b_down: Tensor, w_up: Tensor, b_up: Tensor, activation: str = "relu"
) -> Tensor:
    """The definition of :func:`se_gate` in PyTorch; arguments as there, unchecked."""
    dtype = torch.promote_types(pooled.dtype, torch.float32)
    with no_autocast(pooled.device.type):
        hidden = F.linear(pooled.to(dtype), w_down.to(dtype), b_down.to(dtype))
        return torch.sigmoid(F.linear(_ACTIVATIONS[activation](hidden), w_up.to(dtype), b_up.to(dtype)))


def _problem(
    pooled: Tensor, w_down: Tensor, b_down: Tensor, w_up: Tensor, b_up: Tensor, activation: str = "relu"
) -> Problem:
    check_tensor("pooled", pooled)
    if pooled.dim() != 2 or pooled.shape[1] < 1:
        raise invalid("pooled", shape_of(pooled), "shape (B, N): one value per sample and channel or token")
    width = pooled.shape[1]
    check_gate(w_down, b_down, w_up, b_up, width=width, dtype=pooled.dtype, device=pooled.device)
    check_activation(activation)
    return Problem(
        "se_gate",
        architecture(pooled.device),
        pooled.dtype,
        rows=pooled.shape[0],
        widths=(width,),
        batch=pooled.shape[0],
        hidden=w_down.shape[0],
    )


def gate_obstacle(problem: Problem) -> str | None:
    """Why the gate's kernel cannot serve a problem, or None."""
    if problem.hidden > 1024:
        return f"a hidden width of {problem.hidden} does not fit a program's registers (1024 at most)"
    return triton_obstacle(problem)


@torch.library.custom_op("scalelong_fast::se_gate", mutates_args=())
def _forward(
    pooled: Tensor, w_down: Tensor, b_down: Tensor, w_up: Tensor, b_up: Tensor, activation: str, plan: str
) -> tuple[Tensor, Tensor]:
    """κ (B, N) and the pre-activation z (B, H), fp32."""
    from scalelong_fast.kernels.se import se_forward

    return se_forward(pooled, w_down, b_down, w_up, b_up, activation)


@_forward.register_fake
def _(pooled: Tensor, w_down: Tensor, b_down: Tensor, w_up: Tensor, b_up: Tensor, activation: str, plan: str):
    kappa = torch.empty(pooled.shape, dtype=torch.float32, device=pooled.device)
    return kappa, kappa.new_empty(pooled.shape[0], w_down.shape[0])


@torch.library.custom_op("scalelong_fast::se_gate_backward", mutates_args=())
def _backward(
    grad: Tensor,
    kappa: Tensor,
    hidden: Tensor,
    pooled: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of pooled, w_down, b_down, w_up, b_up."""
    from scalelong_fast.kernels.se import se_backward, se_weight_grad

    logit, z, grad_pooled = se_backward(grad, kappa, hidden, w_down, w_up, activation)
    dtypes = (w_down.dtype, b_down.dtype, w_up.dtype, b_up.dtype)
    return grad_pooled.to(pooled.dtype), *se_weight_grad(pooled, hidden, logit, z, activation, dtypes)


@_backward.register_fake
def _(grad, kappa, hidden, pooled, w_down, b_down, w_up, b_up, activation):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (pooled, w_down, b_down, w_up, b_up))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor, _: None) -> tuple:
    return *call(_backward, grad, *ctx.saved_tensors, ctx.activation), None, None


_run = differentiable("se_gate", _forward, _backward, _setup, _gradient)

register_plans(
    "se_gate",
    [
        Plan("triton", "one kernel, one program per sample", gate_obstacle),
        Plan("eager", "PyTorch"),
    ],
    _problem,
)


def gate_flops(batch: int, width: int, hidden: int) -> int:
    """FLOP of the gate's two products."""
    return 4 * batch * width * hidden


@register_flop_formula(torch.ops.scalelong_fast.se_gate)
def _(pooled, w_down, *args, out_shape=None, **kwargs) -> int:
    return gate_flops(pooled[0], pooled[1], w_down[0])


@register_flop_formula(torch.ops.scalelong_fast.se_gate_backward)
def _(grad, kappa, hidden, *args, out_shape=None, **kwargs) -> int:
    return 2 * gate_flops(kappa[0], kappa[1], hidden[1])

"""A long skip connection on its way from encoder to decoder, and its fused merge into the residual stream."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scalelong_fast.ops import ls_skip_linear, scale_concat_linear
from scalelong_fast.scaling import LongSkipScaling
from scalelong_fast.scaling.gates import SEGate
from scalelong_fast.scaling.learnable import LearnableScaling


class LongSkip(NamedTuple):
    """What a decoder block needs of a long skip.

    Attributes:
        features: ``(B, L, D)``.
        pooled: GAP ``(B, L)`` float32 where the LayerNorm that follows the feature made it, else None.
        scaling: the network's coefficients.
        i: index of the skip, 1 (outermost) … N (innermost).
    """

    features: Tensor
    pooled: Tensor | None
    scaling: LongSkipScaling
    i: int


class Stream(NamedTuple):
    """A residual stream whose last addition is still to be made: the next block does it together with its LayerNorm.

    Attributes:
        x: ``(B, L, D)``.
        branch: ``(B, L, D)``, to be added; None before the first block.
    """

    x: Tensor
    branch: Tensor | None = None

    def sum(self) -> Tensor:
        """The stream itself, in its own dtype."""
        return self.x if self.branch is None else self.x + self.branch.to(self.x.dtype)


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is of exactly this class, with the forward of its class, and nobody listens in."""
    if type(module) is not kind or module_globals._has_any_global_hook():
        return False
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not any(hooks) and "forward" not in module.__dict__


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` computes what ``kind`` computes and nobody listens in.

    False for subclasses (adapters, parametrisations, quantised layers), for modules with hooks and under global hooks:
    reading their weights directly would pass by what was added to them.
    """
    if not is_untouched(module, kind):
        return False
    # Weight normalisation of the old kind keeps the class and takes the parameter away; quantisation may keep the
    # class and wrap the parameter.
    weight = module._parameters.get("weight")
    return weight is not None and not is_traceable_wrapper_subclass(weight)


def is_plain_scaling(scaling: LongSkipScaling) -> bool:
    """Whether calling ``scaling`` is the same as multiplying by its κ_i: no hooks, no forward of its own."""
    hooked = scaling._forward_hooks or scaling._forward_pre_hooks or scaling._backward_hooks
    own_forward = type(scaling).forward is not LongSkipScaling.forward or "forward" in scaling.__dict__
    return not hooked and not scaling._backward_pre_hooks and not own_forward


def plain_gate(scaling: LongSkipScaling, i: int) -> SEGate | None:
    """The SE gate of long skip i where its weights may be read directly, else None."""
    kind = type(scaling)
    if not isinstance(scaling, LearnableScaling) or kind.coefficient is not LearnableScaling.coefficient:
        return None
    if kind.kappa is not LongSkipScaling.kappa:
        return None
    gate = scaling.gate_of(i)
    if type(gate) is not SEGate or gate._forward_hooks or gate._forward_pre_hooks or gate._backward_hooks:
        return None
    if gate._backward_pre_hooks or "forward" in gate.__dict__:
        return None
    return gate if is_plain(gate.down, nn.Linear) and is_plain(gate.up, nn.Linear) else None


def merge_long_skip(x: Tensor, skip: LongSkip, linear: nn.Linear) -> Tensor:
    """Linear(cat[x, κ_i ⊙ skip_i]) of a U-ViT's decoder block, without the concat (ScaleLong Eq. 8 and 9–11).

    Args:
        x: stream ``(B, L, D)``.
        skip: the long skip that meets it.
        linear: ``skip_linear``, 2D to D.

    Returns:
        ``(B, L, D)`` in the dtype of the product, as Linear gives it.
    """
    if not is_plain(linear, nn.Linear) or not is_plain_scaling(skip.scaling):
        # Somebody added to the layer or the scaling: they see the tensors they would have seen.
        return linear(torch.cat([x, skip.scaling(skip.features, skip.i, skip.pooled).to(x.dtype)], dim=-1))
    gate = plain_gate(skip.scaling, skip.i)
    if gate is not None:
        y, kappa = ls_skip_linear(
            x,
            skip.features,
            gate.down.weight,
            gate.down.bias,
            gate.up.weight,
            gate.up.bias,
            linear.weight,
            linear.bias,
            pooled=skip.pooled,
            activation=gate.activation,
        )
        skip.scaling.record(skip.i, kappa)
        return y
    kappa = skip.scaling.kappa(skip.i, skip.features, skip.pooled)
    weight = linear.weight
    if isinstance(kappa, float):
        if kappa != 1.0:
            # A constant belongs into the weight, D² numbers instead of B·L·D. It is folded anew each time: a copy kept
            # across steps, EMA swaps or loading would go stale.
            width = x.shape[-1]
            weight = torch.cat([weight[:, :width], weight[:, width:] * kappa], dim=1)
        kappa = 1.0
    return scale_concat_linear(x, skip.features, kappa, weight, linear.bias)

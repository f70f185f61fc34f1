"""Stateless layers for the Hub's kernel loader, which gives their forward to modules of a network that exists.

Annotations say what such a module must have. None has a constructor, members or other methods of its own: the loader
refuses layers that do.
"""

from torch import Tensor, nn

from scalelong_fast.ops import ls_scale_concat, scale_concat, scale_concat_group_norm, scale_concat_linear


class ScaleConcat(nn.Module):
    """cat[x, κ ⊙ skip] over dim 1 of ``(B, C, *spatial)`` (ScaleLong Eq. 4).

    ``kappa`` is a number or a tensor: 0-dim, ``(C_skip,)`` or ``(B, C_skip)``.
    """

    has_backward = True
    can_torch_compile = True
    kappa: float | Tensor

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return scale_concat(x, skip, self.kappa)


class LSScaleConcat(nn.Module):
    """cat[x, κ ⊙ skip] with κ = σ(W_up ReLU(W_down · GAP(skip))) (ScaleLong Eq. 9-11).

    ``down`` and ``up`` are Linears with biases from and to as many features as the skip has channels.
    """

    has_backward = True
    can_torch_compile = True
    down: nn.Linear
    up: nn.Linear

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        down, up = self.down, self.up
        return ls_scale_concat(x, skip, down.weight, down.bias, up.weight, up.bias)[0]


class ScaleConcatLinear(nn.Module):
    """Linear(cat[x, κ ⊙ skip]) of tokens ``(B, L, D)``, without the concat; ``weight`` is ``(D_out, D_x + D_skip)``."""

    has_backward = True
    can_torch_compile = True
    kappa: float | Tensor
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return scale_concat_linear(x, skip, self.kappa, self.weight, self.bias)


class ScaleConcatGroupNorm(nn.Module):
    """SiLU(GroupNorm(cat[x, κ ⊙ skip])) of ``(B, C, *spatial)``, without the concat."""

    has_backward = True
    can_torch_compile = True
    kappa: float | Tensor
    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return scale_concat_group_norm(x, skip, self.kappa, self.num_groups, self.weight, self.bias, self.eps)

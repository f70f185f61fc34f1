"""Scaling of the blocks' outputs instead of the long skips: the baselines of ScaleLong Table 3."""

import torch
from torch import Tensor, nn

from scalelong_fast.errors import check_range, unknown_name
from scalelong_fast.scaling.base import scale_skip


class StableTau(nn.Module):
    """x + τ f(x): every residual branch f multiplied by one constant (Zhang et al., *Stabilize Deep ResNet with a Sharp
    Scaling Factor τ*).

    Args:
        tau: τ > 0; the paper compares 0.1 and 0.3.
    """

    def __init__(self, tau: float = 0.1):
        super().__init__()
        check_range("block_tau", tau, low=0, low_open=True)
        self.tau = float(tau)

    def forward(self, branch: Tensor) -> Tensor:
        """τ ⊙ branch, with the shape and dtype of ``branch`` ``(B, ...)``."""
        return scale_skip(branch, self.tau)

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}"


class ReZero(nn.Module):
    """x + α f(x), α a trained scalar that starts at 0, so that a block starts as the identity (Bachlechner et al.,
    *ReZero is All You Need*). The norms stay where they are.

    ``alpha`` has shape (1,), not (): FSDP divides no tensor without a dimension.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, branch: Tensor) -> Tensor:
        """α ⊙ branch, with the shape and dtype of ``branch`` ``(B, ...)``."""
        return scale_skip(branch, self.alpha.reshape(()))


#: Names on the command line; ``none`` leaves the blocks as they are.
BLOCK_SCALINGS = ("none", "stable-tau", "rezero")


def resolve_block_scaling(name: str) -> str:
    """The canonical form of a block scaling's name; an unknown one raises with the nearest names."""
    key = name.lower().replace("_", "-") if isinstance(name, str) else None
    if key not in BLOCK_SCALINGS:
        raise unknown_name("block_scaling", name, BLOCK_SCALINGS)
    return key


def create_block_scaling(name: str, tau: float = 0.1) -> nn.Module | None:
    """What one block multiplies its residual branches by; None where it leaves them as they are.

    Args:
        name: ``none``, ``stable-tau`` or ``rezero``. An underscore is as good as a hyphen.
        tau: τ of ``stable-tau``; the others ignore it.

    Raises:
        UserError: unknown name, or τ ≤ 0.
    """
    key = resolve_block_scaling(name)
    if key == "none":
        return None
    return ReZero() if key == "rezero" else StableTau(tau)


def scale_branch(scaling: nn.Module | None, branch: Tensor) -> Tensor:
    """A residual branch as it is to be added: ``branch`` itself where ``scaling`` is None."""
    return branch if scaling is None else scaling(branch)

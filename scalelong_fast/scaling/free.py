"""Free coefficients: one trained scalar per long skip."""

import torch
from torch import Tensor, nn

from scalelong_fast.scaling.base import LongSkipScaling
from scalelong_fast.scaling.constant import check_kappa


class FreeScaling(LongSkipScaling):
    """κ_i is a parameter of its own, independent of the input (named ``learnable`` on the command line).

    Args:
        num_skips: N.
        kappa: value that every κ_i starts from; 1 by default.
    """

    def __init__(self, num_skips: int, kappa: float | None = None):
        super().__init__(num_skips)
        self.kappas = nn.Parameter(torch.full((num_skips,), 1.0 if kappa is None else check_kappa(kappa)))

    def coefficient(self, i: int, skip: Tensor, pooled: Tensor | None = None) -> Tensor:
        """κ_i, a 0-dim tensor; see :meth:`~scalelong_fast.scaling.LongSkipScaling.kappa` for the arguments."""
        return self.kappas[i - 1]

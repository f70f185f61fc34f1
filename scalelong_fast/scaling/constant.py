"""Constant coefficients: none, uniform, CS (Eq. 8) and its reversal (Table 4)."""

import math
import warnings

from torch import Tensor

from scalelong_fast.errors import check_range
from scalelong_fast.scaling.base import LongSkipScaling


def check_kappa(kappa: float) -> float:
    """Return κ as a float; refuse κ ≤ 0 and warn above 1, where training becomes unstable (ScaleLong Fig. 13)."""
    check_range("kappa", kappa, low=0, low_open=True)
    if kappa > 1:
        warnings.warn(
            f"kappa = {kappa:g} > 1 amplifies the long skips and makes training less stable (ScaleLong, Fig. 13); "
            "the paper's good values are 0.5 to 0.95.",
            stacklevel=3,
        )
    return float(kappa)


class ConstantScaling(LongSkipScaling):
    """Coefficients fixed at construction: no parameters, no buffers, plain Python floats.

    Args:
        num_skips: N.
        kappa: the base κ > 0; a value above 1 warns.
    """

    default_kappa: float = 0.7

    def __init__(self, num_skips: int, kappa: float | None = None):
        super().__init__(num_skips)
        self.base = self.default_kappa if kappa is None else check_kappa(kappa)
        self.kappas = tuple(self.value(i) for i in range(1, num_skips + 1))

    def value(self, i: int) -> float:
        """κ_i as a function of the index i = 1 … N and :attr:`base`."""
        raise NotImplementedError

    def coefficient(self, i: int, skip: Tensor, pooled: Tensor | None = None) -> float:
        """κ_i, a Python float; see :meth:`~scalelong_fast.scaling.LongSkipScaling.kappa` for the arguments."""
        return self.kappas[i - 1]

    def extra_repr(self) -> str:
        return f"num_skips={self.num_skips}, kappa={self.base:g}"


class UniformScaling(ConstantScaling):
    """κ_i = κ for every skip; 1/√2 by default, the choice of many diffusion UNets (ScaleLong §1)."""

    default_kappa = 1 / math.sqrt(2)

    def value(self, i: int) -> float:
        return self.base


class NoScaling(UniformScaling):
    """κ_i = 1: the plain long skip connection."""

    default_kappa = 1.0


class CS(ConstantScaling):
    """Constant scaling, κ_i = κ^(i−1) (ScaleLong Eq. 8): 1 for the outermost skip, smallest for the innermost."""

    def value(self, i: int) -> float:
        return self.base ** (i - 1)


class ReversedCS(ConstantScaling):
    """CS in the wrong direction, κ_i = κ^(N−i+1): the ablation of ScaleLong Table 4."""

    def value(self, i: int) -> float:
        return self.base ** (self.num_skips - i + 1)

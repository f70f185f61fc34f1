"""The interface that every set of long-skip coefficients implements."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scalelong_fast.errors import check_range, invalid

Kappa = float | Tensor


def scale_skip(skip: Tensor, kappa: Kappa) -> Tensor:
    """Multiply a long skip by its coefficient, κ ⊙ skip.

    Args:
        skip: feature ``(B, N, ...)``; N is channels in a UNet, tokens in a U-ViT.
        kappa: a float, a 0-dim tensor, ``(N,)`` or ``(B, N)``.

    Returns:
        Tensor of the shape and dtype of ``skip``; the product is taken in the wider of the two dtypes. A float of
        exactly 1 returns ``skip`` itself, so that κ = 1 is bit-exact and free.
    """
    if isinstance(kappa, float):
        return skip if kappa == 1.0 else skip * kappa
    # A 0-dim tensor takes no part in type promotion: given a dimension, κ and its gradient stay in float32.
    kappa = kappa.reshape(*kappa.shape, *(1,) * (skip.dim() - 2)) if kappa.dim() > 0 else kappa.reshape(1)
    return (skip * kappa).to(skip.dtype)


class LongSkipScaling(nn.Module):
    """Coefficients κ_i of the long skip connections i = 1 (outermost, next to the input) … N (innermost).

    A backbone asks either for :meth:`kappa` (to fold or fuse it into what follows) or calls the module, which returns
    κ_i ⊙ skip_i. Decoders consume skips last-in first-out, so their first block asks for i = N.

    A new kind of coefficient needs one subclass with :meth:`coefficient` and one line in
    :data:`scalelong_fast.scaling.SCALINGS`.

    Args:
        num_skips: N, the number of long skips of the network.
    """

    #: True where κ_i depends on the feature, i.e. where a backbone gains by handing over ``pooled``.
    uses_pooled = False

    def __init__(self, num_skips: int):
        super().__init__()
        check_range("num_skips", num_skips, low=1, integer=True)
        self.num_skips = num_skips
        self._recorded: dict[int, Tensor] | None = None

    def coefficient(self, i: int, skip: Tensor, pooled: Tensor | None = None) -> Kappa:
        """Compute κ_i; see :meth:`kappa` for the arguments."""
        raise NotImplementedError

    def kappa(self, i: int, skip: Tensor, pooled: Tensor | None = None) -> Kappa:
        """κ_i of long skip i.

        Args:
            i: index of the skip, 1 (outermost) … N (innermost).
            skip: the feature ``(B, N_i, ...)``.
            pooled: GAP of ``skip``, ``(B, N_i)``, where a producer has it already; else it is computed if needed.

        Returns:
            float for constants, 0-dim tensor for free coefficients, ``(B, N_i)`` float32 for gates.
        """
        if not 1 <= i <= self.num_skips:
            raise invalid("i", i, f"the index of a long skip, 1 (outermost) to {self.num_skips} (innermost)")
        kappa = self.coefficient(i, skip, pooled)
        self.record(i, kappa)
        return kappa

    def record(self, i: int, kappa: Kappa) -> None:
        """Note κ_i, for :meth:`recording`; a backbone that computes κ_i in a fused op hands it in here."""
        if self._recorded is not None:
            self._recorded[i] = kappa.detach().clone() if isinstance(kappa, Tensor) else torch.tensor(kappa)

    def forward(self, skip: Tensor, i: int, pooled: Tensor | None = None) -> Tensor:
        """κ_i ⊙ skip, with the shape and dtype of ``skip``."""
        return scale_skip(skip, self.kappa(i, skip, pooled))

    @contextmanager
    def recording(self) -> Iterator[dict[int, Tensor]]:
        """Collect the κ's of every forward inside the block (ScaleLong Fig. 7).

        Yields:
            A dict that maps i to the κ_i of the last forward: 0-dim for constants, ``(B, N_i)`` for gates. Outside
            the block nothing is stored, so the ordinary path pays one test of a Python attribute.
        """
        before = self._recorded
        self._recorded = {}
        try:
            yield self._recorded
        finally:
            self._recorded = before

"""The network that the paper's theorems are about (ScaleLong Eq. 3), with blocks made of square matrices and ReLU."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from scalelong_fast.errors import check_range, unknown_name

INITS = ("paper", "norm-keeping")


class MatrixUNet(nn.Module):
    """f_{i−1}(x) = b_i ∘ [κ_i · a_i ∘ x + f_i(a_i ∘ x)] for i = 1 … N, f_N a block of its own (ScaleLong Eq. 3).

    A block is W_l ReLU(… ReLU(W_1 x)) with l matrices of size m × m; l = 1 makes the network linear. Several
    independent networks are evaluated at once, as ``trials``.

    Args:
        kappas: κ_1 … κ_N, outermost first.
        width: m.
        block_depth: l.
        init: ``paper``: every entry N(0, 2/m). ReLU halves the squared norm, so that a layer before one keeps it; the
            last matrix of a block has no ReLU after it and doubles it: a_i and b_i each have a gain of 2, b_i ∘ a_i
            of 4.
            ``norm-keeping``: that last matrix is N(0, 1/m), so that every block keeps the squared norm on average.
        trials: T, independent networks.
        generator: source of the weights.
        dtype: of the weights.

    Attributes:
        weights: ``(T, 2N + 1, l, m, m)``: a_1 … a_N, f_N, b_1 … b_N.
    """

    def __init__(
        self,
        kappas: Sequence[float],
        width: int,
        block_depth: int = 2,
        init: Literal["paper", "norm-keeping"] = "paper",
        *,
        trials: int = 1,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__()
        check_range("kappas", len(kappas), low=1, integer=True)
        for name, value in (("width", width), ("block_depth", block_depth), ("trials", trials)):
            check_range(name, value, low=1, integer=True)
        if init not in INITS:
            raise unknown_name("init", init, INITS)
        self.kappas, self.width, self.block_depth, self.init = tuple(map(float, kappas)), width, block_depth, init
        shape = (trials, 2 * len(kappas) + 1, block_depth, width, width)
        weights = torch.randn(shape, generator=generator, dtype=dtype) * (2 / width) ** 0.5
        if init == "norm-keeping":
            weights[:, :, -1] *= 0.5**0.5
        self.weights = nn.Parameter(weights)

    @property
    def num_skips(self) -> int:
        """N."""
        return len(self.kappas)

    def encoder(self, i: int) -> Tensor:
        """Matrices of a_i, i = 1 … N: ``(T, l, m, m)``."""
        return self.weights[:, i - 1]

    def decoder(self, i: int) -> Tensor:
        """Matrices of b_i, i = 1 … N: ``(T, l, m, m)``."""
        return self.weights[:, self.num_skips + i]

    @property
    def middle(self) -> Tensor:
        """Matrices of f_N: ``(T, l, m, m)``."""
        return self.weights[:, self.num_skips]

    def features(self, x: Tensor) -> list[Tensor]:
        """h_0 … h_N, the outputs of f_0 … f_N inside the network, each ``(T, B, m)``; h_0 is the network's own.

        Args:
            x: ``(T, B, m)``.
        """
        # One unbind: the gradient of as many selections would be as many tensors of the size of all weights.
        blocks, skips = self.weights.unbind(1), []
        for encoder in blocks[: self.num_skips]:
            x = apply_block(encoder, x)
            skips.append(x)
        h = [apply_block(blocks[self.num_skips], x)]
        for i in range(self.num_skips, 0, -1):
            h.append(apply_block(blocks[self.num_skips + i], self.kappas[i - 1] * skips[i - 1] + h[-1]))
        return h[::-1]

    def forward(self, x: Tensor) -> Tensor:
        """``(T, B, m)`` to ``(T, B, m)``."""
        return self.features(x)[0]

    def extra_repr(self) -> str:
        return f"N={self.num_skips}, m={self.width}, block_depth={self.block_depth}, init={self.init}"


def apply_block(matrices: Tensor, x: Tensor) -> Tensor:
    """W_l ReLU(… ReLU(W_1 x)) of ``matrices`` ``(T, l, m, m)`` and ``x`` ``(T, B, m)``."""
    for number, matrix in enumerate(matrices.unbind(1)):
        x = (torch.relu(x) if number else x) @ matrix.mT
    return x


def expected_squared_norms(kappas: Sequence[float], block_gain: float) -> list[float]:
    """E‖h_i‖² / ‖x‖² of h_0 … h_N, exactly, where each block multiplies the squared norm by ``block_gain`` = g.

    The last matrix of each block is independent of what it meets and has mean 0, so that the squared norms of the two
    summands add: E‖h_{i−1}‖² = g (κ_i² g^i ‖x‖² + E‖h_i‖²) and E‖h_N‖² = g^{N+1} ‖x‖². With g = 1 that is
    ‖x‖² (1 + Σ_{j>i} κ_j²), the form of Theorem 3.1; with the paper's g = 2 each κ_j² has a weight of 4^j of its own.
    """
    count = len(kappas)
    norms = [block_gain ** (count + 1)]
    for i in range(count, 0, -1):
        norms.append(block_gain * (kappas[i - 1] ** 2 * block_gain**i + norms[-1]))
    return norms[::-1]

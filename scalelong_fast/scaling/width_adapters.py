"""What lets skips of different widths share one gate (ScaleLong Eq. 12–13)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalelong_fast.errors import check_range, unknown_name
from scalelong_fast.scaling.gates import ACTIVATIONS, IDENTITY_LOGIT, two_linear


class WidthAdapter(nn.Module):
    """W_up ψ(W_down · pooled): the encoder E_i or the decoder D_i around a shared gate.

    ``down`` and ``up`` are linear layers with bias, as in the gate, initialised as ``nn.Linear`` is.

    Args:
        width: number of values that come in.
        out_width: number of values that go out.
        hidden: r_i, the width in the middle.
        activation: ψ, one of ``relu``, ``elu``, ``mish``.
    """

    def __init__(self, width: int, out_width: int, hidden: int, activation: str = "relu"):
        super().__init__()
        for argument, value in (("width", width), ("width", out_width), ("hidden", hidden)):
            check_range(argument, value, low=1, integer=True)
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, out_width)

    def forward(self, pooled: Tensor) -> Tensor:
        """``(B, width)`` to ``(B, out_width)``, float32 (float64 for a float64 input) even under autocast."""
        return two_linear(pooled, self.down, self.activation, self.up)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def encoder_of(width: int, shared: int, reduction: int, activation: str) -> WidthAdapter:
    """E_i: from N_i = ``width`` to N_min = ``shared``, with r_i = max(1, ⌊N_i / reduction⌋) in the middle."""
    return WidthAdapter(width, shared, max(1, width // reduction), activation)


def decoder_of(width: int, shared: int, reduction: int, activation: str, init: str = "paper") -> WidthAdapter:
    """D_i: from N_min back to N_i. ``identity`` makes σ(D_i) = 0.9975 whatever comes in, with a slope that learns."""
    decoder = WidthAdapter(shared, width, max(1, width // reduction), activation)
    if init == "identity":
        nn.init.zeros_(decoder.up.weight)
        nn.init.constant_(decoder.up.bias, IDENTITY_LOGIT)
    return decoder


class AdaptedGate(NamedTuple):
    """κ_i = σ(D_i(SE(E_i(pooled)))) of one long skip: a view on modules that their owner holds.

    Attributes:
        encoder: E_i, ``(B, N_i)`` to ``(B, N_min)``.
        shared: the gate SE without its σ, ``(B, N_min)`` to ``(B, N_min)``.
        decoder: D_i, ``(B, N_min)`` to ``(B, N_i)``.
    """

    encoder: nn.Module
    shared: Callable[[Tensor], Tensor]
    decoder: nn.Module

    def __call__(self, pooled: Tensor) -> Tensor:
        """κ_i ``(B, N_i)`` in (0, 1), float32 (float64 for a float64 input) even under autocast."""
        return torch.sigmoid(self.decoder(self.shared(self.encoder(pooled))))

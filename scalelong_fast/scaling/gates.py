"""Calibration gates: small networks that turn the pooled skip into a coefficient per channel or token."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalelong_fast.errors import check_range, unknown_name
from scalelong_fast.plain import is_plain

ACTIVATIONS = {"relu": F.relu, "elu": F.elu, "mish": F.mish}
INITS = ("paper", "identity")

# σ(6) = 0.9975: close enough to 1 to leave a trained network undisturbed, with a slope that still learns.
IDENTITY_LOGIT = 6.0

# β at the start, in the published code of instance enhancement.
IE_LOGIT = -1.0


def global_average_pool(skip: Tensor) -> Tensor:
    """GAP over every dimension but batch and dim 1 (ScaleLong Eq. 9).

    Args:
        skip: ``(B, N, ...)``, any floating dtype.

    Returns:
        ``(B, N)`` float32 (float64 for a float64 input).
    """
    if skip.dim() == 2:  # an empty list of dimensions would mean all of them
        return skip.to(torch.promote_types(skip.dtype, torch.float32))
    return skip.mean(dim=tuple(range(2, skip.dim())), dtype=torch.promote_types(skip.dtype, torch.float32))


def _check_options(width: int, reduction: int, activation: str, init: str) -> None:
    check_range("width", width, low=1, integer=True)
    check_range("reduction", reduction, low=1, integer=True)
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    if init not in INITS:
        raise unknown_name("init", init, INITS)


class SEGate(nn.Module):
    """κ = σ(W_up ψ(W_down · pooled)), the squeeze-and-excitation gate of ScaleLong Eq. 9–11.

    ``down`` and ``up`` are linear layers with bias, as in the authors' released code (there ``layer1``, ``layer2``).

    Args:
        width: N, the number of channels (UNet) or tokens (U-ViT) that are gated.
        reduction: r; the hidden width is ⌊N / r⌋ and never less than 1.
        activation: ψ, one of ``relu``, ``elu``, ``mish``.
        init: ``paper`` keeps the authors' initialisation (that of ``nn.Linear``, κ around 0.5); ``identity`` starts at
            κ = 0.9975 for every input, for networks that are already trained.
    """

    def __init__(self, width: int, reduction: int = 16, activation: str = "relu", init: str = "paper"):
        super().__init__()
        _check_options(width, reduction, activation, init)
        self.width, self.reduction, self.activation, self.init = width, reduction, activation, init
        hidden = max(1, width // reduction)
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``init`` says."""
        self.down.reset_parameters()
        self.up.reset_parameters()
        if self.init == "identity":
            nn.init.zeros_(self.up.weight)
            nn.init.constant_(self.up.bias, IDENTITY_LOGIT)

    def forward(self, pooled: Tensor, logits: bool = False) -> Tensor:
        """Gate of the pooled skip.

        Args:
            pooled: ``(B, N)``.
            logits: leave the last σ out.

        Returns:
            κ ``(B, N)`` in (0, 1), float32 (float64 for a float64 input) even under autocast: the product is tiny
            and a κ of 8 bits would cost accuracy for nothing.
        """
        out = two_linear(pooled, self.down, self.activation, self.up)
        return out if logits else torch.sigmoid(out)

    def logits(self, pooled: Tensor) -> Tensor:
        """What σ makes κ of; skips of different widths share the gate up to here (ScaleLong Eq. 12–13)."""
        return self(pooled, logits=True)  # a call, so that hooks and adapters of the gate run

    def extra_repr(self) -> str:
        return f"width={self.width}, reduction={self.reduction}, activation={self.activation}, init={self.init}"


class IEGate(nn.Module):
    """κ = σ(γ ⊙ pooled + β), the gate of instance enhancement (Liang et al., 2020).

    Every channel or token is gated by its own mean alone, with 2N parameters. γ is ``weight``, β is ``bias``.

    Args:
        width: N, the number of channels (UNet) or tokens (U-ViT) that are gated.
        reduction, activation: of the SE gate, without a meaning here; checked all the same.
        init: ``paper`` is that of the published code, γ = 0 and β = −1 (κ = 0.27 for every input); ``identity`` starts
            at κ = 0.9975.
    """

    def __init__(self, width: int, reduction: int = 16, activation: str = "relu", init: str = "paper"):
        super().__init__()
        _check_options(width, reduction, activation, init)
        self.width, self.init = width, init
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``init`` says."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, IDENTITY_LOGIT if self.init == "identity" else IE_LOGIT)

    def forward(self, pooled: Tensor, logits: bool = False) -> Tensor:
        """Gate of the pooled skip; arguments and result as :meth:`SEGate.forward`."""
        dtype = torch.promote_types(pooled.dtype, torch.float32)
        out = torch.addcmul(self.bias.to(dtype), self.weight.to(dtype), pooled.to(dtype))
        return out if logits else torch.sigmoid(out)

    def logits(self, pooled: Tensor) -> Tensor:
        """What σ makes κ of, as :meth:`SEGate.logits`."""
        return self(pooled, logits=True)

    def extra_repr(self) -> str:
        return f"width={self.width}, init={self.init}"


def two_linear(x: Tensor, down: nn.Linear, activation: str, up: nn.Linear) -> Tensor:
    """W_up ψ(W_down · x) with both biases, in float32 (float64 for a float64 x) whatever autocast says.

    A layer that somebody added to (hooks, adapters, parametrisations) is called, in the dtype of its weight.
    """
    device = x.device.type
    # The meta device knows no autocast.
    exact = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with exact:
        hidden = _linear(x.to(torch.promote_types(x.dtype, torch.float32)), down)
        return _linear(ACTIVATIONS[activation](hidden), up)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    if is_plain(layer, nn.Linear):
        return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
    weight = getattr(layer, "weight", x)
    return layer(x.to(weight.dtype) if weight.is_floating_point() else x).to(x.dtype)


#: Gates by name; another calibration module is one entry here. One with a method ``logits``, the gate without its σ,
#: has that used where skips of different widths share it; any other is called as it is.
CALIBRATIONS: dict[str, type[nn.Module]] = {"se": SEGate, "ie": IEGate}


def check_calibration(name: str) -> str:
    """Return the name of a gate; an unknown one raises with the nearest names."""
    if name not in CALIBRATIONS:
        raise unknown_name("calibration", name, CALIBRATIONS)
    return name

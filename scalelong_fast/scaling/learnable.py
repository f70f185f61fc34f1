"""Learnable scaling LS (ScaleLong Eq. 9–13): κ_i computed from the skip by a calibration gate."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from scalelong_fast.errors import check_range, invalid
from scalelong_fast.scaling.base import LongSkipScaling
from scalelong_fast.scaling.gates import CALIBRATIONS, check_calibration, global_average_pool
from scalelong_fast.scaling.width_adapters import AdaptedGate, decoder_of, encoder_of


class LearnableScaling(LongSkipScaling):
    """κ_i = gate_i(GAP(skip_i)); subclasses say which gate serves which skip.

    Args:
        num_skips: N.
        widths: number of channels (UNet) or tokens (U-ViT) of the skips: one number, or one per skip, outermost first.
        calibration: name in :data:`~scalelong_fast.scaling.gates.CALIBRATIONS`.
        adapter_reduction: of the adapters that let skips of different widths share a gate
            (:class:`~scalelong_fast.scaling.SharedLS`); without a meaning elsewhere.
        **options: options of the gate: ``reduction``, ``activation``, ``init``.
    """

    uses_pooled = True

    def __init__(
        self,
        num_skips: int,
        widths: int | Sequence[int],
        calibration: str = "se",
        *,
        adapter_reduction: int = 4,
        **options: Any,
    ):
        super().__init__(num_skips)
        check_range("adapter_reduction", adapter_reduction, low=1, integer=True)
        self.adapter_reduction = adapter_reduction
        self.widths = [widths] * num_skips if isinstance(widths, int) else list(widths)
        if len(self.widths) != num_skips:
            raise invalid("widths", self.widths, f"one width for each of the {num_skips} skips, outermost first")
        gate = CALIBRATIONS[check_calibration(calibration)]
        self.gate_options = options
        self.build(lambda width, **changes: gate(width, **(options | changes)))

    def build(self, make_gate: Callable[..., nn.Module]) -> None:
        """Create the gates with ``make_gate(width)``; keywords replace the gate's options."""
        raise NotImplementedError

    def gate_of(self, i: int) -> Callable[[Tensor], Tensor]:
        """The gate that serves long skip i = 1 … N: a function of the pooled skip ``(B, N_i)`` that gives κ_i."""
        raise NotImplementedError

    def check_width(self, i: int, skip: Tensor) -> None:
        """Raise :class:`UserError` unless dim 1 of the skip is as wide as its gate."""
        if skip.shape[1] != self.widths[i - 1]:
            raise invalid(
                f"skip {i}",
                tuple(skip.shape),
                f"{self.widths[i - 1]} channels or tokens in dim 1, the width of its gate",
            )

    def coefficient(self, i: int, skip: Tensor, pooled: Tensor | None = None) -> Tensor:
        """κ_i ``(B, N_i)``; see :meth:`~scalelong_fast.scaling.LongSkipScaling.kappa` for the arguments."""
        self.check_width(i, skip)
        return self.gate_of(i)(global_average_pool(skip) if pooled is None else pooled)


class SharedLS(LearnableScaling):
    """LS with one gate shared by all long skips: the paper's default.

    Where all skips are equally wide, κ_i = ``gate``(GAP(skip_i)) (ScaleLong Eq. 9–11). Where they are not, the gate has
    the least width N_min, and every distinct width N an encoder and a decoder of its own around it (Eq. 12–13):
    κ_i = σ(D(SE(E(GAP(skip_i))))), with SE the gate without its σ, E = ``encoders[str(N)]``, D = ``decoders[str(N)]``;
    both are :class:`~scalelong_fast.scaling.WidthAdapter`, of hidden width max(1, ⌊N / adapter_reduction⌋). Another
    calibration has the place of SE.
    """

    def build(self, make_gate: Callable[..., nn.Module]) -> None:
        shared, distinct = min(self.widths), sorted(set(self.widths))
        if len(distinct) == 1:
            self.gate = make_gate(shared)
            return
        activation, init = self.gate_options.get("activation", "relu"), self.gate_options.get("init", "paper")
        # The decoders end in the identity: a gate that ignored its input as well would be slow to begin to learn.
        self.gate = make_gate(shared, init="paper") if "init" in self.gate_options else make_gate(shared)
        self.encoders = nn.ModuleDict(
            {str(width): encoder_of(width, shared, self.adapter_reduction, activation) for width in distinct}
        )
        self.decoders = nn.ModuleDict(
            {str(width): decoder_of(width, shared, self.adapter_reduction, activation, init) for width in distinct}
        )

    def gate_of(self, i: int) -> Callable[[Tensor], Tensor]:
        """The shared gate; between the adapters of skip i's width where the skips differ in width."""
        if "encoders" not in self._modules:
            return self.gate
        width = str(self.widths[i - 1])
        # Made anew each time: its parts may be replaced, copied or moved, and belong to this module alone.
        return AdaptedGate(self.encoders[width], getattr(self.gate, "logits", self.gate), self.decoders[width])


class IndividualLS(LearnableScaling):
    """LS with a gate per long skip; ``gates[i - 1]`` serves skip i."""

    def build(self, make_gate: Callable[..., nn.Module]) -> None:
        self.gates = nn.ModuleList([make_gate(width) for width in self.widths])

    def gate_of(self, i: int) -> nn.Module:
        return self.gates[i - 1]

"""Learnable scaling LS (ScaleLong Eq. 9–11): κ_i computed from the skip by a calibration gate."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from scalelong_fast.errors import UserError, invalid, unknown_name
from scalelong_fast.scaling.base import LongSkipScaling
from scalelong_fast.scaling.gates import CALIBRATIONS, global_average_pool


class LearnableScaling(LongSkipScaling):
    """κ_i = gate_i(GAP(skip_i)); subclasses say which gate serves which skip.

    Args:
        num_skips: N.
        widths: number of channels (UNet) or tokens (U-ViT) of the skips: one number, or one per skip, outermost first.
        calibration: name in :data:`~scalelong_fast.scaling.gates.CALIBRATIONS`.
        **options: options of the gate: ``reduction``, ``activation``, ``init``.
    """

    uses_pooled = True

    def __init__(self, num_skips: int, widths: int | Sequence[int], calibration: str = "se", **options: Any):
        super().__init__(num_skips)
        self.widths = [widths] * num_skips if isinstance(widths, int) else list(widths)
        if len(self.widths) != num_skips:
            raise invalid("widths", self.widths, f"one width for each of the {num_skips} skips, outermost first")
        if calibration not in CALIBRATIONS:
            raise unknown_name("calibration", calibration, CALIBRATIONS)
        self.build(lambda width: CALIBRATIONS[calibration](width, **options))

    def build(self, make_gate: Any) -> None:
        """Create the gates with ``make_gate(width)``."""
        raise NotImplementedError

    def gate_of(self, i: int) -> nn.Module:
        """The gate that serves long skip i = 1 … N."""
        raise NotImplementedError

    def coefficient(self, i: int, skip: Tensor, pooled: Tensor | None = None) -> Tensor:
        """κ_i ``(B, N_i)``; see :meth:`~scalelong_fast.scaling.LongSkipScaling.kappa` for the arguments."""
        if skip.shape[1] != self.widths[i - 1]:
            raise invalid(
                f"skip {i}",
                tuple(skip.shape),
                f"{self.widths[i - 1]} channels or tokens in dim 1, the width of its gate",
            )
        return self.gate_of(i)(global_average_pool(skip) if pooled is None else pooled)


class SharedLS(LearnableScaling):
    """LS with one gate shared by all long skips: the paper's default."""

    def build(self, make_gate: Any) -> None:
        if len(set(self.widths)) != 1:
            raise UserError(
                f"widths: got {self.widths}, expected equal widths, since scaling 'ls' shares one gate among all long "
                "skips. Use scaling 'ls-individual', which has a gate per skip."
            )
        self.gate = make_gate(self.widths[0])

    def gate_of(self, i: int) -> nn.Module:
        return self.gate


class IndividualLS(LearnableScaling):
    """LS with a gate per long skip; ``gates[i - 1]`` serves skip i."""

    def build(self, make_gate: Any) -> None:
        self.gates = nn.ModuleList([make_gate(width) for width in self.widths])

    def gate_of(self, i: int) -> nn.Module:
        return self.gates[i - 1]

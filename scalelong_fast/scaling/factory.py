"""Scalings by name."""

import warnings
from collections.abc import Sequence

from scalelong_fast.errors import unknown_name
from scalelong_fast.scaling.base import LongSkipScaling
from scalelong_fast.scaling.constant import CS, NoScaling, ReversedCS, UniformScaling, check_kappa
from scalelong_fast.scaling.free import FreeScaling
from scalelong_fast.scaling.learnable import IndividualLS, LearnableScaling, SharedLS

#: Every scaling by the name it has on the command line.
SCALINGS: dict[str, type[LongSkipScaling]] = {
    "none": NoScaling,
    "uniform": UniformScaling,
    "cs": CS,
    "cs-reversed": ReversedCS,
    "ls": SharedLS,
    "ls-individual": IndividualLS,
    "learnable": FreeScaling,
}


def list_scalings() -> list[str]:
    """Names that :func:`create_scaling` knows."""
    return list(SCALINGS)


def resolve_scaling(name: str) -> str:
    """The canonical form of a scaling's name; an unknown one raises with the nearest names."""
    key = name.lower().replace("_", "-") if isinstance(name, str) else None
    if key not in SCALINGS:
        raise unknown_name("scaling", name, SCALINGS)
    return key


def create_scaling(
    name: str,
    *,
    num_skips: int,
    widths: int | Sequence[int],
    kappa: float | None = None,
    calibration: str = "se",
    reduction: int = 16,
    activation: str = "relu",
    init: str = "paper",
    adapter_reduction: int = 4,
) -> LongSkipScaling:
    """Build the coefficients κ_1 … κ_N of a network's long skip connections.

    Args:
        name: ``none`` (κ_i = 1), ``uniform`` (κ_i = κ), ``cs`` (Eq. 8, κ^(i−1)), ``cs-reversed`` (κ^(N−i+1)), ``ls``
            (Eq. 9–13, one gate for all skips), ``ls-individual`` (a gate per skip), ``learnable`` (free scalars).
            An underscore is as good as a hyphen.
        num_skips: N.
        widths: channels (UNet) or tokens (U-ViT) of the skips: one number, or one per skip, outermost first.
        kappa: κ > 0. Default 1/√2 for ``uniform``, 0.7 for CS, 1 for ``learnable``. The gates and ``none`` have no
            use for it and say so with a warning.
        calibration: of the gates, ``se`` (:class:`~scalelong_fast.scaling.SEGate`) or ``ie``
            (:class:`~scalelong_fast.scaling.IEGate`). The others ignore it, as they do the next three.
        reduction, activation, init: of the gates: r; relu, elu or mish (``se`` alone); ``paper`` or ``identity``.
        adapter_reduction: of ``ls`` where the skips differ in width: N / r_i of the encoders and decoders around its
            gate (see :class:`~scalelong_fast.scaling.SharedLS`). The others ignore it.

    Raises:
        UserError: unknown name, κ ≤ 0, or a bad gate option.
    """
    key = resolve_scaling(name)
    cls = SCALINGS[key]
    has_kappa = not issubclass(cls, LearnableScaling) and cls is not NoScaling
    if kappa is not None and not has_kappa:
        check_kappa(kappa)
        warnings.warn(f"kappa = {kappa:g} has no effect on scaling {key!r}.", stacklevel=2)
    if issubclass(cls, LearnableScaling):
        return cls(
            num_skips,
            widths,
            calibration,
            adapter_reduction=adapter_reduction,
            reduction=reduction,
            activation=activation,
            init=init,
        )
    return cls(num_skips, kappa) if has_kappa else cls(num_skips)

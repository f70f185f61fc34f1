"""Schedules of κ for the analyses of theory: uniform, CS and CS reversed."""

from dataclasses import dataclass

from scalelong_fast.scaling import create_scaling


@dataclass(frozen=True)
class KappaSchedule:
    """κ_1 … κ_N by name.

    Attributes:
        scaling: ``uniform``, ``cs`` or ``cs-reversed``.
        kappa: the base κ.
        kappas: κ_1 … κ_N, outermost first.
    """

    scaling: str
    kappa: float
    kappas: tuple[float, ...]

    @property
    def label(self) -> str:
        return f"{self.scaling} {self.kappa:g}"

    def squares_from(self, i: int) -> float:
        """Σ_{j=i}^N κ_j², the sum of Theorems 3.1 and 3.3; 0 for i = N + 1."""
        return sum(kappa**2 for kappa in self.kappas[i - 1 :])


#: κ = 1 is the same network under each scaling; it is listed once.
BASES = (0.3, 0.5, 0.7, 0.85, 0.95)


def kappa_schedules(num_skips: int) -> list[KappaSchedule]:
    """Every kind of schedule with every base, for N = ``num_skips`` long skips."""
    named = [("uniform", 1.0), *((scaling, base) for scaling in ("uniform", "cs", "cs-reversed") for base in BASES)]
    found = []
    for scaling, base in named:
        kappas = create_scaling(scaling, num_skips=num_skips, widths=1, kappa=base).kappas
        found.append(KappaSchedule(scaling, base, tuple(kappas)))
    return found

"""The base κ of CS whose Σκ_i² lies in a given range (ScaleLong §4.1)."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from scalelong_fast.errors import check_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The values that the paper recommends.
PAPER_RANGE = (0.5, 0.95)


def sum_of_squares(kappa: float, num_skips: int) -> float:
    """Σ_{i=1}^N κ^{2(i−1)} of CS (ScaleLong Eq. 8): 1 for κ = 0, N for κ = 1."""
    return sum(kappa ** (2 * i) for i in range(num_skips))


def solve_kappa(total: float, num_skips: int) -> float:
    """κ in [0, 1] with Σ κ^{2(i−1)} = ``total``; 0 below what CS reaches (κ_1 is always 1), 1 above."""
    if total <= 1:
        return 0.0
    if total >= num_skips:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-12:  # the sum grows with κ
        middle = (low + high) / 2
        low, high = (middle, high) if sum_of_squares(middle, num_skips) < total else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class KappaRange:
    """A range of κ and the range of Σκ_i² that it comes from.

    Attributes:
        num_skips: N.
        low_sum, high_sum: the range of Σκ_i².
        low, high: the κ's of CS that give them.
    """

    num_skips: int
    low_sum: float
    high_sum: float
    low: float
    high: float

    @property
    def overlap(self) -> tuple[float, float] | None:
        """What the range has in common with the paper's 0.5 to 0.95; None where that is nothing."""
        low, high = max(self.low, PAPER_RANGE[0]), min(self.high, PAPER_RANGE[1])
        return (low, high) if low <= high else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "overlap_with_paper": self.overlap, "paper": PAPER_RANGE}

    def describe(self, name: str, upper: float) -> str:
        """The range in words, beside the paper's."""
        if self.overlap is None:
            place = "below" if self.high < PAPER_RANGE[0] else "above"
            beside = f"It lies {place} the paper's 0.5 to 0.95"
        elif (self.low, self.high) == self.overlap:
            beside = "It lies inside the paper's 0.5 to 0.95"
        else:
            beside = f"Of the paper's 0.5 to 0.95 it shares {self.overlap[0]:.2f} to {self.overlap[1]:.2f}"
        edges = [f"Σκ_i² cannot fall to {self.low_sum:.2f}, since κ_1 = 1"] if self.low == 0 else []
        edges += [f"Σκ_i² cannot reach {self.high_sum:.2f} with {self.num_skips} skips"] if self.high == 1 else []
        note = "".join(f"; {edge}" for edge in edges)
        return (
            f"{name}, {self.num_skips} long skips: κ from {self.low:.2f} to {self.high:.2f} keeps Σκ_i² of CS between "
            f"the mean {self.low_sum:.2f} of ‖ε_t‖² / ‖x_t‖² and its {upper:.0%} quantile {self.high_sum:.2f} "
            f"(ScaleLong §4.1){note}. {beside}."
        )

    def draw(self, figure: "Figure") -> None:
        """Σκ_i² over κ with both ranges."""
        axes = figure.add_subplot()
        kappas = [k / 200 for k in range(201)]
        axes.plot(kappas, [sum_of_squares(kappa, self.num_skips) for kappa in kappas])
        axes.axhspan(self.low_sum, self.high_sum, alpha=0.2, label="mean to upper bound of ‖ε_t‖² / ‖x_t‖²")
        axes.axvspan(self.low, self.high, alpha=0.2, color="tab:green", label=f"κ {self.low:.2f} to {self.high:.2f}")
        axes.axvspan(*PAPER_RANGE, alpha=0.1, color="tab:gray", label="the paper's 0.5 to 0.95")
        axes.set_xlabel("κ of CS")
        axes.set_ylabel("Σ κ_i² (ScaleLong §4.1)")
        axes.set_title(f"N = {self.num_skips} long skips")
        axes.legend()


def suggest_range(low_sum: float, high_sum: float, num_skips: int) -> KappaRange:
    """The κ's of CS between whose sums of squares lie ``low_sum`` and ``high_sum``."""
    check_range("--skips", num_skips, low=2, integer=True)
    check_range("low_sum", low_sum, low=0)
    check_range("high_sum", high_sum, low=low_sum)
    low, high = solve_kappa(low_sum, num_skips), solve_kappa(high_sum, num_skips)
    return KappaRange(num_skips, low_sum, high_sum, low, high)

"""Lemma 3.2 and Theorems 3.1 and 3.3 of ScaleLong, measured on the network they are about."""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scalelong_fast.analysis.finding import Finding
from scalelong_fast.analysis.matrix_unet import INITS, MatrixUNet, expected_squared_norms
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.schedules import KappaSchedule, kappa_schedules
from scalelong_fast.analysis.statistics import fit_line
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import check_range, invalid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class BoundsSettings:
    """How large the check of Lemma 3.2 and Theorems 3.1 and 3.3 is.

    Attributes:
        skips: the N's.
        widths: the m's.
        block_depth: matrices per block.
        trials: independent networks per (N, m).
        samples: of Lemma 3.2, per time and dimension m.
        schedule: the noise process of Lemma 3.2.
        seed: of everything random.
    """

    skips: tuple[int, ...] = (2, 4, 8, 12)
    widths: tuple[int, ...] = (16, 32, 64)
    block_depth: int = 2
    trials: int = 100
    samples: int = 4000
    schedule: str = "vpsde"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("skips", 2), ("widths", 1)):  # κ_1 = 1 always: with one skip there is nothing to compare
            values = getattr(self, name)
            if not values:
                raise invalid(f"--{name}", values, "at least one number")
            for value in values:
                check_range(f"--{name}", value, low=low, integer=True)
        for name, low in (("block_depth", 1), ("trials", 2), ("samples", 2), ("seed", 0)):
            check_range(f"--{name.replace('_', '-')}", getattr(self, name), low=low, integer=True)


SCALES = {
    "smoke": BoundsSettings(skips=(2, 6), widths=(16, 32), trials=40, samples=2000),
    "digits": BoundsSettings(),
}


def check_lemma_3_2(settings: BoundsSettings) -> list[dict[str, float]]:
    """E‖x_t‖² = (1 − 2 E[α_t²] / 3) m for x_0 uniform in [−1, 1]^m, t uniform on the 1000-step grid (Lemma 3.2).

    Returns:
        One row per m: ``m``, ``expected``, ``measured``, ``relative_error`` and ``standard_error`` (also relative) of
        the Monte-Carlo estimate.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    squares = create_schedule(settings.schedule).grid_alphas_cumprod()
    rows = []
    for m in settings.widths:
        # The same number of samples at evenly spaced times: the average over t has no error of its own.
        times = squares[:: max(1, len(squares) // 100)]
        expected = (1 - 2 * squares.mean().item() / 3) * m
        # What the spacing of the times leaves out is taken back, so that the samples alone decide.
        shift = (squares.mean() - times.mean()).item() * 2 / 3 * m
        norms = []
        for square in times:
            x0 = torch.rand(settings.samples, m, generator=generator, dtype=torch.float64) * 2 - 1
            noise = torch.randn(settings.samples, m, generator=generator, dtype=torch.float64)
            norms.append((square.sqrt() * x0 + (1 - square).sqrt() * noise).square().sum(1))
        stacked = torch.stack(norms)
        measured = stacked.mean().item() - shift
        # Samples at one time are independent draws of one distribution; times differ in their mean on purpose.
        error = (stacked.var(1) / settings.samples).sum().sqrt().item() / len(times)
        rows.append(
            {
                "m": m,
                "expected": expected,
                "measured": measured,
                "relative_error": abs(measured / expected - 1),
                "standard_error": error / expected,
            }
        )
    return rows


@dataclass(frozen=True)
class Measurement:
    """Norms of one network shape under one schedule of κ, averaged over trials and inputs.

    Attributes:
        init, N, m: of the :class:`MatrixUNet`.
        scaling, kappa: the schedule.
        sum_squares: Σ_{j=1}^N κ_j².
        norm: E‖h_0‖² / ‖x‖².
        predicted_norm: the same, by :func:`expected_squared_norms`.
        norm_error: standard error of ``norm``.
        spread: standard deviation of ‖h_0‖² / ‖x‖² among networks, relative to its mean: what Theorem 3.1 calls ρ.
        gradient: E‖∇_W ℓ‖² / (2 ℓ ‖x‖²) of the last matrix of the outermost decoder block b_1.
        gradients_by_level: the same of each b_i, i = 1 … N.
    """

    init: str
    N: int
    m: int
    scaling: str
    kappa: float
    sum_squares: float
    norm: float
    predicted_norm: float
    norm_error: float
    spread: float
    gradient: float
    gradients_by_level: tuple[float, ...]


def measure(count: int, width: int, init: str, settings: BoundsSettings) -> list[Measurement]:
    """Run the networks of one shape forward and backward under every schedule, with ℓ = ½‖ε − UNet(x)‖².

    Weights, inputs and the standard normal ε depend on the seed, N and m alone: schedules are compared on the same
    networks.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + 1009 * count + width)
    shape = (settings.trials, 1, width)  # one input a network: inputs of one network are not independent
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randn(shape, generator=generator, dtype=torch.float64)
    net = MatrixUNet((1.0,) * count, width, settings.block_depth, init, trials=settings.trials, generator=generator)
    return [_measure(net, schedule, x, target) for schedule in kappa_schedules(count)]


def _measure(net: MatrixUNet, schedule: KappaSchedule, x: Tensor, target: Tensor) -> Measurement:
    count, net.kappas = net.num_skips, schedule.kappas
    h = net(x)
    loss = 0.5 * (target - h).square().sum((1, 2))
    (gradient,) = torch.autograd.grad(loss.sum(), net.weights)
    scale = 2 * loss.detach() * x.square().sum((1, 2))
    by_level = [_mean(gradient[:, count + i, -1].square().sum((1, 2)) / scale) for i in range(1, count + 1)]
    norms = (h.detach().square().sum(2) / x.square().sum(2)).squeeze(1)
    gain = 2.0 if net.init == "paper" else 1.0
    return Measurement(
        net.init,
        count,
        net.width,
        schedule.scaling,
        schedule.kappa,
        schedule.squares_from(1),
        _mean(norms),
        expected_squared_norms(schedule.kappas, gain)[0],
        norms.std().item() / math.sqrt(len(norms)),
        norms.std().item() / _mean(norms),
        by_level[0],
        tuple(by_level),
    )


def _mean(values: Tensor) -> float:
    return values.mean().item()


def explain(rows: list[Measurement]) -> list[dict[str, Any]]:
    """How well c_1 Σκ_j² + c_2 explains the norms and gradients of the schedules of each (init, N, m).

    Returns:
        Rows with R² over all schedules together and over each kind alone, of the exact expectation of the norm
        (:func:`expected_squared_norms`), the measured norm and the measured gradient; 1 where the sum says it all, less
        where equal sums go with different norms.
    """
    found = []
    for init, count, width in dict.fromkeys((row.init, row.N, row.m) for row in rows):
        group = [row for row in rows if (row.init, row.N, row.m) == (init, count, width)]
        entry: dict[str, Any] = {"init": init, "N": count, "m": width}
        for what in ("predicted_norm", "norm", "gradient"):
            entry[f"{what}_r2"] = _r2(group, what)
            for scaling in ("uniform", "cs", "cs-reversed"):
                entry[f"{what}_r2_{scaling}"] = _r2([row for row in group if row.scaling == scaling], what)
        found.append(entry)
    return found


def _r2(rows: list[Measurement], what: str) -> float:
    return fit_line([row.sum_squares for row in rows], [getattr(row, what) for row in rows]).r2


def check_bounds(settings: BoundsSettings | None = None, progress: Progress = silent) -> Finding:
    """Lemma 3.2 by Monte Carlo, Theorems 3.1 and 3.3 over N, m, schedules of κ and two initialisations.

    Returns:
        A :class:`Finding` with ``lemma_3_2``, ``measurements`` and ``explained`` in its data.
    """
    settings = settings or BoundsSettings()
    lemma = check_lemma_3_2(settings)
    jobs = list(itertools.product(INITS, settings.skips, settings.widths))
    rows: list[Measurement] = []
    for done, (init, count, width) in enumerate(jobs):
        progress(done, len(jobs), f"{init}, N = {count}, m = {width}")
        rows += measure(count, width, init, settings)
    explained = explain(rows)
    return Finding(
        "bounds",
        "ScaleLong Lemma 3.2, Theorems 3.1 and 3.3",
        _sentence(lemma, explained),
        asdict(settings),
        {"lemma_3_2": lemma, "explained": explained, "measurements": [asdict(row) for row in rows]},
        lambda figure: _draw(figure, rows, settings),
    )


def _sentence(lemma: list[dict[str, float]], explained: list[dict[str, Any]]) -> str:
    worst = max(row["relative_error"] for row in lemma)

    def least(init: str, what: str) -> float:
        return min(row[f"{what}_r2"] for row in explained if row["init"] == init)

    return (
        f"Lemma 3.2 holds to {worst:.2%}. Over uniform, CS and reversed κ together, c_1 Σκ_j² + c_2 (Theorem 3.1) "
        f"explains at least {least('norm-keeping', 'norm'):.0%} of the variance of ‖h_0‖² where every block keeps the "
        f"norm, and as little as {least('paper', 'norm'):.0%} under the paper's N(0, 2/m), where κ_j² has a weight of "
        f"4^j; of the gradients (Theorem 3.3) it explains {least('norm-keeping', 'gradient'):.0%} and "
        f"{least('paper', 'gradient'):.0%}."
    )


def _draw(figure: "Figure", rows: list[Measurement], settings: BoundsSettings) -> None:
    count, width = max(settings.skips), max(settings.widths)
    for place, init in enumerate(INITS, start=1):
        axes = figure.add_subplot(1, 2, place)
        for scaling, marker in (("uniform", "o"), ("cs", "^"), ("cs-reversed", "v")):
            group = [row for row in rows if (row.init, row.N, row.m, row.scaling) == (init, count, width, scaling)]
            axes.plot([row.sum_squares for row in group], [row.norm for row in group], marker, label=scaling)
        axes.set_title(f"{init}, N = {count}, m = {width}")
        axes.set_xlabel("Σ κ_j²")
        axes.set_ylabel("E‖h_0‖² / ‖x‖² (Theorem 3.1)")
        axes.grid(True, alpha=0.3)
        axes.legend()

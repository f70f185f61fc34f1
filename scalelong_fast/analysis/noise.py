"""How large x_t is and how much of it is noise (ScaleLong Fig. 3a, b), and the κ that §4.1 takes from it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scalelong_fast.analysis.finding import Finding
from scalelong_fast.analysis.kappa_range import suggest_range
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.samples import check_dataset, draw_clean, open_samples
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import check_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class NoiseSettings:
    """Which samples, and how many.

    Attributes:
        dataset, path, img_size: see :func:`open_samples`.
        schedule: the noise process; times are its 1000-step grid.
        times: evenly spaced ones of the grid.
        samples: per time.
        upper: quantile that counts as the upper bound.
        seed: of everything random.
    """

    dataset: str = "digits"
    path: Path | None = None
    img_size: int | None = None
    schedule: str = "vpsde"
    times: int = 100
    samples: int = 1000
    upper: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_dataset(self.dataset)
        check_range("--times", self.times, low=2, high=1000, integer=True)
        check_range("--samples", self.samples, low=2, integer=True)
        check_range("--upper", self.upper, low=0.5, high=1)
        check_range("--seed", self.seed, low=0, integer=True)


SCALES = {"smoke": NoiseSettings(times=20, samples=100), "digits": NoiseSettings()}


@dataclass(frozen=True)
class NoiseNorms:
    """Squared norms of x_t at several times.

    Attributes:
        times: steps of the grid, ``(T,)`` int64.
        inputs: ‖x_t‖² / m, ``(T, S)`` float64, m numbers in an image.
        ratios: ‖ε_t‖² / ‖x_t‖², ``(T, S)``.
        m: numbers in an image.
    """

    times: Tensor
    inputs: Tensor
    ratios: Tensor
    m: int


def measure_norms(settings: NoiseSettings, progress: Progress = silent) -> NoiseNorms:
    """Draw x_t = α_t x_0 + σ_t ε_t at every time and measure it."""
    dataset = open_samples(settings.dataset, settings.path, settings.img_size)
    generator = torch.Generator().manual_seed(settings.seed)
    squares = create_schedule(settings.schedule).grid_alphas_cumprod()
    times = torch.linspace(0, len(squares) - 1, settings.times).round().long()
    inputs, ratios = [], []
    for done, square in enumerate(squares[times]):
        progress(done, len(times), f"time {int(times[done])}")
        x0 = draw_clean(dataset, settings.samples, generator).double().flatten(1)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        x_t = (square.sqrt() * x0 + (1 - square).sqrt() * noise).square().sum(1)
        inputs.append(x_t / x0.shape[1])
        ratios.append(noise.square().sum(1) / x_t)
    return NoiseNorms(times, torch.stack(inputs), torch.stack(ratios), x0.shape[1])


def _summary(values: Tensor, upper: float) -> dict[str, float]:
    flat = values.flatten()
    quantiles = {"low": 1 - upper, "median": 0.5, "high": upper}
    found = {name: _quantile(flat, q) for name, q in quantiles.items()}
    return {"mean": flat.mean().item(), **found, "max": flat.max().item()}


def _quantile(flat: Tensor, q: float) -> float:
    """Of any number of values; torch.quantile takes 16 million."""
    return flat.kthvalue(max(1, min(len(flat), round(q * len(flat))))).values.item()


def _by_time(norms: NoiseNorms, upper: float) -> list[dict[str, float]]:
    rows = zip(norms.times.tolist(), norms.inputs, norms.ratios, strict=True)
    return [{"time": t, "input": _summary(x, upper), "ratio": _summary(r, upper)} for t, x, r in rows]


def analyze_noise(settings: NoiseSettings | None = None, progress: Progress = silent) -> Finding:
    """Distribution of ‖x_t‖² and ‖ε_t‖² / ‖x_t‖² of a data set."""
    settings = settings or NoiseSettings()
    norms = measure_norms(settings, progress)
    inputs, ratios = _summary(norms.inputs, settings.upper), _summary(norms.ratios, settings.upper)
    share = (norms.ratios >= 1).double().mean().item()
    sentence = (
        f"{settings.dataset}: over all times ‖x_t‖² is {inputs['mean']:.2f} m on average ({inputs['low']:.2f} to "
        f"{inputs['high']:.2f} m, m = {norms.m}; Lemma 3.2 has it of order m), and ‖ε_t‖² / ‖x_t‖² is "
        f"{ratios['mean']:.2f} on average and {ratios['high']:.2f} at the {settings.upper:.0%} quantile; the noise is "
        f"as large as the network's whole input or larger in {share:.0%} of the draws (ScaleLong Fig. 3a, b)."
    )
    data = {"m": norms.m, "input": inputs, "ratio": ratios, "by_time": _by_time(norms, settings.upper)}
    return Finding(
        "noise", "ScaleLong Fig. 3a, b", sentence, asdict(settings), data, lambda figure: _draw(figure, norms, settings)
    )


def _draw(figure: "Figure", norms: NoiseNorms, settings: NoiseSettings) -> None:
    panels = ((norms.inputs, "‖x_t‖² / m (Fig. 3a)"), (norms.ratios, "‖ε_t‖² / ‖x_t‖² (Fig. 3b)"))
    for place, (values, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        low, high = (_row_quantile(values, q) for q in (1 - settings.upper, settings.upper))
        axes.fill_between(norms.times, low, high, alpha=0.3, label=f"{1 - settings.upper:.0%} to {settings.upper:.0%}")
        axes.plot(norms.times, values.mean(1), label="mean")
        axes.set_xlabel("t (step of the grid)")
        axes.set_ylabel(label)
        axes.set_title(settings.dataset)
        axes.grid(True, alpha=0.3)
        axes.legend()


def _row_quantile(values: Tensor, q: float) -> list[float]:
    return [_quantile(row, q) for row in values]


def analyze_kappa_range(num_skips: int, settings: NoiseSettings | None = None, progress: Progress = silent) -> Finding:
    """The κ of CS that §4.1 gives for a data set and a network of N long skips.

    The output of the network is to be the noise: by Theorem 3.1 its squared norm goes with ‖x_t‖² Σκ_i², so that
    Σκ_i² is kept between the mean of ‖ε_t‖² / ‖x_t‖² and its upper bound, here a quantile.
    """
    check_range("--skips", num_skips, low=2, integer=True)
    settings = settings or NoiseSettings()
    ratios = _summary(measure_norms(settings, progress).ratios, settings.upper)
    found = suggest_range(ratios["mean"], ratios["high"], num_skips)
    return Finding(
        "suggest-kappa",
        "ScaleLong §4.1",
        found.describe(settings.dataset, settings.upper),
        {**asdict(settings), "skips": num_skips},
        {"ratio": ratios, **found.as_dict()},
        lambda figure: found.draw(figure),
    )

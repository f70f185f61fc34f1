"""The κ_i that LS learns, beside the curves of CS (ScaleLong Fig. 7)."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scalelong_fast.analysis.finding import Finding
from scalelong_fast.analysis.kappa_range import PAPER_RANGE
from scalelong_fast.analysis.networks import train_each
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.statistics import Band, band, fit_line
from scalelong_fast.analysis.training import Training, Watched, open_data, train_watched
from scalelong_fast.analysis.units import Units
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import UserError, check_range, invalid
from scalelong_fast.training import RunFolder
from scalelong_fast.training.batches import BatchSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Root mean square distance beyond which a curve of CS does not describe what LS learnt. A κ_i that training moved by
#: less has hardly moved: nearly all of it is the initialisation's.
FAR = 0.1


@dataclass(frozen=True)
class LearntKappaSettings:
    """Which networks' κ_i are looked at: those of finished runs, or ones trained for it.

    Attributes:
        training: the networks, where there are no ``runs``; their scalings are ``ls`` or ``ls-individual``.
        recordings: how often κ is recorded during training, evenly spaced.
        runs: folders of trained runs.
    """

    training: Training = field(default_factory=lambda: Training(scalings=("ls",), batch_size=64, seeds=(0, 1, 2)))
    recordings: int = 10
    runs: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        check_range("--recordings", self.recordings, low=1, high=self.training.steps, integer=True)
        for scaling in self.training.scalings:
            if not scaling.startswith("ls"):
                raise invalid("--scalings", scaling, "ls or ls-individual", "The others learn no κ from the skip.")


SCALES = {
    "smoke": LearntKappaSettings(
        Training(scalings=("ls",), depth=12, steps=30, batch_size=16, seeds=(0, 1)), recordings=3
    ),
    "digits": LearntKappaSettings(),
}


@torch.no_grad()
def kappa_means(watched: Watched) -> list[float]:
    """κ_1 … κ_N on the probe batch, averaged over samples and channels or tokens."""
    with watched.model.scaling.recording() as kappas:
        watched.predict()
    return [kappas[i].double().mean().item() for i in sorted(kappas)]


def record_kappas(settings: LearntKappaSettings, scaling: str, seed: int) -> dict[str, Any]:
    """Train one network; ``steps`` and, for each, ``kappas`` 1 … N."""
    steps: list[int] = []
    kappas: list[list[float]] = []

    def observe(watched: Watched) -> None:
        steps.append(watched.step)
        kappas.append(kappa_means(watched))

    every = settings.training.steps // settings.recordings
    train_watched(settings.training.config(scaling, seed), observe, every)
    return {"steps": steps, "kappas": kappas}


def read_kappas(run: Path) -> list[float]:
    """κ_1 … κ_N of the averaged network of a finished run, on the first batch of its own data.

    Raises:
        UserError: no run there, or one whose scaling is not LS or whose data are gone.
    """
    folder = RunFolder(run)
    config, _ = folder.read_config()
    if not config.model.scaling.startswith("ls"):
        raise invalid(
            "--runs", str(run), "runs whose scaling is ls or ls-individual", f"It has {config.model.scaling}."
        )
    model = folder.load_ema()
    try:
        dataset = open_data(config)
    except UserError as error:
        raise invalid("--runs", str(run), "runs whose data can be opened", str(error)) from error
    source = BatchSource(dataset, config, torch.device("cpu"), prefetch=0)
    diffusion = config.diffusion
    schedule = create_schedule(diffusion.schedule, beta_min=diffusion.beta_min, beta_max=diffusion.beta_max)
    try:
        return kappa_means(Watched(0, model, [], source(0), schedule))
    finally:
        source.close()


def closest_cs(kappas: Sequence[float]) -> tuple[float, float]:
    """The base κ of CS in steps of 0.01 whose κ^{i−1} come nearest to κ_1 … κ_N, and the root mean square distance."""

    def distance(base: float) -> float:
        return (sum((own - base**i) ** 2 for i, own in enumerate(kappas)) / len(kappas)) ** 0.5

    best = min((number / 100 for number in range(1, 101)), key=distance)
    return best, distance(best)


@dataclass(frozen=True)
class Movement:
    """How far training moved κ.

    Attributes:
        steps: of the trainings.
        start: κ averaged over i at the first recording, over networks.
        moved: by i, κ_i at the last recording less that at the first, over networks.
    """

    steps: int
    start: Band
    moved: list[Band]

    @property
    def hardly(self) -> bool:
        """Whether no κ_i moved by :data:`FAR` on average."""
        return max(abs(b.mean) for b in self.moved) < FAR

    def describe(self) -> str:
        """In words."""
        low, high = min(b.mean for b in self.moved), max(b.mean for b in self.moved)
        verb = "hardly moved, by" if self.hardly else "moved by"
        return f"began at {self.start.mean:.2f} and {verb} {low:+.2f} to {high:+.2f} in {self.steps} steps"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def movement(records: Sequence[dict[str, Any]]) -> Movement:
    """The :class:`Movement` of at least one network's :func:`record_kappas`."""
    firsts, lasts = ([record["kappas"][place] for record in records] for place in (0, -1))
    start = band([sum(kappas) / len(kappas) for kappas in firsts])
    by_skip = zip(zip(*firsts, strict=True), zip(*lasts, strict=True), strict=True)
    moved = [band([b - a for a, b in zip(*pair, strict=True)]) for pair in by_skip]
    return Movement(records[0]["steps"][-1], start, moved)


def analyze_learnt_kappa(
    settings: LearntKappaSettings | None = None,
    units: Units | None = None,
    progress: Progress = silent,
    workers: int | None = 1,
) -> Finding:
    """κ_i of LS during and after training, against κ^{i−1}.

    Args:
        settings: what to train, or runs to look at.
        units: keeps what each network gave.
        progress: told about each network.
        workers: processes, see :func:`~scalelong_fast.analysis.sweep.run_jobs`.
    """
    settings, units = settings or LearntKappaSettings(), units or Units()
    records, final = [], []
    if settings.runs:
        for done, run in enumerate(settings.runs):
            progress(done, len(settings.runs), str(run))
            final.append(read_kappas(run))
        if len({len(kappas) for kappas in final}) > 1:
            raise invalid("--runs", settings.runs, "runs with equally many long skips")
    else:
        training = settings.training
        key = {"analysis": "kappa", **training.key(), "recordings": settings.recordings}
        compute = functools.partial(record_kappas, settings)
        for scaling, results in train_each(training, key, compute, units, progress, workers).items():
            for seed, found in zip(training.seeds, results, strict=True):
                records.append({"scaling": scaling, "seed": seed, **found})
                final.append(found["kappas"][-1])
    bands = [band([kappas[i] for kappas in final]) for i in range(len(final[0]))]
    means = [b.mean for b in bands]
    base, distance = closest_cs(means)
    moved = movement(records) if records else None
    data = {
        "records": records,
        "final": final,
        "bands": [b.as_dict() for b in bands],
        "movement": moved and moved.as_dict(),
        "closest_cs": {"kappa": base, "distance": distance},
    }
    sentence = _sentence(final, moved, base, distance)
    return Finding("kappa", "ScaleLong Fig. 7", sentence, asdict(settings), data, lambda figure: _draw(figure, bands))


def _sentence(final: list[list[float]], moved: Movement | None, base: float, distance: float) -> str:
    means = [sum(own) / len(final) for own in zip(*final, strict=True)]
    began = "" if moved is None else f" κ {moved.describe()}."
    if distance > FAR:
        beside = f"no curve of CS is near, the closest, κ = {base:.2f}, being {distance:.2f} (root mean square) away"
    else:
        inside = "inside" if PAPER_RANGE[0] <= base <= PAPER_RANGE[1] else "outside"
        beside = f"CS with κ = {base:.2f}, {inside} the paper's 0.5 to 0.95, is {distance:.2f} (root mean square) away"
    return (
        f"LS of {len(final)} network{'s' * (len(final) > 1)} has κ_i from {min(means):.2f} to {max(means):.2f} on "
        f"average{_trend(final)}; {beside} (ScaleLong Fig. 7).{began}"
    )


def _trend(final: list[list[float]]) -> str:
    """How κ_i goes with i, by the band over networks of the slope of each."""
    count = len(final[0])
    if count < 2:
        return ""
    slope = band([fit_line(range(count), kappas).slope for kappas in final])
    if slope.count < 2 or slope.low <= 0 <= slope.high:
        return ", with no trend shown from the outermost to the innermost"
    return f", {'falling' if slope.mean < 0 else 'rising'} by {abs(slope.mean):.2g} per skip to the innermost"


def _draw(figure: "Figure", bands: list[Band]) -> None:
    axes = figure.add_subplot()
    places = list(range(1, len(bands) + 1))
    axes.errorbar(
        places,
        [b.mean for b in bands],
        yerr=[b.mean - b.low for b in bands],
        marker="o",
        capsize=3,
        label="LS, mean and 95 % band",
    )
    for base in (0.5, 0.7, 0.85, 0.95):
        axes.plot(places, [base ** (i - 1) for i in places], linestyle="--", linewidth=1, label=f"CS, κ = {base:g}")
    axes.set_xticks(places)
    axes.set_xlabel("i (1: outermost long skip)")
    axes.set_ylabel("κ_i (ScaleLong Fig. 7)")
    axes.grid(True, alpha=0.3)
    axes.legend()

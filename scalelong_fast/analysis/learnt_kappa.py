"""The κ_i that LS learns, beside the curves of CS (ScaleLong Fig. 7)."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scalelong_fast.analysis.finding import Finding
from scalelong_fast.analysis.kappa_range import PAPER_RANGE
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.statistics import Band, band, fit_line
from scalelong_fast.analysis.sweep import Job, require_all, run_jobs
from scalelong_fast.analysis.training import Training, Watched, train_watched
from scalelong_fast.analysis.units import Units
from scalelong_fast.data import open_training_set
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import check_range, invalid
from scalelong_fast.training import RunFolder
from scalelong_fast.training.batches import BatchSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Root mean square distance beyond which a curve of CS does not describe what LS learnt.
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
        UserError: no run there, or one whose scaling is not LS.
    """
    folder = RunFolder(run)
    config, _ = folder.read_config()
    if not config.model.scaling.startswith("ls"):
        raise invalid(
            "--runs", str(run), "runs whose scaling is ls or ls-individual", f"It has {config.model.scaling}."
        )
    model = folder.load_ema()
    dataset = open_training_set(config.data, config.model, label_dropout=config.diffusion.label_dropout)
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
        key = {"analysis": "kappa", **asdict(training), "recordings": settings.recordings}
        del key["scalings"], key["seeds"]
        networks = [{"scaling": scaling, "seed": seed} for scaling in training.scalings for seed in training.seeds]
        jobs = [
            Job(
                {**key, **network},
                "{scaling}, seed {seed}".format(**network),
                functools.partial(record_kappas, settings, **network),
            )
            for network in networks
        ]
        for network, found in zip(networks, require_all(run_jobs(jobs, units, progress, workers)), strict=True):
            records.append({**network, **found})
            final.append(found["kappas"][-1])
    bands = [band([kappas[i] for kappas in final]) for i in range(len(final[0]))]
    means = [b.mean for b in bands]
    base, distance = closest_cs(means)
    data = {
        "records": records,
        "final": final,
        "bands": [b.as_dict() for b in bands],
        "closest_cs": {"kappa": base, "distance": distance},
    }
    sentence = _sentence(len(final), means, base, distance)
    return Finding("kappa", "ScaleLong Fig. 7", sentence, asdict(settings), data, lambda figure: _draw(figure, bands))


def _sentence(count: int, means: list[float], base: float, distance: float) -> str:
    trend = ""
    if len(means) > 1:
        slope = fit_line(range(len(means)), means).slope
        way = "level" if abs(slope) < 5e-4 else f"{'falling' if slope < 0 else 'rising'} by {abs(slope):.3f} per skip"
        trend = f", {way} from the outermost to the innermost"
    if distance > FAR:
        beside = f"no curve of CS is near, the closest, κ = {base:.2f}, being {distance:.2f} (root mean square) away"
    else:
        inside = "inside" if PAPER_RANGE[0] <= base <= PAPER_RANGE[1] else "outside"
        beside = f"CS with κ = {base:.2f}, {inside} the paper's 0.5 to 0.95, is {distance:.2f} (root mean square) away"
    return (
        f"LS of {count} networks has κ_i from {min(means):.2f} to {max(means):.2f} on average{trend}; {beside} "
        "(ScaleLong Fig. 7)."
    )


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

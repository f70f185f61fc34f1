"""Steps and seconds to a given loss and to a given Fréchet distance, by scaling (ScaleLong Fig. 5)."""

import dataclasses
import functools
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from scalelong_fast.analysis.convergence_figure import draw_curves
from scalelong_fast.analysis.convergence_levels import Level, Reached, compare_levels, verdict
from scalelong_fast.analysis.finding import Finding
from scalelong_fast.analysis.learning_curve import learning_curve
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.sample_distance import SampleDistance
from scalelong_fast.analysis.step_time import ratio_spread, step_seconds
from scalelong_fast.analysis.sweep import Job, require_all, run_jobs
from scalelong_fast.analysis.training import DivergedError, Training, open_data
from scalelong_fast.analysis.units import Units
from scalelong_fast.errors import UserError, check_range, invalid
from scalelong_fast.training import RunConfig
from scalelong_fast.training.config import to_dict

#: What is followed, by name: the steps and the values of a curve.
MEASURES = {"loss": ("steps", "losses"), "distance": ("sampled", "distances")}


@dataclass(frozen=True)
class ConvergenceSettings:
    """What is trained, and how its progress is measured.

    Attributes:
        training: the networks.
        every: steps between looks at the loss.
        sample_every: steps between looks at the samples, a multiple of ``every``.
        probe: images of the probe that the loss is of.
        samples, solver_steps: images that a Fréchet distance is of, and the solver's steps.
        extractor: see :class:`~scalelong_fast.analysis.sample_distance.SampleDistance`; ``none``: no distance.
        ema_decay: of the averaged weights, which both measures are of; they lag by about 1 / (1 − d) steps, hence not
            the preset's.
        loss_levels, distance_levels: to reach; empty: those of ``shares``.
        shares: of what ``none`` of the same seed has at the end: levels that ``none`` reaches by definition. Above 1,
            since a scaling that is just as fast misses the end itself every other time.
        rounds: visits of each scaling in the timing of a step.
    """

    training: Training = field(default_factory=lambda: Training(steps=500, batch_size=32, seeds=(0, 1, 2)))
    every: int = 25
    sample_every: int = 100
    probe: int = 512
    samples: int = 1000
    solver_steps: int = 10
    extractor: str = "auto"
    ema_decay: float = 0.98
    loss_levels: tuple[float, ...] = ()
    distance_levels: tuple[float, ...] = ()
    shares: tuple[float, ...] = (1.25, 1.1)
    rounds: int = 10

    def __post_init__(self) -> None:
        check_range("--every", self.every, low=1, high=self.training.steps, integer=True)
        check_range("--sample-every", self.sample_every, low=1, high=self.training.steps, integer=True)
        if self.sample_every % self.every:
            raise invalid("--sample-every", self.sample_every, f"a multiple of --every, which is {self.every}")
        for name in ("probe", "solver_steps", "rounds"):
            check_range(f"--{name.replace('_', '-')}", getattr(self, name), low=1, integer=True)
        check_range("--samples", self.samples, low=2, integer=True)
        check_range("--ema-decay", self.ema_decay, low=0, high=1, high_open=True)
        for name in ("loss_levels", "distance_levels", "shares"):
            for level in getattr(self, name):
                check_range(f"--{name.replace('_', '-')}", level, low=0, low_open=True)
        if "none" not in self.training.scalings or len(self.training.scalings) < 2:
            raise invalid("--scalings", self.training.scalings, "none, and at least one to compare with it")

    def config(self, scaling: str, seed: int) -> RunConfig:
        """The run of one network."""
        config = self.training.config(scaling, seed)
        return dataclasses.replace(config, train=dataclasses.replace(config.train, ema_decay=self.ema_decay))


SCALES = {
    "smoke": ConvergenceSettings(
        Training(depth=4, steps=24, batch_size=16, seeds=(0, 1)),
        every=4,
        sample_every=12,
        probe=64,
        samples=80,
        solver_steps=3,
        rounds=3,
    ),
    "digits": ConvergenceSettings(),
}


#: A :func:`~scalelong_fast.analysis.learning_curve.learning_curve`; of a network that diverged an empty one, which gets
#: nowhere, with ``diverged``, the step at which that was seen.
Followed = dict[str, Any]


def follow(settings: ConvergenceSettings, scaling: str, seed: int) -> Followed:
    """Train one network and follow it."""
    config = settings.config(scaling, seed)
    distance = None
    if settings.extractor != "none":
        distance = SampleDistance(config, settings.samples, settings.solver_steps, settings.extractor)
    try:
        return learning_curve(config, settings.every, settings.probe, settings.sample_every, distance)
    except DivergedError as error:
        return {**{name: [] for pair in MEASURES.values() for name in pair}, "diverged": error.step}


def analyze_convergence(
    settings: ConvergenceSettings | None = None,
    units: Units | None = None,
    progress: Progress = silent,
    workers: int | None = None,
) -> Finding:
    """Train a network of each scaling and seed, and compare how soon they reach the levels.

    Seconds are steps times the median time of a step, which is measured at the end in this process, all scalings in
    turns: those of the trainings would depend on what else the machine did, and on interruptions.

    Args:
        settings: what to train.
        units: keeps the curve of each network.
        progress: told after each network, then after each visit of the timing.
        workers: processes that train; see :func:`~scalelong_fast.analysis.sweep.run_jobs`.

    Raises:
        UserError: the data cannot be opened, or every network diverged. Where some did, the sentence names them.
    """
    settings, units = settings or ConvergenceSettings(), units or Units()
    curves = train_all(settings, units, progress, workers)
    broken = _diverged(settings, curves)
    if len(broken) == sum(map(len, curves.values())):
        raise UserError(
            f"Every network diverged: {'; '.join(broken)}. They would again. Choose other --seeds or --scalings, or a "
            "larger --batch-size."
        )
    scalings, seed = settings.training.scalings, settings.training.seeds[0]
    times = step_seconds({s: settings.config(s, seed) for s in scalings}, settings.rounds, progress=progress)
    seconds = {scaling: float(np.median(found)) for scaling, found in times.items()}
    reached = compare(settings, curves, times)
    return Finding(
        "convergence",
        "ScaleLong Fig. 5",
        _sentence(settings, reached, times, broken),
        asdict(settings),
        {
            "curves": curves,
            "step_seconds": {s: {"median": seconds[s], "rounds": found} for s, found in times.items()},
            "levels": [entry.as_dict() for entry in reached],
        },
        lambda figure: draw_curves(figure, curves, seconds, {k: m for k, m in MEASURES.items() if _has(curves, m[0])}),
    )


def train_all(
    settings: ConvergenceSettings, units: Units, progress: Progress = silent, workers: int | None = None
) -> dict[str, list[Followed]]:
    """The curves of all networks, by scaling, a curve for each seed.

    Raises:
        UserError: a training failed in another way than by diverging.
    """
    training = settings.training
    open_data(settings.config(training.scalings[0], training.seeds[0]))
    names = ("every", "sample_every", "probe", "samples", "solver_steps", "extractor")
    key = {"analysis": "convergence", **{name: getattr(settings, name) for name in names}}
    pairs = [(scaling, seed) for scaling in training.scalings for seed in training.seeds]
    jobs = [
        Job(
            {**key, "run": to_dict(settings.config(scaling, seed))},
            f"{scaling}, seed {seed}",
            functools.partial(follow, settings, scaling, seed),
        )
        for scaling, seed in pairs
    ]
    results = require_all(run_jobs(jobs, units, progress, workers))
    return {s: [found for (own, _), found in zip(pairs, results, strict=True) if own == s] for s in training.scalings}


def compare(
    settings: ConvergenceSettings, curves: dict[str, list[Followed]], times: dict[str, list[float]]
) -> list[Reached]:
    """How soon every scaling reached every level, the strictest one of a measure last."""
    found = []
    for measure, (steps, values) in MEASURES.items():
        if not _has(curves, steps):
            continue
        given = settings.loss_levels if measure == "loss" else settings.distance_levels
        levels = [Level(measure, value) for value in given] or [
            Level(measure, share, True) for share in settings.shares
        ]
        by_scaling = {s: [(curve[steps], curve[values]) for curve in found_] for s, found_ in curves.items()}
        found += [compare_levels(level, by_scaling, times) for level in sorted(levels, key=lambda lv: -lv.value)]
    return found


def _has(curves: dict[str, list[Followed]], steps: str) -> bool:
    return any(curve[steps] for found in curves.values() for curve in found)


def _diverged(settings: ConvergenceSettings, curves: dict[str, list[Followed]]) -> list[str]:
    """The networks that diverged, in words."""
    return [
        f"{scaling}, seed {seed} (seen at step {curve['diverged']})"
        for scaling, found in curves.items()
        for seed, curve in zip(settings.training.seeds, found, strict=True)
        if "diverged" in curve
    ]


def _sentence(
    settings: ConvergenceSettings, reached: list[Reached], times: dict[str, list[float]], broken: list[str]
) -> str:
    training = settings.training
    depth = f"depth {training.depth}, " if training.depth else ""
    listed = "; ".join(entry.describe() for entry in reached)
    per_step = ", ".join(
        f"{ratio_spread(own, times['none'])[1]:.2f} ({scaling})" for scaling, own in times.items() if scaling != "none"
    )
    compared = [scaling for scaling in training.scalings if scaling in ("cs", "ls")]
    lost = f" Diverged, and so got nowhere: {'; '.join(broken)}." if broken else ""
    return (
        f"{training.name}, {depth}batch {training.batch_size}, {training.steps} steps, {len(training.seeds)} seeds: "
        f"none takes so many times the steps of a scaling (above 1: the scaling is faster): {listed}; a step takes "
        f"{per_step} times that of none. {verdict(reached, compared)}{lost} The paper's abstract has a training "
        "acceleration of about 1.5 (ScaleLong Fig. 5)."
    )

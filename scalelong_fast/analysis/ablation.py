"""The paper's ablations (Tables 2, 3 and 4, Fig. 6 and 13): networks trained in many variants, and compared."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from scalelong_fast.analysis.ablation_report import compare, describe, draw, to_markdown
from scalelong_fast.analysis.ablation_tables import Row, Table, Variants
from scalelong_fast.analysis.finding import Finding
from scalelong_fast.analysis.learning_curve import learning_curve
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.sample_distance import SampleDistance
from scalelong_fast.analysis.sweep import Failure, Job, require_all, run_jobs
from scalelong_fast.analysis.training import DivergedError, Training, open_data
from scalelong_fast.analysis.units import Units
from scalelong_fast.errors import check_range
from scalelong_fast.evaluation.digits_classifier import FEATURES
from scalelong_fast.training import RunConfig

#: Looks at each network in training, to see where it diverges.
LOOKS = 10

#: Features of an image, by extractor. The covariance of fewer samples than that is singular.
WIDTHS = {"digits": FEATURES, "inception": 2048}


@dataclass(frozen=True)
class AblationSettings:
    """What is trained, in which variants, and how the networks are measured.

    Attributes:
        training: the networks; its scalings are those of Fig. 6.
        variants: the values to compare.
        probe: images of the probe that the loss is of, the same for all networks.
        samples, solver_steps: images that a Fréchet distance is of, and the solver's steps.
        extractor: see :class:`~scalelong_fast.analysis.sample_distance.SampleDistance`; ``none``: no distance.
        ema_decay: of the averaged weights, which both are of.
    """

    training: Training = field(default_factory=lambda: Training(steps=500, batch_size=32, seeds=(0, 1, 2)))
    variants: Variants = field(default_factory=Variants)
    probe: int = 512
    samples: int = 1000
    solver_steps: int = 20
    extractor: str = "auto"
    ema_decay: float = 0.98

    def __post_init__(self) -> None:
        check_range("--probe", self.probe, low=1, integer=True)
        check_range("--samples", self.samples, low=2, integer=True)
        check_range("--solver-steps", self.solver_steps, low=1, integer=True)
        check_range("--ema-decay", self.ema_decay, low=0, high=1, high_open=True)

    def config(self, row: Row, seed: int) -> RunConfig:
        """The run of one network."""
        config = self.training.config("none", seed)
        changes = {"batch_size": row.batch_size or self.training.batch_size, "ema_decay": self.ema_decay}
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, **row.model),
            train=dataclasses.replace(config.train, **changes),
        )


SCALES = {
    "smoke": AblationSettings(
        Training(depth=4, steps=20, batch_size=16, seeds=(0, 1)),
        Variants(depths=(2, 4)),
        probe=64,
        samples=100,
        solver_steps=5,
    ),
    "digits": AblationSettings(),
}


def measure_variant(settings: AblationSettings, row: Row, seed: int) -> dict[str, Any]:
    """Train one network.

    Returns:
        ``loss`` on the probe and, if asked for, ``distance`` of its samples from the data set; or the step at which it,
        or a sample of it, was seen to have ``diverged``.
    """
    config = settings.config(row, seed)
    distance = None
    if settings.extractor != "none":
        distance = SampleDistance(config, settings.samples, settings.solver_steps, settings.extractor)
    steps = config.train.steps
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="kappa = ")  # above 1, as Fig. 13 has it
        try:
            curve = learning_curve(config, max(1, steps // LOOKS), settings.probe, steps, distance)
        except DivergedError as error:
            return {"diverged": error.step}
    measured = {"loss": curve["losses"], "distance": curve["distances"]}
    return {name: values[-1] for name, values in measured.items() if values}


def analyze_ablation(
    table: Callable[[Training, Variants], Table],
    settings: AblationSettings | None = None,
    units: Units | None = None,
    progress: Progress = silent,
    workers: int | None = None,
) -> Finding:
    """Train the networks of one table with every seed, and compare them.

    Args:
        table: one of :data:`~scalelong_fast.analysis.ablation_tables.TABLES` or ``FIGURES``.
        settings: what to train.
        units: keeps what each network gave; tables share them.
        progress: told about each network.
        workers: processes, see :func:`~scalelong_fast.analysis.sweep.run_jobs`.

    Raises:
        UserError: no network could be trained or measured. Where some could not, their cells say why.
    """
    settings = settings or AblationSettings()
    compared, seeds = table(settings.training, settings.variants), settings.training.seeds
    open_data(settings.config(compared.rows[0], seeds[0]))
    jobs = [_job(settings, row, seed) for row in compared.rows for seed in seeds]
    results = run_jobs(jobs, units, progress, workers)
    if all(isinstance(result, Failure) for result in results):
        require_all(results)  # not a matter of one network
    outcomes = {
        row.label: [_outcome(result) for result in results[number * len(seeds) : (number + 1) * len(seeds)]]
        for number, row in enumerate(compared.rows)
    }
    rows = compare(compared, outcomes)
    recipe = describe_recipe(settings)
    return Finding(
        compared.name,
        compared.reference,
        describe(compared, rows, recipe),
        asdict(settings),
        {"title": compared.title, "recipe": recipe, "seeds": list(seeds), "rows": rows},
        lambda figure: draw(figure, compared, rows),
        to_markdown(compared, rows, recipe),
    )


def describe_recipe(settings: AblationSettings) -> str:
    """What the networks of a table have in common, unless a row says otherwise."""
    training = settings.training
    depth = f"depth {training.depth}, " if training.depth else ""
    recipe = (
        f"{training.name}, {depth}batch {training.batch_size}, {training.steps} steps, {len(training.seeds)} seeds, "
        f"{settings.samples} samples"
    )
    extractor = settings.extractor
    if extractor == "auto":
        extractor = "digits" if training.config("none", training.seeds[0]).data.name == "digits" else "inception"
    if settings.samples < WIDTHS.get(extractor, 0):
        recipe += " (fewer than features: compare distances within this table only)"
    return recipe


def _job(settings: AblationSettings, row: Row, seed: int) -> Job:
    """The job of one network, whose key names what it is and not which table asks for it."""
    measures = {name: getattr(settings, name) for name in ("probe", "samples", "solver_steps", "extractor")}
    key = {"analysis": "ablation", **measures, "config": asdict(settings.config(row, seed))}
    return Job(key, f"{row.label}, seed {seed}", functools.partial(measure_variant, settings, row, seed))


def _outcome(result: Any) -> dict[str, Any]:
    return {"failed": result.message} if isinstance(result, Failure) else result

"""How soon networks learn: convergence."""

import dataclasses
import functools
from typing import TYPE_CHECKING

from scalelong_fast.cli.analyses.options import Analysis, TrainingOptions, with_training

if TYPE_CHECKING:
    from scalelong_fast.cli.analyses.options import Task


@dataclasses.dataclass(frozen=True)
class ConvergenceArguments(TrainingOptions):
    """Steps and seconds to given losses and Fréchet distances, by scaling (ScaleLong Fig. 5)."""

    every: int | None = None
    """Steps between looks at the loss."""
    sample_every: int | None = None
    """Steps between looks at the samples, a multiple of --every; at most the scale's where it is not given."""
    samples: int | None = None
    """Images that a Fréchet distance is of."""
    extractor: str | None = None
    """Network whose features are compared: auto (digits on digits, inception elsewhere), what evaluate takes, or none
    for the loss alone."""
    loss_levels: tuple[float, ...] = ()
    """Losses to reach; default: 1.25 times and 1.1 times what none of the same seed has at the end."""
    distance_levels: tuple[float, ...] = ()
    """Fréchet distances to reach; the same default."""


def convergence(arguments: ConvergenceArguments) -> "list[Task]":
    from scalelong_fast.analysis import analyze_convergence
    from scalelong_fast.analysis.convergence import SCALES

    own = ("every", "sample_every", "samples", "extractor", "loss_levels", "distance_levels")
    scale = SCALES[arguments.scale]
    steps = arguments.steps or scale.training.steps
    every = min(scale.every, steps) if arguments.every is None else arguments.every
    # The largest multiple of --every that fits; the last step is looked at in any case.
    sample_every = max(1, min(scale.sample_every, steps) // max(1, every)) * every
    settings = with_training(scale, arguments, *own, every=every, sample_every=sample_every)
    return [functools.partial(analyze_convergence, settings, workers=arguments.workers)]


ANALYSES = {
    "convergence": Analysis(
        "steps and seconds to given losses and Fréchet distances (Fig. 5)", ConvergenceArguments, convergence
    )
}

"""Analyses of networks that are watched in training: oscillation, robustness, kappa."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from scalelong_fast.cli.analyses.options import Analysis, TrainingOptions, with_training

if TYPE_CHECKING:
    from scalelong_fast.cli.analyses.options import Task


@dataclasses.dataclass(frozen=True)
class OscillationArguments(TrainingOptions):
    """How much features and gradients oscillate during training (ScaleLong Fig. 1 and 12)."""

    every: int | None = None
    """Steps between recordings."""


@dataclasses.dataclass(frozen=True)
class RobustnessArguments(TrainingOptions):
    """Loss and output of trained networks under extra noise at the input (ScaleLong Fig. 3c)."""

    levels: tuple[float, ...] = ()
    """Standard deviations of the extra noise, growing."""


@dataclasses.dataclass(frozen=True)
class LearntKappaArguments(TrainingOptions):
    """The κ_i that LS learns, beside the curves of CS (ScaleLong Fig. 7)."""

    runs: tuple[Path, ...] = ()
    """Folders of trained runs to look at, instead of training."""


def oscillation(arguments: OscillationArguments) -> "list[Task]":
    from scalelong_fast.analysis import analyze_oscillation
    from scalelong_fast.analysis.oscillation import SCALES

    return [functools.partial(analyze_oscillation, with_training(SCALES[arguments.scale], arguments, "every"))]


def robustness(arguments: RobustnessArguments) -> "list[Task]":
    from scalelong_fast.analysis import analyze_robustness
    from scalelong_fast.analysis.robustness import SCALES

    return [functools.partial(analyze_robustness, with_training(SCALES[arguments.scale], arguments, "levels"))]


def learnt_kappa(arguments: LearntKappaArguments) -> "list[Task]":
    from scalelong_fast.analysis import analyze_learnt_kappa
    from scalelong_fast.analysis.learnt_kappa import SCALES

    return [functools.partial(analyze_learnt_kappa, with_training(SCALES[arguments.scale], arguments, "runs"))]


ANALYSES = {
    "oscillation": Analysis(
        "features and gradients during training, by scaling (Fig. 1, 12)", OscillationArguments, oscillation
    ),
    "robustness": Analysis(
        "what extra input noise does to trained networks (Fig. 3c)", RobustnessArguments, robustness
    ),
    "kappa": Analysis("the κ_i that LS learns, beside CS (Fig. 7)", LearntKappaArguments, learnt_kappa),
}

"""Analyses of networks that are watched in training: oscillation, robustness, kappa."""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from scalelong_fast.cli.analyses.options import Analysis, TrainingOptions, given, with_training
from scalelong_fast.errors import invalid

if TYPE_CHECKING:
    from scalelong_fast.cli.analyses.options import Task


@dataclasses.dataclass(frozen=True)
class OscillationArguments(TrainingOptions):
    """How much features and gradients oscillate during training (ScaleLong Fig. 1 and 12): of a U-ViT or UNet, and of
    matrix UNets (Eq. 3), which are what the theorems are about."""

    preset: str | None = None
    """Training preset that gives network, data and optimiser, or matrix for matrix UNets on digits; without one
    digits-uvit and matrix, one after the other."""
    every: int | None = None
    """Steps between recordings."""
    learning_rate: float | None = None
    """Learning rate after the warm-up. Default: with a training preset its own, 1e-3 of matrix UNets; where no preset
    is given, 2e-4 of digits-uvit, the rate published with U-ViT."""
    warmup: int | None = None
    """Steps of warm-up. Default: with a training preset a tenth of the steps, else none."""
    block_depth: int | None = None
    """Matrices in a block of matrix UNets; 1 makes them linear."""


@dataclasses.dataclass(frozen=True)
class RobustnessArguments(TrainingOptions):
    """Loss and output of trained networks under extra noise at the input (ScaleLong Fig. 3c)."""

    levels: tuple[float, ...] = ()
    """Standard deviations of the extra noise, growing."""


@dataclasses.dataclass(frozen=True)
class LearntKappaArguments(TrainingOptions):
    """The κ_i that LS learns, beside the curves of CS (ScaleLong Fig. 7)."""

    scalings: tuple[str, ...] = ()
    """ls, ls-individual or both."""
    kappa: float | None = None
    """Not taken: LS learns its own."""
    runs: tuple[Path, ...] = ()
    """Folders of trained runs to look at, instead of training; takes none of the other options but --out."""


#: What stands for matrix UNets in the place of a preset.
MATRIX = "matrix"
#: Options of oscillation that its settings have beside the training's.
WATCHED = ("every", "learning_rate", "warmup")


def oscillation(arguments: OscillationArguments) -> "list[Task]":
    from scalelong_fast.analysis import analyze_oscillation, oscillation_matrix
    from scalelong_fast.analysis.oscillation import SCALES

    found = []
    if arguments.preset in (None, MATRIX):
        for name in ("data", "path"):
            if (value := getattr(arguments, name)) is not None:
                raise invalid(f"--{name}", str(value), "none for matrix UNets, which learn digits", "Name a --preset.")
    if arguments.preset != MATRIX:
        if arguments.preset is not None and arguments.block_depth is not None:
            raise invalid("--block-depth", arguments.block_depth, f"none for {arguments.preset}", "It is of matrix.")
        own = SCALES[arguments.scale]
        if arguments.preset is not None:  # the scale's rate is one for its own preset
            own = dataclasses.replace(own, learning_rate=None, warmup=None)
        named = dataclasses.replace(arguments, preset=arguments.preset or own.training.preset)
        every = min(own.every, max(1, (arguments.steps or own.training.steps) // 4))
        found.append(with_training(own, named, *WATCHED, every=every))
    if arguments.preset in (None, MATRIX):
        own = oscillation_matrix.SCALES[arguments.scale]
        changes = given(arguments, "scalings", "kappa", "depth", "block_depth", "steps", "batch_size", "seeds")
        training = dataclasses.replace(own.training, **changes)
        every = min(own.every, max(1, training.steps // 4))
        own = dataclasses.replace(own, training=training, **{"every": every, **given(arguments, *WATCHED)})
        found.append(own)
    return [functools.partial(analyze_oscillation, settings, workers=arguments.workers) for settings in found]


def robustness(arguments: RobustnessArguments) -> "list[Task]":
    from scalelong_fast.analysis import analyze_robustness
    from scalelong_fast.analysis.robustness import SCALES

    settings = with_training(SCALES[arguments.scale], arguments, "levels")
    return [functools.partial(analyze_robustness, settings, workers=arguments.workers)]


def learnt_kappa(arguments: LearntKappaArguments) -> "list[Task]":
    from scalelong_fast.analysis import analyze_learnt_kappa
    from scalelong_fast.analysis.learnt_kappa import SCALES

    if arguments.runs:
        _refuse_training(arguments)
    if arguments.kappa is not None:
        raise invalid("--kappa", arguments.kappa, "none, since LS learns its own")
    own = SCALES[arguments.scale]
    recordings = min(own.recordings, arguments.steps or own.training.steps)
    settings = with_training(own, arguments, "runs", recordings=recordings)
    return [functools.partial(analyze_learnt_kappa, settings, workers=arguments.workers)]


def _refuse_training(arguments: LearntKappaArguments) -> None:
    """Raise where finished runs are looked at, and an option of networks to train was given all the same."""
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if field.name not in ("runs", "out") and value != field.default:
            raise invalid(
                f"--{field.name.replace('_', '-')}", value, "none with --runs", "It is of networks that are trained."
            )


ANALYSES = {
    "oscillation": Analysis(
        "features and gradients during training, by scaling (Fig. 1, 12)", OscillationArguments, oscillation
    ),
    "robustness": Analysis(
        "what extra input noise does to trained networks (Fig. 3c)", RobustnessArguments, robustness
    ),
    "kappa": Analysis("the κ_i that LS learns, beside CS (Fig. 7)", LearntKappaArguments, learnt_kappa),
}

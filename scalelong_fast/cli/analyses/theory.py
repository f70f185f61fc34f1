"""Analyses of matrix UNets: bounds."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from scalelong_fast.cli.analyses.options import Analysis, Common, given

if TYPE_CHECKING:
    from scalelong_fast.cli.analyses.options import Task


@dataclasses.dataclass(frozen=True)
class BoundsArguments(Common):
    """Lemma 3.2; Theorems 3.1 and 3.3 over N, m, schedules of κ and two initialisations; Theorem 3.4 with the paper's
    bound and a rigorous one, through training (ScaleLong Fig. 11)."""

    skips: tuple[int, ...] = ()
    """The N's of Theorems 3.1 and 3.3."""
    widths: tuple[int, ...] = ()
    """The m's."""
    trials: int | None = None
    """Independent networks per N and m."""
    dataset: str = "digits"
    """Theorem 3.4: the data that matrix UNets learn to denoise."""
    path: Path | None = None
    """Where that lies."""
    img_size: int | None = None
    """Side in pixels that the images of a folder are resized to."""
    seeds: tuple[int, ...] = ()
    """Theorem 3.4: one network of each scaling per seed. The first is also that of the other checks."""


def bounds(arguments: BoundsArguments) -> "list[Task]":
    from scalelong_fast.analysis import analyze_lipschitz, check_bounds, lipschitz
    from scalelong_fast.analysis import bounds as norms

    own = dataclasses.replace(norms.SCALES[arguments.scale], **given(arguments, "skips", "widths", "trials"))
    if arguments.seeds:
        own = dataclasses.replace(own, seed=arguments.seeds[0])
    changes = given(arguments, "dataset", "path", "img_size", "seeds")
    theirs = dataclasses.replace(lipschitz.SCALES[arguments.scale], **changes)
    return [
        lambda units, progress: check_bounds(own, progress),
        lambda units, progress: analyze_lipschitz(theirs, units, progress),
    ]


ANALYSES = {
    "bounds": Analysis(
        "Lemma 3.2 and Theorems 3.1, 3.3 and 3.4 on the matrix UNet of Eq. 3 (Fig. 11)", BoundsArguments, bounds
    )
}

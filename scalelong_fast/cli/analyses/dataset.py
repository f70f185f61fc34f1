"""Analyses of a data set: noise, suggest-kappa."""

import dataclasses
from typing import TYPE_CHECKING, Any

from scalelong_fast.cli.analyses.options import Analysis, DatasetOptions, given
from scalelong_fast.errors import check_range

if TYPE_CHECKING:
    from scalelong_fast.cli.analyses.options import Task


@dataclasses.dataclass(frozen=True)
class NoiseArguments(DatasetOptions):
    """Distribution of ‖x_t‖² and ‖ε_t‖²/‖x_t‖² of a data set over time (ScaleLong Fig. 3a, b)."""


@dataclasses.dataclass(frozen=True)
class KappaRangeArguments(DatasetOptions):
    """The κ of CS that keeps Σκ_i² between the mean and the upper bound of ‖ε_t‖²/‖x_t‖² (ScaleLong §4.1)."""

    skips: int = 6
    """N, the number of long skips of the network; scalelong-fast models lists them."""

    def __post_init__(self) -> None:
        check_range("--skips", self.skips, low=2, integer=True)


def noise_settings(arguments: DatasetOptions, dataset: str) -> Any:
    """Settings of the analyses of a data set."""
    from scalelong_fast.analysis.noise import SCALES

    changes = given(arguments, "path", "img_size", "schedule", "samples", "upper", "seed")
    return dataclasses.replace(SCALES[arguments.scale], dataset=dataset, **changes)


def noise(arguments: NoiseArguments, dataset: str) -> "list[Task]":
    from scalelong_fast.analysis import analyze_noise

    settings = noise_settings(arguments, dataset)
    return [lambda units, progress: analyze_noise(settings, progress)]


def suggest_kappa(arguments: KappaRangeArguments, dataset: str) -> "list[Task]":
    from scalelong_fast.analysis import analyze_kappa_range

    settings = noise_settings(arguments, dataset)
    return [lambda units, progress: analyze_kappa_range(arguments.skips, settings, progress)]


ANALYSES = {
    "noise": Analysis("distribution of ‖x_t‖² and ‖ε_t‖²/‖x_t‖² of a data set (Fig. 3a, b)", NoiseArguments, noise),
    "suggest-kappa": Analysis(
        "the κ of CS for a data set and a number of long skips (§4.1)", KappaRangeArguments, suggest_kappa
    ),
}

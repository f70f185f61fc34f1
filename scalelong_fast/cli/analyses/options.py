"""Options that several analyses share, and how one of them becomes a command."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scalelong_fast.errors import check_range

if TYPE_CHECKING:  # analyses need scipy and more: only the one that is asked for is imported
    from scalelong_fast.analysis.finding import Finding
    from scalelong_fast.analysis.progress import Progress
    from scalelong_fast.analysis.units import Units

    #: One measurement, its settings checked: nothing is written before all are.
    Task = Callable[[Units, Progress], Finding]


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every analysis."""

    scale: Literal["smoke", "digits"] = "digits"
    """Sizes of everything that is not given: smoke (seconds to minutes, proves that it runs) or digits (minutes to
    hours on a laptop, shows something)."""
    out: Path = Path("runs/analysis")
    """Folder of the files, and of units/, from which an interrupted analysis goes on."""


@dataclasses.dataclass(frozen=True)
class DatasetOptions(Common):
    """Options of the analyses of a data set."""

    path: Path | None = None
    """Where the data lies: needed for folder and packed, optional for cifar10."""
    img_size: int | None = None
    """Side in pixels that the images of a folder are resized to."""
    schedule: str = "vpsde"
    """Noise process: vpsde, ddpm, cosine or stable-diffusion."""
    samples: int | None = None
    """Samples per time."""
    upper: float = 0.95
    """Quantile that counts as the upper bound."""
    seed: int = 0
    """Seed of everything random."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions(Common):
    """Options of the analyses that train networks."""

    preset: str = "digits-uvit"
    """Training preset that gives network, data and optimiser."""
    scalings: tuple[str, ...] = ()
    """Scalings to compare."""
    data: str | None = None
    """Data set in the place of the preset's, which the preset's network must fit."""
    path: Path | None = None
    """Where the data lies: needed for folder and packed, optional for cifar10."""
    kappa: float | None = None
    """Base κ of cs and cs-reversed. Networks are kept with it, so that another one trains those of the other scalings
    again."""
    depth: int | None = None
    """Depth of a U-ViT."""
    steps: int | None = None
    """Optimiser steps."""
    batch_size: int | None = None
    """Images a step."""
    seeds: tuple[int, ...] = ()
    """One network of each scaling per seed; bands are 95 % confidence intervals over them."""
    workers: int | None = None
    """Processes that share the networks out; default: one for each GPU or, without any, for each core."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_range("--workers", self.workers, low=1, integer=True)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A subcommand of ``scalelong-fast analyze``.

    Attributes:
        summary: a line for ``--help``.
        arguments: its options; for one of :class:`DatasetOptions` the data set comes first on the command line.
        tasks: makes its tasks of the options (and the data set).
    """

    summary: str
    arguments: type[Common]
    tasks: Callable[..., "list[Task]"]


def given(arguments: Any, *names: str) -> dict[str, Any]:
    """The options among ``names`` that were given; None and () stand for what the scale says."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None and value != ()}


def with_training(settings: Any, arguments: TrainingOptions, *names: str, **fitted: Any) -> Any:
    """``settings`` of a scale with what was given in the place of its own.

    Args:
        settings: of the scale.
        arguments: what was given.
        names: of the options that the settings have beside the training's.
        fitted: settings that the scale's own training had otherwise, where they are not given either.
    """
    from scalelong_fast.models import UNetConfig
    from scalelong_fast.training import get_preset

    names_of_training = ("preset", "data", "path", "scalings", "kappa", "depth", "steps", "batch_size", "seeds")
    changes = given(arguments, *names_of_training)
    if isinstance(get_preset(arguments.preset).model, UNetConfig):
        changes.setdefault("depth", None)
    training = dataclasses.replace(settings.training, **changes)
    return dataclasses.replace(settings, training=training, **{**fitted, **given(arguments, *names)})

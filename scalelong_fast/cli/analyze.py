"""``scalelong-fast analyze ANALYSIS``."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from scalelong_fast.cli.parse import parse
from scalelong_fast.errors import UserError, check_range, unknown_name

if TYPE_CHECKING:  # analyses need scipy and more: only the one that is asked for is imported
    from scalelong_fast.analysis.finding import Finding
    from scalelong_fast.analysis.progress import Progress
    from scalelong_fast.analysis.units import Units

    #: One measurement, its settings checked: nothing is written before all are.
    Task = Callable[[Units, Progress], Finding]

USAGE = """usage: scalelong-fast analyze ANALYSIS [options]

The paper's figures and theorems, measured: each writes a JSON file, a figure (PNG, SVG) and says what it shows.

analyses:
{analyses}

examples:
  scalelong-fast analyze suggest-kappa digits --skips 6
  scalelong-fast analyze oscillation --scale smoke
  scalelong-fast analyze oscillation --preset cifar10-uvit --depth 16 --steps 2000 --batch-size 16 --seeds 0 1 2
  scalelong-fast analyze kappa --runs runs/digits-uvit

Options of an analysis: scalelong-fast analyze ANALYSIS --help
"""

#: Analyses and what they do.
ANALYSES = {
    "bounds": "Lemma 3.2 and Theorems 3.1, 3.3 and 3.4 on the matrix UNet of Eq. 3 (Fig. 11)",
    "noise": "distribution of ‖x_t‖² and ‖ε_t‖²/‖x_t‖² of a data set (Fig. 3a, b)",
    "suggest-kappa": "the κ of CS for a data set and a number of long skips (§4.1)",
    "oscillation": "features and gradients during training, by scaling (Fig. 1, 12)",
    "robustness": "what extra input noise does to trained networks (Fig. 3c)",
    "kappa": "the κ_i that LS learns, beside CS (Fig. 7)",
}


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
class NoiseArguments(DatasetOptions):
    """Distribution of ‖x_t‖² and ‖ε_t‖²/‖x_t‖² of a data set over time (ScaleLong Fig. 3a, b)."""


@dataclasses.dataclass(frozen=True)
class KappaRangeArguments(DatasetOptions):
    """The κ of CS that keeps Σκ_i² between the mean and the upper bound of ‖ε_t‖²/‖x_t‖² (ScaleLong §4.1)."""

    skips: int = 6
    """N, the number of long skips of the network; scalelong-fast models lists them."""

    def __post_init__(self) -> None:
        check_range("--skips", self.skips, low=2, integer=True)


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


@dataclasses.dataclass(frozen=True)
class TrainingOptions(Common):
    """Options of the analyses that train networks."""

    preset: str = "digits-uvit"
    """Training preset that gives network, data and optimiser."""
    scalings: tuple[str, ...] = ()
    """Scalings to compare."""
    kappa: float | None = None
    """Base κ of cs and cs-reversed."""
    depth: int | None = None
    """Depth of a U-ViT."""
    steps: int | None = None
    """Optimiser steps."""
    batch_size: int | None = None
    """Images a step."""
    seeds: tuple[int, ...] = ()
    """One network of each scaling per seed; bands are 95 % confidence intervals over them."""


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


def given(arguments: Any, *names: str) -> dict[str, Any]:
    """The options among ``names`` that were given; None and () stand for what the scale says."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None and value != ()}


def with_training(settings: Any, arguments: TrainingOptions, *names: str) -> Any:
    """``settings`` of a scale with what was given in the place of its own."""
    from scalelong_fast.models import UNetConfig
    from scalelong_fast.training import get_preset

    changes = given(arguments, "preset", "scalings", "kappa", "depth", "steps", "batch_size", "seeds")
    if isinstance(get_preset(arguments.preset).model, UNetConfig):
        changes.setdefault("depth", None)
    training = dataclasses.replace(settings.training, **changes)
    return dataclasses.replace(settings, training=training, **given(arguments, *names))


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


#: Options of each analysis and what makes its tasks of them; the first two take the data set as well.
_TASKS: dict[str, tuple[type[Common], Callable[..., "list[Task]"]]] = {
    "noise": (NoiseArguments, noise),
    "suggest-kappa": (KappaRangeArguments, suggest_kappa),
    "bounds": (BoundsArguments, bounds),
    "oscillation": (OscillationArguments, oscillation),
    "robustness": (RobustnessArguments, robustness),
    "kappa": (LearntKappaArguments, learnt_kappa),
}


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(analyses="\n".join(f"  {name:<13}  {text}" for name, text in ANALYSES.items())))
        return 0 if args else 2
    name, *rest = args
    if name not in _TASKS:
        raise unknown_name("ANALYSIS", name, _TASKS)
    cls, make_tasks = _TASKS[name]
    prog = f"scalelong-fast analyze {name}"
    positional: list[str] = []
    if issubclass(cls, DatasetOptions):
        prog += " DATASET"
        if not {"-h", "--help"} & set(rest):
            if not rest or rest[0].startswith("-"):
                raise UserError(f"DATASET: expected the data set first, e.g. scalelong-fast analyze {name} digits.")
            positional = [rest.pop(0)]
    arguments = parse(cls, rest, prog)
    run_tasks(name, make_tasks(arguments, *positional), arguments.out)
    return 0


def run_tasks(name: str, tasks: "list[Task]", out: Path) -> None:
    """Run the tasks one after the other, each result written and said as soon as it is there."""
    from scalelong_fast.analysis.finding import open_folder, write_finding
    from scalelong_fast.analysis.progress import rich_progress
    from scalelong_fast.analysis.units import Units

    console = Console()
    open_folder(out)
    for task in tasks:
        with rich_progress(name) as progress:
            finding = task(Units(out / "units"), progress)
        paths = write_finding(finding, out)
        console.print(finding.sentence, highlight=False, soft_wrap=True, markup=False)
        console.print(f"Written: {', '.join(map(str, paths))}", highlight=False, soft_wrap=True, markup=False)

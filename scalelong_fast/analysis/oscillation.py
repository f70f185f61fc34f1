"""How much features and gradients oscillate during training (ScaleLong Fig. 1 and 12)."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scalelong_fast.analysis.finding import Finding
from scalelong_fast.analysis.matrix_training import MatrixTraining
from scalelong_fast.analysis.networks import train_each
from scalelong_fast.analysis.oscillation_figure import draw_oscillation
from scalelong_fast.analysis.oscillation_records import Record, record_matrices, record_network
from scalelong_fast.analysis.paired import less_none
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.statistics import Band, band
from scalelong_fast.analysis.training import Training
from scalelong_fast.analysis.units import Units
from scalelong_fast.errors import check_range

#: Share of the recordings left out at the start, where everything changes fast whatever the scaling.
BURN_IN = 0.2

#: Of matrix UNets, where none is given.
MATRIX_LEARNING_RATE = 1e-3

#: What oscillates.
RECORDED = ("features", "batch features", "gradients")
#: Each index by name: the recorded norms, and whether changes count relative to the norm's own size.
SERIES = {f"{size}{what}": (what, not size) for size in ("", "absolute ") for what in RECORDED}


@dataclass(frozen=True)
class OscillationSettings:
    """What is trained, and how often it is looked at.

    Attributes:
        training: the networks.
        every: steps between recordings.
        learning_rate: after the warm-up; None: the preset's, 1e-3 of matrix UNets.
        warmup: steps over which the learning rate grows; None: a tenth of the steps.
    """

    training: Training | MatrixTraining = field(default_factory=Training)
    every: int = 5
    learning_rate: float | None = None
    warmup: int | None = None

    def __post_init__(self) -> None:
        steps = self.training.steps
        check_range("--every", self.every, low=1, high=max(1, steps // 4), integer=True)
        if self.learning_rate is not None:
            check_range("--learning-rate", self.learning_rate, low=0, low_open=True)
        if self.warmup is not None:
            check_range("--warmup", self.warmup, low=0, high=steps, integer=True)

    @property
    def warmup_steps(self) -> int:
        return self.training.steps // 10 if self.warmup is None else self.warmup

    @property
    def rate(self) -> float:
        """The learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        own = self.training
        return own.config("none", 0).train.lr if isinstance(own, Training) else MATRIX_LEARNING_RATE


#: With U-ViT's learning rate, and from the first step: at the beginning κ alone makes the difference.
SCALES = {
    "smoke": OscillationSettings(Training(steps=40, seeds=(0, 1)), every=2, learning_rate=2e-4, warmup=0),
    "digits": OscillationSettings(Training(steps=300, seeds=tuple(range(8))), learning_rate=2e-4, warmup=0),
}


def oscillation_index(norms: Sequence[float], relative: bool = True) -> float:
    """Root mean square of the change of log‖h‖ from one recording to the next, after the burn-in.

    A slow drift hardly counts, however far it goes; an up and down of 10 % at every recording gives about 0.1, whatever
    the size of the norm.

    Args:
        norms: positive, one per recording, at least three after the burn-in.
        relative: False: of the change of ‖h‖ itself, as the ranges of Theorem 3.1 are.
    """
    kept = norms[int(BURN_IN * len(norms)) :]
    pairs = itertools.pairwise(kept)
    changes = [math.log(after / before) if relative else after - before for before, after in pairs]
    return math.sqrt(sum(change**2 for change in changes) / len(changes))


def record(settings: OscillationSettings, scaling: str, seed: int) -> Record:
    """Train one network and record it; see :data:`~scalelong_fast.analysis.oscillation_records.Record`.

    Raises:
        DivergedError: the training broke.
    """
    training, rate, warmup = settings.training, settings.rate, settings.warmup_steps
    if isinstance(training, MatrixTraining):
        return record_matrices(training, scaling, seed, rate, warmup, settings.every)
    config = training.config(scaling, seed)
    train = dataclasses.replace(config.train, lr=rate, warmup_steps=warmup)
    return record_network(dataclasses.replace(config, train=train), settings.every)


def analyze_oscillation(
    settings: OscillationSettings | None = None,
    units: Units | None = None,
    progress: Progress = silent,
    workers: int | None = 1,
) -> Finding:
    """Train a network of each scaling and seed, and compare how much they oscillate.

    Args:
        settings: what to train.
        units: keeps what each network gave.
        progress: told about each network.
        workers: processes, see :func:`~scalelong_fast.analysis.sweep.run_jobs`.

    Raises:
        UserError: networks diverged.
    """
    settings, units = settings or OscillationSettings(), units or Units()
    training = settings.training
    matrices = isinstance(training, MatrixTraining)
    mend = f"Choose other --seeds or --scalings, a smaller --learning-rate{' or --block-depth 1' if matrices else ''}."
    compute = functools.partial(record, settings)
    records: dict[str, list[Record]] = train_each(training, _key(settings), compute, units, progress, workers, mend)
    indices = {
        what: {scaling: _indices(found, *series) for scaling, found in records.items()}
        for what, series in SERIES.items()
    }
    bands = {what: {s: band(values) for s, values in by_scaling.items()} for what, by_scaling in indices.items()}
    differences = {what: less_none(by_scaling) for what, by_scaling in indices.items()}
    sizes = {
        what: {scaling: band([_size(entry[what]) for entry in found]) for scaling, found in records.items()}
        for what in RECORDED
    }
    losses = {scaling: band([entry["loss"] for entry in found]) for scaling, found in records.items()}
    return Finding(
        "oscillation-matrix" if matrices else "oscillation",
        "ScaleLong Theorems 3.1 and 3.3, Fig. 1 and 12" if matrices else "ScaleLong Fig. 1 and 12",
        _sentence(settings, bands, differences, losses),
        asdict(settings),
        {
            "index": indices,
            "bands": {what: {s: b.as_dict() for s, b in found.items()} for what, found in bands.items()},
            "differences": {what: {s: b.as_dict() for s, b in found.items()} for what, found in differences.items()},
            "size": {what: {s: b.as_dict() for s, b in found.items()} for what, found in sizes.items()},
            "loss": {s: b.as_dict() for s, b in losses.items()},
            "records": records,
        },
        lambda figure: draw_oscillation(figure, records, bands),
        _table(bands, sizes, losses),
    )


def _key(settings: OscillationSettings) -> dict[str, Any]:
    training = settings.training.key()
    kind = "oscillation-matrix" if isinstance(settings.training, MatrixTraining) else "oscillation"
    how = {"every": settings.every, "learning_rate": settings.rate, "warmup": settings.warmup_steps}
    return {"analysis": kind, **training, **how}


def _indices(records: list[Record], what: str, relative: bool) -> list[float]:
    """Index of each seed's network, averaged over its blocks."""
    found = []
    for entry in records:
        by_block = list(zip(*entry[what], strict=True))
        found.append(sum(oscillation_index(norms, relative) for norms in by_block) / len(by_block))
    return found


def _size(recorded: list[list[float]]) -> float:
    """Mean of the norms that count for the index, over blocks and recordings."""
    kept = recorded[int(BURN_IN * len(recorded)) :]
    return sum(map(sum, kept)) / sum(map(len, kept))


def _sentence(
    settings: OscillationSettings,
    bands: dict[str, dict[str, Band]],
    differences: dict[str, dict[str, Band]],
    losses: dict[str, Band],
) -> str:
    training = settings.training
    depth = f"depth {training.depth}, " if training.depth else ""
    name = training.name if isinstance(training, Training) else "matrix UNet"
    warmup = f"{settings.warmup_steps} of them warm-up" if settings.warmup_steps else "no warm-up"
    missed = ", ".join(f"{b.mean:.3f} ({scaling})" for scaling, b in losses.items())
    head = (
        f"{name}, {depth}batch {training.batch_size}, {training.steps} steps, {warmup}, learning rate "
        f"{settings.rate:g}, {len(training.seeds)} seeds (ScaleLong Fig. 1 and 12)"
    )
    if "none" not in training.scalings:
        listed = (_listed(what, ((s, b.mean) for s, b in found.items())) for what, found in bands.items())
        return f"{head}: oscillation index {'; '.join(listed)}. Loss at the end {missed}."
    # verdict -> series -> (scaling, times the index of none)
    verdicts: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for what, found in bands.items():
        for scaling in (name for name in training.scalings if name in ("cs", "ls")):
            verdict = _compare(found[scaling], found["none"], differences[what][scaling])
            times = found[scaling].mean / found["none"].mean
            verdicts.setdefault(verdict, {}).setdefault(what, []).append((scaling, times))
    told = [
        f"{verdict}: {', '.join(_listed(what, times, ' times') for what, times in those.items())}"
        for verdict, those in verdicts.items()
    ]
    compared = f": oscillation index against none, {'; '.join(told)}" if told else ""
    return f"{head}{compared}. Loss at the end {missed}."


def _listed(what: str, numbers: Iterable[tuple[str, float]], unit: str = "") -> str:
    """``features of cs (0.83 times) and of ls (0.71 times)``."""
    return f"{what} " + " and ".join(f"of {scaling} ({number:.3g}{unit})" for scaling, number in numbers)


def _compare(own: Band, none: Band, difference: Band) -> str:
    """In words; a difference is one of bands that do not overlap or, less strictly, of pairs of equal seeds."""
    if own.count < 2:
        return "of one seed, which shows nothing"
    word = "less" if difference.mean < 0 else "more"
    if not own.overlaps(none):
        return f"{word} (95 % bands do not overlap)"
    if difference.low > 0 or difference.high < 0:
        return f"{word} seed by seed, although the 95 % bands overlap"
    return "no difference shown (95 % bands overlap, and that of the differences seed by seed holds 0)"


def _table(bands: dict[str, dict[str, Band]], sizes: dict[str, dict[str, Band]], losses: dict[str, Band]) -> str:
    """Every index of every scaling as Markdown, with the sizes and the loss below."""
    scalings = list(losses)
    rows = [("oscillation index, mean [95 % band]", *scalings), ("---", *("---:" for _ in scalings))]
    below = {**{f"size of {what}": found for what, found in sizes.items()}, "loss at the end": losses}
    for what, found in {**bands, **below}.items():
        rows.append((what, *(f"{found[s].mean:.3g} [{found[s].low:.3g}, {found[s].high:.3g}]" for s in scalings)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)

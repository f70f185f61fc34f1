"""How much features and gradients oscillate during training (ScaleLong Fig. 1 and 12)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scalelong_fast.analysis.finding import Finding
from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.statistics import Band, band
from scalelong_fast.analysis.training import Training, Watched, train_watched, watched_blocks
from scalelong_fast.analysis.units import Units
from scalelong_fast.errors import check_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Share of the recordings left out at the start, where everything changes fast whatever the scaling.
BURN_IN = 0.2

#: What oscillates, by name: the recorded norms, and whether changes count relative to the norm's own size.
SERIES = {"features": ("features", True), "gradients": ("gradients", True), "absolute features": ("features", False)}


@dataclass(frozen=True)
class OscillationSettings:
    """What is trained, and how often it is looked at.

    Attributes:
        training: the networks.
        every: steps between recordings.
    """

    training: Training = field(default_factory=Training)
    every: int = 5

    def __post_init__(self) -> None:
        check_range("--every", self.every, low=1, high=max(1, self.training.steps // 4), integer=True)


SCALES = {
    "smoke": OscillationSettings(Training(depth=12, steps=40, seeds=(0, 1)), every=2),
    "digits": OscillationSettings(),
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


def record(settings: OscillationSettings, scaling: str, seed: int) -> dict[str, list[list[float]]]:
    """Train one network and record it.

    Returns:
        ``features``: root mean square of each decoder block's output on the probe batch, per recording and block (the
        first block to run first: i = N … 1); ``gradients``: norm of the gradient of each block's parameters in the
        training step; ``steps``.
    """
    features: list[list[float]] = []
    gradients: list[list[float]] = []
    steps: list[int] = []

    def observe(watched: Watched) -> None:
        if watched.step:
            features.append(block_features(watched))
            gradients.append(watched.gradients)
            steps.append(watched.step)

    train_watched(settings.training.config(scaling, seed), observe, settings.every)
    return {"features": features, "gradients": gradients, "steps": steps}


def block_features(watched: Watched) -> list[float]:
    """Root mean square of the outputs of the decoder's blocks on the probe batch."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out.detach().float().square().mean().sqrt()))
        for block in watched_blocks(watched.model)
    ]
    try:
        watched.predict()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).double().tolist()


def analyze_oscillation(
    settings: OscillationSettings | None = None, units: Units | None = None, progress: Progress = silent
) -> Finding:
    """Train a network of each scaling and seed, and compare how much they oscillate.

    Args:
        settings: what to train.
        units: keeps what each network gave.
        progress: told after each network.
    """
    settings, units = settings or OscillationSettings(), units or Units()
    training = settings.training
    jobs = [(scaling, seed) for scaling in training.scalings for seed in training.seeds]
    records: dict[str, list[dict[str, Any]]] = {scaling: [] for scaling in training.scalings}
    for done, (scaling, seed) in enumerate(jobs):
        progress(done, len(jobs), f"{scaling}, seed {seed}")
        key = _key(settings, scaling, seed)
        records[scaling].append(units.get(key, lambda s=scaling, n=seed: record(settings, s, n)))
    indices = {
        what: {scaling: _indices(found, *series) for scaling, found in records.items()}
        for what, series in SERIES.items()
    }
    bands = {what: {s: band(values) for s, values in by_scaling.items()} for what, by_scaling in indices.items()}
    differences = {what: _differences(by_scaling) for what, by_scaling in indices.items()}
    return Finding(
        "oscillation",
        "ScaleLong Fig. 1 and 12",
        _sentence(settings, bands, differences),
        asdict(settings),
        {
            "index": indices,
            "bands": {what: {s: b.as_dict() for s, b in found.items()} for what, found in bands.items()},
            "differences": {what: {s: b.as_dict() for s, b in found.items()} for what, found in differences.items()},
            "records": records,
        },
        lambda figure: _draw(figure, records, bands),
    )


def _key(settings: OscillationSettings, scaling: str, seed: int) -> dict[str, Any]:
    training = asdict(settings.training)
    del training["scalings"], training["seeds"]
    return {"analysis": "oscillation", **training, "every": settings.every, "scaling": scaling, "seed": seed}


def _indices(records: list[dict[str, Any]], what: str, relative: bool) -> list[float]:
    """Index of each seed's network, averaged over its blocks."""
    found = []
    for entry in records:
        by_block = list(zip(*entry[what], strict=True))
        found.append(sum(oscillation_index(norms, relative) for norms in by_block) / len(by_block))
    return found


def _differences(by_scaling: dict[str, list[float]]) -> dict[str, Band]:
    """Index of each scaling less that of ``none``, seed by seed: equal seeds see equal batches."""
    none = by_scaling.get("none")
    if none is None:
        return {}
    pairs = {scaling: zip(own, none, strict=True) for scaling, own in by_scaling.items() if scaling != "none"}
    return {scaling: band([own - other for own, other in pair]) for scaling, pair in pairs.items()}


def _sentence(
    settings: OscillationSettings, bands: dict[str, dict[str, Band]], differences: dict[str, dict[str, Band]]
) -> str:
    training = settings.training
    depth = f"depth {training.depth}, " if training.depth else ""
    listed = [
        f"of {what} " + ", ".join(f"{b.mean:.3f} ({scaling})" for scaling, b in found.items())
        for what, found in bands.items()
    ]
    head = (
        f"{training.preset}, {depth}batch {training.batch_size}, {training.steps} steps, {len(training.seeds)} seeds: "
        f"oscillation index {'; '.join(listed)} (ScaleLong Fig. 1 and 12)."
    )
    if "none" not in training.scalings:
        return head
    verdicts: dict[str, list[str]] = {}
    for what, found in bands.items():
        for scaling in (name for name in training.scalings if name in ("cs", "ls")):
            verdict = _compare(found[scaling], found["none"], differences[what][scaling])
            verdicts.setdefault(verdict, []).append(f"{what} of {scaling}")
    compared = "; ".join(f"{verdict}: {', '.join(those)}" for verdict, those in verdicts.items())
    return f"{head} Against none, {compared}." if verdicts else head


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


def _draw(figure: "Figure", records: dict[str, list[dict[str, Any]]], bands: dict[str, dict[str, Band]]) -> None:
    curves, bars = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for scaling, found in records.items():
        # The last block of the decoder, of the first seed: where all levels have had their say.
        curves.plot(found[0]["steps"], [row[-1] for row in found[0]["features"]], linewidth=1, label=scaling)
    curves.set_xlabel("step")
    curves.set_ylabel("root mean square of the last block's output")
    curves.set_yscale("log")
    curves.legend()
    for offset, (what, by_scaling) in enumerate(bands.items()):
        places = [number + 0.27 * offset for number in range(len(by_scaling))]
        errors = [b.mean - b.low for b in by_scaling.values()]
        bars.bar(places, [b.mean for b in by_scaling.values()], 0.27, yerr=errors, capsize=3, label=what)
    bars.set_xticks([number + 0.27 for number in range(len(records))], list(records))
    bars.set_ylabel("oscillation index, mean and 95 % band")
    bars.legend()
    figure.suptitle("Oscillation during training (ScaleLong Fig. 1 and 12)")

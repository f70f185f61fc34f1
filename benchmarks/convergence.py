"""``python -m benchmarks convergence``: loss by time: the scalings' factor in steps times ours in throughput.

Steps to a loss come from the trainings of ``scalelong-fast analyze convergence``; steps are timed apart from that, all
scalings and ways to compute them in turns, and a short training by each of them sees that the losses are the same.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, uvit
from benchmarks.command import add_device, add_out, device_of, finish
from benchmarks.convergence_settings import Settings, chosen_settings, default_settings
from benchmarks.kept import kept_records, merge
from benchmarks.model_check import LossMismatchError
from benchmarks.model_steps import Measured, measure
from benchmarks.report_convergence import BASELINE, convergence_rows
from benchmarks.screen import Screen
from benchmarks.step_calls import WARM_UP_STEPS
from benchmarks.uvit import Recipe
from benchmarks.variants import STEP_SOURCES
from scalelong_fast.analysis import Units
from scalelong_fast.analysis.convergence import SCALES, train_all
from scalelong_fast.analysis.convergence_levels import Level, Reached, compare_levels
from scalelong_fast.analysis.learning_curve import learning_curve
from scalelong_fast.data.optional import import_optional
from scalelong_fast.errors import check_range, invalid
from scalelong_fast.training import TrainConfig
from scalelong_fast.training.checkpoint import write_json

#: Ways to compute a step; ``eager`` is plain PyTorch, whose step without scaling is what all are set against.
KINDS = ("eager", "ours", "ours_compile", "authors")
#: Steps of the trainings by which plain and fused losses are compared, how much of themselves these may differ by, and
#: the share of a budget for training.
CHECK_STEPS, TOLERANCE, TRAINING_SHARE = 20, 2e-2, 0.5
#: The level: what ``none`` of the same seed has at the end, times this.
LEVEL = Level("loss", 1.1, relative=True)

_OWN = (
    "benchmarks/convergence.py",
    "benchmarks/convergence_settings.py",
    "scalelong_fast/analysis/convergence_levels.py",
    "scalelong_fast/analysis/learning_curve.py",
    *STEP_SOURCES,
)


class Bench(uvit.Bench):
    """Recipes in the precision that the trainings have."""

    def _train(self, compiled: bool) -> TrainConfig:
        return dataclasses.replace(super()._train(compiled), precision="auto-gpu")


def recipes(scalings: Sequence[str]) -> dict[str, Recipe]:
    """Ways to take a step of each scaling, by name."""
    return {
        f"{kind}_{scaling}": Recipe(scaling, fused, compiled)
        for scaling in scalings
        for kind, (fused, compiled) in uvit.KINDS.items()
        if kind in KINDS
    }


def recipe_sources(recipe: Recipe) -> tuple[str, ...]:
    """Files that a record depends on, relative to the repository."""
    return tuple(sorted({*uvit.recipe_sources(recipe), *_OWN}))


def able(bench: Any, recipe: Recipe) -> bool:
    """Whether a recipe can be built; the authors' has no uniform scaling."""
    return uvit.SUITE.able(bench, recipe) and not (recipe.fused is None and recipe.scaling not in ("none", "cs", "ls"))


def loss_gap(settings: Settings, scaling: str) -> float:
    """Largest relative difference between the losses of a plain and a fused training, over :data:`CHECK_STEPS`."""
    config = settings.config(scaling, settings.training.seeds[0])
    steps = min(CHECK_STEPS, config.train.steps)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    losses = [
        learning_curve(
            dataclasses.replace(config, model=dataclasses.replace(config.model, fused=fused)),
            every=max(1, steps // 4),
            probe_size=settings.probe,
        )["losses"]
        for fused in (False, True)
    ]
    return max(abs(fused - plain) / plain for plain, fused in zip(*losses, strict=True))


def train_by_seed(
    settings: Settings, units: Units, workers: int | None, end: float, screen: Screen
) -> dict[str, list[dict[str, list[float]]]]:
    """The curves of all scalings, seed by seed as long as time is left: a further seed takes as long as the last."""
    curves: dict[str, list[dict[str, list[float]]]] = {scaling: [] for scaling in settings.training.scalings}
    for number, seed in enumerate(settings.training.seeds):
        start = time.perf_counter()
        training = dataclasses.replace(settings.training, seeds=(seed,))
        found = train_all(dataclasses.replace(settings, training=training), units, workers=workers)
        for scaling, (curve,) in found.items():
            curves[scaling].append(curve)
        took = time.perf_counter() - start
        screen.print(f"seed {seed}: {len(found)} networks trained in {took:.0f} s")
        left = len(settings.training.seeds) - number - 1
        if left and time.perf_counter() + took > end:
            screen.print(f"Time is up; seeds not trained: {left}.")
            break
    return curves


def complete(measured: Measured, reached: Reached, gaps: Mapping[str, float]) -> list[dict[str, Any]]:
    """The records of the timing with what the trainings add to them.

    The trainings have our optimiser and averages. Of the authors' recipe, which has its own, only the throughput is
    known; and the losses of plain and fused trainings are compared where nothing is compiled.
    """
    times = {record["variant"]: record["median_us"] for record in measured.records}
    records = []
    for record in measured.records:
        scaling = record["scaling"]
        kind = record["variant"].removesuffix(f"_{scaling}")
        own, trained = reached.steps[scaling], kind != "authors"
        steps = statistics.fmean(own) if trained and None not in own else None
        band = reached.factors[scaling] if trained and scaling != "none" else None
        in_steps = None if band is None else band.mean
        if scaling == "none" and steps is not None:
            in_steps = 1.0
        throughput = times[BASELINE] / record["median_us"] if BASELINE in times else None
        records.append(
            {
                **{key: value for key, value in record.items() if key not in ("sources", "source_sha256")},
                "loss_gap": gaps[scaling] if kind in ("eager", "ours") else None,
                "seeds": len(own),
                "steps_to_level": steps,
                "seconds_to_level": None if steps is None else round(steps * record["median_us"] / 1e6, 3),
                "factor_steps": in_steps,
                "factor_steps_band": None if band is None or band.count < 2 else [band.low, band.high],
                "factor_throughput": None if throughput is None else round(throughput, 4),
                "factor": None if throughput is None or in_steps is None else round(throughput * in_steps, 4),
                "sources": record["sources"],
                "source_sha256": record["source_sha256"],
            }
        )
    return records


def trained_settings(settings: Settings) -> dict[str, Any]:
    """What is trained, and to which loss, JSON-ready."""
    config = settings.config(settings.training.scalings[0], settings.training.seeds[0])
    return {
        "preset": settings.training.preset,
        "data": config.data.name,
        "steps": settings.training.steps,
        "depth": config.model.depth,
        "batch_size": config.train.batch_size,
        "level": LEVEL.describe(),
        "check_steps": min(CHECK_STEPS, settings.training.steps),
    }


def other_settings(path: Path, own: Mapping[str, Any]) -> list[str]:
    """What the trainings in a result file have otherwise, as words; empty where there is no such file."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["settings"]
        return [f"{key} {old.get(key)}, not {value}" for key, value in own.items() if old.get(key) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def run(
    settings: Settings,
    device: torch.device,
    *,
    rounds: int,
    compiled: bool,
    seconds: float,
    screen: Screen,
    units: Units,
    workers: int | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Train, check and time.

    Returns:
        The result file's content but for the environment, without records where one recipe computes another loss than
        the plain model, and a line for each recipe that failed.
    """
    begun = time.perf_counter()
    curves = train_by_seed(settings, units, workers, begun + TRAINING_SHARE * seconds, screen)
    gaps = {scaling: loss_gap(settings, scaling) for scaling in settings.training.scalings}
    faults = [
        f"{scaling}: plain and fused losses differ by {gap:.2g}, more than {TOLERANCE:g} of themselves"
        for scaling, gap in gaps.items()
        if not gap < TOLERANCE
    ]
    config = settings.config(settings.training.scalings[0], settings.training.seeds[0])
    own = recipes(settings.training.scalings)
    suite = dataclasses.replace(uvit.SUITE, recipes=own, bench=Bench, able=able, sources=recipe_sources)
    gpu = device.type == "cuda"
    limits = environment.ceilings(device)
    try:
        measured = measure(
            suite,
            settings.training.preset,
            config.model,
            device,
            batch_size=config.train.batch_size,
            rounds=rounds,
            steps=5 if gpu else 2,
            compiled=compiled,
            names=list(own),
            screen=screen,
            seconds=max(0.0, seconds - (time.perf_counter() - begun)),
            limits=limits,
        )
    except LossMismatchError as error:  # the trainings are not lost for that
        measured = Measured([], limits, [str(error)])
    by_scaling = {s: [(curve["steps"], curve["losses"]) for curve in found] for s, found in curves.items()}
    reached = compare_levels(LEVEL, by_scaling, {})
    result = {
        "settings": {"rounds": rounds, "warm_up_steps": WARM_UP_STEPS, **trained_settings(settings)},
        "ceilings": measured.limits,
        "curves": {s: [{"steps": c["steps"], "losses": c["losses"]} for c in found] for s, found in curves.items()},
        "records": complete(measured, reached, gaps),
    }
    return result, [*faults, *measured.faults]


def main(args: Sequence[str], *, settings: Settings | None = None) -> int:
    """Run the command; returns the exit code. The keyword shrinks the benchmark for tests."""
    options = _parser().parse_args(args)
    device = device_of(options)
    check_range("--rounds", options.rounds, low=1, integer=True)
    check_range("--seconds", options.seconds, low=0)
    settings = chosen_settings(options, settings or default_settings(device))
    if len(settings.training.seeds) > 1:
        import_optional("scipy.stats")  # bands over seeds need it, after all the work
    screen = Screen(width=None if sys.stdout.isatty() else 170)
    where = environment.describe(device)
    path = options.out or environment.RESULTS / where["machine"] / "convergence.json"
    others = other_settings(path, trained_settings(settings))
    if others and options.out is None:
        mend = f"Give --out a file for these, or --out {path} to replace those."
        raise invalid("--out", None, f"a file, as {path} has other trainings ({'; '.join(others)})", mend)
    path.parent.mkdir(parents=True, exist_ok=True)
    result, faults = run(
        settings,
        device,
        rounds=options.rounds,
        compiled=options.compile,
        seconds=options.seconds,
        screen=screen,
        units=Units(options.units),
        workers=options.workers,
    )
    if result["records"]:
        headings, rows = convergence_rows(result["records"])
        screen.table("Convergence", headings, rows, text_columns=2)
    old = [] if others else kept_records(path, where, result["settings"])
    merged = merge(old, result["records"], lambda record: "convergence", screen)
    written = merged == result["records"]
    if written:
        write_json(path, {"environment": where, **result})
    return finish(screen, faults, path if written else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks convergence",
        description="Steps and seconds to a loss by scaling, plain and fused: the factor of a scaling in steps times "
        "that in throughput.",
    )
    add_device(parser)
    parser.add_argument("--scale", choices=tuple(SCALES), help="train what scalelong-fast analyze convergence does")
    parser.add_argument("--units", type=Path, help="folder that keeps the trainings, e.g. runs/analysis/units")
    parser.add_argument("--preset", help="training preset of a U-ViT (default: digits-uvit; on a GPU cifar10-uvit)")
    parser.add_argument("--data", help="synthetic, packed, folder, ... (default: the preset's; on a GPU synthetic)")
    parser.add_argument("--path", type=Path, help="where packed data or a folder lies")
    parser.add_argument("--steps", type=int, help="steps of a training")
    parser.add_argument("--seeds", type=int, nargs="+", help="a training of each scaling for each (default: 0 1 2)")
    parser.add_argument("--workers", type=int, help="processes that train (default: one for each GPU or core)")
    parser.add_argument("--rounds", type=int, default=10, help="visits of each recipe in the timing (default: 10)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="time compiled steps too (default)"
    )
    parser.add_argument(
        "--seconds", type=float, default=450.0, help="leave out seeds, recipes and rounds to end by then (default: 450)"
    )
    add_out(parser, "convergence")
    return parser

"""``python -m benchmarks curves``: time and memory of a training step against batch, tokens, width and long skips.

One of the four is varied at a time from a base point, so that growth is seen, not guessed.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch

from benchmarks import environment, unet, uvit
from benchmarks.command import (
    add_compile,
    add_device,
    add_out,
    by_device,
    check_names,
    compiles,
    device_of,
    finish,
    result_path,
)
from benchmarks.kept import kept_records, merge
from benchmarks.model_check import LossMismatchError
from benchmarks.model_steps import Suite, measure
from benchmarks.report_curves import SWEEPS, curves_rows
from benchmarks.screen import Screen
from benchmarks.timing import check_seconds
from scalelong_fast.errors import check_range
from scalelong_fast.models import UNetConfig, UViTConfig
from scalelong_fast.models.registry import model_config
from scalelong_fast.training.checkpoint import write_json
from scalelong_fast.training.config import TrainConfig

ROUNDS = {"cuda": 10, "cpu": 5}
STEPS = {"cuda": 5, "cpu": 1}
#: Seconds after which no further point begins.
SECONDS = {"cuda": 480.0, "cpu": 230.0}
#: How many times its share of the time a point may take before it has fewer recipes and rounds: a curve that lacks its
#: last point says more than one with a recipe missing here and there.
GENEROSITY = 2.0
#: Of the recipes of :data:`benchmarks.uvit.RECIPES`, by whether those that compile are wanted; what comes last is left
#: out first where time is short.
SCALINGS = ("none", "ls")
KINDS = {True: ("eager", "ours", "ours_compile", "compile"), False: ("eager", "ours")}


@dataclass(frozen=True)
class Curves:
    """A model and what is varied of it.

    Attributes:
        suite: the benchmark of training steps that the model belongs to.
        config, batch: the base point.
        values: what else each of :data:`~benchmarks.report_curves.SWEEPS` is set to, as :attr:`vary` takes it, in the
            order of what is wanted first, should time run out: the ends before what lies between.
        vary: ``(config, sweep, value)`` to the model of a point.
    """

    suite: Suite
    config: Any
    batch: int
    values: Mapping[str, tuple[int, ...]]
    vary: Callable[[Any, str, int], Any]


@dataclass(frozen=True)
class Point:
    """A training step to be timed; ``sweeps``: those whose curves it lies on."""

    config: Any
    batch: int
    sweeps: tuple[str, ...]

    @property
    def axes(self) -> dict[str, int]:
        """Where the point lies, by sweep."""
        config = self.config
        if isinstance(config, UViTConfig):
            tokens, width = config.num_tokens, config.embed_dim
        else:
            tokens, width = config.img_size**2, config.model_channels
        return {"batch": self.batch, "tokens": tokens, "width": width, "skips": config.num_skips}


def vary_uvit(config: UViTConfig, sweep: str, value: int) -> UViTConfig:
    """A U-ViT of another image size (tokens), width, heads as wide as before, or number of long skips."""
    head = config.embed_dim // config.num_heads
    changes = {
        "tokens": {"img_size": value},
        "width": {"embed_dim": value, "num_heads": value // head},
        "skips": {"depth": 2 * value},
    }
    return dataclasses.replace(config, **changes[sweep])


def vary_unet(config: UNetConfig, sweep: str, value: int) -> UNetConfig:
    """A UNet of another image size (tokens), its attention on the same level, width or residual blocks per level."""
    sides = tuple(side * value // config.img_size for side in config.attention_resolutions)
    changes = {
        "tokens": {"img_size": value, "attention_resolutions": sides},
        "width": {"model_channels": value},
        "skips": {"num_res_blocks": value},
    }
    return dataclasses.replace(config, **changes[sweep])


def curves(device: torch.device) -> dict[str, Curves]:
    """What is varied on a device, by the model's name in results; a CPU has small models."""
    if device.type == "cuda":
        values = {
            "batch": (128, 16, 32),
            "tokens": (128, 32, 96),
            "width": (1536, 384, 1152),
            "skips": (8, 2, 6),
        }
        return {"U-ViT-M/4": Curves(uvit.SUITE, model_config("uvit_m4", depth=8), 64, values, vary_uvit)}
    small = model_config("uvit_s2", **uvit.REDUCED)
    flat = model_config("unet_imagenet64", **{**unet.REDUCED, "img_size": 16, "attention_resolutions": (8,)})
    of_uvit = {"batch": (8, 1, 2), "tokens": (48, 16, 24), "width": (256, 64, 192), "skips": (6, 1, 4)}
    of_unet = {"batch": (8, 1, 2), "tokens": (32, 8, 24), "width": (128, 32, 96), "skips": (4, 1, 3)}
    return {
        "U-ViT-S/2, reduced": Curves(uvit.SUITE, small, 4, of_uvit, vary_uvit),
        "unet_imagenet64, reduced": Curves(
            unet.SUITE, dataclasses.replace(flat, model_channels=64), 4, of_unet, vary_unet
        ),
    }


def points(model: Curves, sweeps: Sequence[str] = tuple(SWEEPS)) -> list[Point]:
    """The points of a model in the order in which they are measured: the base, then each sweep's in turn."""

    def moved(sweep: str, value: int) -> Point:
        if sweep == "batch":
            return Point(model.config, value, (sweep,))
        return Point(model.vary(model.config, sweep, value), model.batch, (sweep,))

    columns = [[moved(sweep, value) for value in model.values[sweep]] for sweep in sweeps]
    others = [point for point in chain(*zip_longest(*columns)) if point is not None]
    return [Point(model.config, model.batch, tuple(SWEEPS)), *others]


def by_block(suite: Suite) -> Suite:
    """The suite with blocks compiled one by one: of whole steps, each point's would take minutes, deep ones most."""

    class Bench(suite.bench):
        def _train(self, compiled: bool) -> TrainConfig:
            train = super()._train(compiled)
            return dataclasses.replace(train, compile="block") if train.compile == "on" else train

    return dataclasses.replace(suite, bench=Bench)


def shares(model: Curves, todo: Sequence[Point]) -> list[float]:
    """How a budget of time is divided among points: by their FLOP, and equally for what each costs in any case."""
    flop = [model.suite.flop(point.config, "step") * point.batch for point in todo]
    weights = [one + sum(flop) / len(flop) / 2 for one in flop]
    return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class Timing:
    """How points are measured: where, whether recipes that compile do so, visits of each, progress, ceilings."""

    device: torch.device
    compiled: bool
    rounds: int
    screen: Screen
    limits: Mapping[str, Any]


def measure_model(
    label: str,
    model: Curves,
    todo: Sequence[Point],
    timing: Timing,
    end: float,
    keep: Callable[[Sequence[dict[str, Any]]], None],
) -> list[str]:
    """Measure points of one model; returns what went wrong, a line for each.

    Args:
        label: the model's name in results.
        model, todo: what, in this order.
        timing: how.
        end: reading of ``time.perf_counter`` after which no point begins.
        keep: takes the records of a point.

    Raises:
        LossMismatchError: a recipe computes another loss.
    """
    suite, weights, faults = by_block(model.suite), shares(model, todo), []
    for index, point in enumerate(todo):
        now = time.perf_counter()
        title = f"{label}, {', '.join(f'{sweep} {at}' for sweep, at in point.axes.items())}"
        if now > end:
            timing.screen.print(f"Time is up; not measured: {title}.")
            continue
        new = measure(
            suite,
            title,
            point.config,
            timing.device,
            batch_size=point.batch,
            rounds=timing.rounds,
            steps=STEPS[timing.device.type],
            compiled=timing.compiled,
            names=[f"{kind}_{scaling}" for kind in KINDS[timing.compiled] for scaling in SCALINGS],
            screen=timing.screen,
            seconds=GENEROSITY * (end - now) * weights[index] / sum(weights[index:]),
            limits=timing.limits,
        )
        faults += new.faults
        keep([record | {"model": label, **point.axes, "sweeps": list(point.sweeps)} for record in new.records])
    return faults


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["model"], *(record[sweep] for sweep in SWEEPS)


def main(args: Sequence[str], *, chosen: Mapping[str, Curves] | None = None) -> int:
    """Run the command; returns the exit code. The keyword shrinks the benchmark for tests."""
    options = _parser().parse_args(args)
    device = device_of(options)
    rounds = ROUNDS[device.type] if options.rounds is None else options.rounds
    check_range("--rounds", rounds, low=1, integer=True)
    budget = SECONDS[device.type] if options.seconds is None else options.seconds
    check_seconds(budget)
    found = dict(curves(device) if chosen is None else chosen)
    check_names("--model", options.model, found)
    check_names("--sweep", options.sweep, SWEEPS)
    found = {label: model for label, model in found.items() if label in (options.model or found)}
    sweeps = [sweep for sweep in SWEEPS if sweep in (options.sweep or SWEEPS)]
    compiled = compiles(options, device)
    screen = Screen(width=None if sys.stdout.isatty() else 160)
    where = environment.describe(device)
    path = result_path(options, where, "curves")
    settings = {"rounds": rounds, "steps_per_round": STEPS[device.type], "compiled": compiled}
    records = kept_records(path, where, settings)
    limits = environment.ceilings(device)
    begun = time.perf_counter()
    faults: list[str] = []

    def keep(new: Sequence[dict[str, Any]]) -> None:
        nonlocal records
        records = merge(records, new, _identity, screen)
        write_json(path, {"environment": where, "settings": settings, "ceilings": limits, "records": records})

    for number, (label, model) in enumerate(found.items()):
        timing = Timing(device, compiled, rounds, screen, limits)
        # What one model leaves of its time is the next one's.
        end = begun + budget * (number + 1) / len(found)
        try:
            faults += measure_model(label, model, points(model, sweeps), timing, end, keep)
        except LossMismatchError as error:
            screen.print(f"benchmarks: error: {error}", style="red")
            return 1
    screen.table("Growth", *curves_rows(records), text_columns=3)
    return finish(screen, faults, path if records else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks curves",
        description="Time training steps and read their peak memory at points where one of batch, tokens (of a UNet: "
        "pixels), width and number of long skips differs from a base point; the plain model, eager and compiled, and "
        "ours, without scaling and with LS, all recipes of a point interleaved. On a CPU small models stand in.",
    )
    parser.add_argument("--model", action="append", help="may be repeated; names as in the result file (default: all)")
    parser.add_argument("--sweep", action="append", help=f"may be repeated; of {', '.join(SWEEPS)} (default: all)")
    parser.add_argument("--rounds", type=int, help=f"visits of each recipe ({by_device(ROUNDS)})")
    add_compile(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"end after about this time ({by_device(SECONDS)}): leave out points, "
        "compiled recipes first, and make fewer rounds",
    )
    add_device(parser)
    add_out(parser, "curves")
    return parser

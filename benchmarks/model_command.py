"""The commands of the benchmarks of whole training steps: ``uvit`` and ``unet``, or both as ``models``."""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence

import torch

from benchmarks import environment
from benchmarks.command import add_compile, add_device, add_out, check_names, compiles, device_of, finish, result_path
from benchmarks.kept import kept_records, merge
from benchmarks.model_check import LossMismatchError
from benchmarks.model_steps import Suite, identity, measure
from benchmarks.screen import Screen
from benchmarks.step_calls import DIRECTIONS, WARM_UP_STEPS
from benchmarks.timing import check_seconds
from scalelong_fast.errors import check_range, invalid, unknown_name
from scalelong_fast.models import ModelConfig
from scalelong_fast.training.checkpoint import write_json
from scalelong_fast.training.config import Precision, TrainConfig


def run(
    suite: Suite,
    args: Sequence[str],
    *,
    models: Mapping[str, ModelConfig] | None = None,
    names: Sequence[str] | None = None,
) -> int:
    """Run the command of a suite; returns the exit code. The keywords shrink the benchmark for tests."""
    begun = time.perf_counter()
    options = _parser(suite).parse_args(args)
    check_range("--rounds", options.rounds, low=1, integer=True)
    check_seconds(options.seconds)
    device = device_of(options)
    gpu = device.type == "cuda"
    steps = (5 if gpu else 1) if options.steps is None else options.steps
    check_range("--steps", steps, low=1, integer=True)
    if options.batch_size is not None:
        check_range("--batch-size", options.batch_size, low=1, integer=True)
    suite = in_precision(suite, options.precision)
    models = dict(models or suite.models(device))
    for label in options.model or ():
        if label not in models:
            if label in suite.presets:
                raise invalid("--model", label, f"{', '.join(models)} on this device")
            raise unknown_name("--model", label, models)
    chosen = {label: config for label, config in models.items() if label in (options.model or models)}
    check_names("--recipe", options.recipe, suite.recipes)
    wanted = options.recipe or names or suite.recipes
    check_names("--direction", options.direction, DIRECTIONS)
    screen = Screen(width=None if sys.stdout.isatty() else 170)
    where = environment.describe(device)
    path = result_path(options, where, suite.command)
    settings = {"rounds": options.rounds, "steps_per_round": steps, "warm_up_steps": WARM_UP_STEPS}
    records = kept_records(path, where, settings)
    compiled = compiles(options, device)
    faults: list[str] = []
    measured = written = False
    for number, (label, config) in enumerate(chosen.items()):
        batch_size = suite.batch_size(label, device) if options.batch_size is None else options.batch_size
        label, config = suite.adjusted(label, config, options)
        if options.precision != "auto":
            label = f"{label}, {options.precision}"
        try:
            new = measure(
                suite,
                label,
                config,
                device,
                batch_size=batch_size,
                rounds=options.rounds,
                steps=steps,
                compiled=compiled,
                names=[name for name in suite.recipes if name in wanted],
                screen=screen,
                directions=[direction for direction in DIRECTIONS if direction in (options.direction or DIRECTIONS)],
                seconds=(options.seconds - (time.perf_counter() - begun)) / (len(chosen) - number),
            )
        except LossMismatchError as error:
            screen.print(f"benchmarks: error: {label}: {error}", style="red")
            return 1
        faults += new.faults
        if not new.records:
            continue
        measured = True
        merged = merge(records, new.records, identity, screen)
        if merged != records:
            records, written = merged, True
            write_json(path, {"environment": where, "settings": settings, "ceilings": new.limits, "records": records})
        headings, rows = suite.table(new.records)
        screen.table("Training step", headings, rows, text_columns=2)
    if not measured and not faults:
        mend = "" if compiled else "Recipes that compile need --compile here."
        raise invalid("--recipe", ", ".join(wanted), "one that the model can have on this device", mend)
    return finish(screen, faults, path if written else None)


def in_precision(suite: Suite, precision: Precision) -> Suite:
    """The suite with all its recipes in another precision."""

    class Bench(suite.bench):
        def _train(self, compiled: bool) -> TrainConfig:
            return dataclasses.replace(super()._train(compiled), precision=precision)

    return dataclasses.replace(suite, bench=Bench)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that the suites share."""
    add_device(parser)
    parser.add_argument(
        "--direction", action="append", help=f"may be repeated; of {', '.join(DIRECTIONS)} (default: all)"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32"),
        default="auto",
        help="auto: what the device computes in best, the authors' recipe on a GPU fp16; fp32: all recipes, rows apart",
    )
    parser.add_argument("--rounds", type=int, default=8, help="visits of each recipe (default: 8)")
    parser.add_argument("--steps", type=int, help="timed steps of a visit (default: 5 on a GPU, 1 on a CPU)")
    add_compile(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="end after about this time: leave out recipes that there is no time to compile, make fewer rounds",
    )


def _parser(suite: Suite) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {suite.command}", description=suite.description)
    parser.add_argument(
        "--model", action="append", help=f"may be repeated; of {', '.join(suite.presets)} (default: all)"
    )
    parser.add_argument(
        "--recipe", action="append", help=f"may be repeated; of {', '.join(suite.recipes)} (default: all)"
    )
    add_options(parser)
    sizes = {kind: {suite.batch_size(label, torch.device(kind)) for label in suite.presets} for kind in ("cuda", "cpu")}
    on_gpu, on_cpu = (" or ".join(map(str, sorted(sizes[kind]))) for kind in ("cuda", "cpu"))
    parser.add_argument("--batch-size", type=int, help=f"images a step (default: {on_gpu} on a GPU, {on_cpu} on a CPU)")
    add_out(parser, suite.command)
    suite.add_options(parser)
    return parser

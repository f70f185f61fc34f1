"""What the benchmarks of whole training steps share: recipes interleaved, and what is written down of them.

A benchmark is a :class:`Suite`: the models, the recipes, a :class:`~benchmarks.step_bench.StepBench` that builds them,
and what its records say besides. :mod:`benchmarks.model_command` makes a command of it.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import environment
from benchmarks.model_check import LossMismatchError
from benchmarks.report_models import references
from benchmarks.screen import Screen
from benchmarks.step_bench import StepBench
from benchmarks.step_calls import Ready, free_bytes, prepare
from benchmarks.timing import described, interleave, round_speed_up, summarize, survivors, synchronize
from benchmarks.variants import as_trained, dtype_name
from scalelong_fast.models import ModelConfig
from scalelong_fast.models.registry import model_config

#: Share of a budget after which no further recipe is prepared, and by which one that compiles must be ready, going by
#: the longest so far.
_PREPARING, _COMPILED = 0.6, 0.75


@dataclass(frozen=True)
class Suite:
    """A benchmark of training steps.

    Attributes:
        command: its name, that of its result file and table too.
        description: what ``--help`` says.
        presets: presets of the published models, by the name that they have in results.
        models: the models of a device, by the same names; a CPU has small ones.
        batch_size: images a step, of a model on a device.
        recipes: by name, in the order of what is wanted first.
        bench: makes a :class:`StepBench`.
        flop: of one image, in a direction of :data:`~benchmarks.step_calls.DIRECTIONS`.
        sources: files whose code a recipe's step runs, relative to the repository.
        fields: what a record says besides.
        table: headings and cells of records.
        able: whether a recipe can be built of a model.
        add_options: adds to the command's options.
        adjusted: a model's name in results and its configuration under the options.
    """

    command: str
    description: str
    presets: Mapping[str, str]
    models: Callable[[torch.device], Mapping[str, ModelConfig]]
    batch_size: Callable[[str, torch.device], int]
    recipes: Mapping[str, Any]
    bench: Callable[[Any, torch.device, int, bool], StepBench]
    flop: Callable[[Any, str], int]
    sources: Callable[[Any], tuple[str, ...]]
    fields: Callable[[StepBench, Any], Mapping[str, Any]]
    table: Callable[[Sequence[Mapping[str, Any]]], tuple[list[str], list[list[str]]]]
    able: Callable[[StepBench, Any], bool] = lambda bench, recipe: True
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    adjusted: Callable[[str, Any, argparse.Namespace], tuple[str, Any]] = lambda label, config, options: (label, config)


@dataclass
class Measured:
    """What came of one model: JSON records, the machine's ceilings, and a line for each recipe that failed."""

    records: list[dict[str, Any]]
    limits: dict[str, Any]
    faults: list[str]


def measure(
    suite: Suite,
    label: str,
    config: Any,
    device: torch.device,
    *,
    batch_size: int,
    rounds: int,
    steps: int,
    compiled: bool,
    names: Sequence[str],
    screen: Screen,
    directions: Sequence[str] = ("step",),
    seconds: float = math.inf,
    limits: Mapping[str, Any] | None = None,
) -> Measured:
    """Time the recipes of one model in every direction, all interleaved.

    Args:
        suite: the benchmark.
        label: the model's name in results.
        config: the model; its scaling and ``fused`` are replaced.
        device: where.
        batch_size, rounds, steps: images of a step, visits of each recipe, timed steps of a visit.
        compiled: whether recipes that compile do so.
        names: of the suite's recipes; those that the model cannot have are left out.
        screen: where progress goes.
        directions: of :data:`~benchmarks.step_calls.DIRECTIONS`.
        seconds: time for all; a part of it is kept for the timing, whose rounds become fewer.
        limits: the machine's ceilings, where this run has measured them already.

    Raises:
        LossMismatchError: a recipe computes another loss.
    """
    begun = time.perf_counter()
    torch.compiler.reset()  # one function's compiled forms are limited in number
    bench = suite.bench(config, device, batch_size, compiled)
    recipes = {name: suite.recipes[name] for name in names if suite.able(bench, suite.recipes[name])}
    lists = {name: suite.sources(recipe) for name, recipe in recipes.items()}
    hashes = {sources: environment.source_hash(sources) for sources in lists.values()}
    limits = environment.ceilings(device) if limits is None else dict(limits)
    found, faults = _prepare_all(bench, label, recipes, directions, begun, seconds, screen)

    def call(name: str, direction: str) -> None:
        found[name].calls[direction]()

    def failed(key: tuple[str, str], error: BaseException) -> list[tuple[str, str]]:
        faults.append(described(f"{label}, {', '.join(key)}", error))
        screen.print(faults[-1], style="red")
        name, _ = key
        del found[name]  # its weights and gradients make room for the others
        return [(name, direction) for direction in directions]

    def timed(calls: Mapping[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], list[float]]:
        with screen.progress(f"time {label}", rounds * len(calls)) as advance:
            return interleave(
                calls,
                rounds=rounds,
                steps=steps,
                wait=lambda: synchronize(device),
                tick=lambda _: advance(),
                around=lambda key: as_trained(key[0], device),
                deadline=begun + seconds,
            )

    keys = [(name, direction) for direction in directions for name in recipes if name in found]
    times = survivors(timed, {key: functools.partial(call, *key) for key in keys}, failed)
    records = []
    for (name, direction), own in times.items():
        one = found[name]
        flop = suite.flop(config, direction) * batch_size
        recipe = recipes[name]
        dtype = dtype_name(bench.autocast(recipe))
        summary = summarize(own)
        ceiling = limits["matmul_tflop_s"]["bf16" if dtype == "fp16" else dtype]
        host = one.host.get(direction)
        record: dict[str, Any] = {
            "model": label,
            "shape": [batch_size, config.in_chans, config.img_size, config.img_size],
            "dtype": dtype,
            "direction": direction,
            "variant": name,
            "scaling": recipe.scaling,
            **suite.fields(bench, recipe),
            "compiled": bench.execution(recipe.compiled).compiled,
            "rounds": len(own),
            "median_us": round(summary.median * 1e6, 1),
            "p20_us": round(summary.p20 * 1e6, 1),
            "p80_us": round(summary.p80 * 1e6, 1),
            "images_per_second": round(batch_size / summary.median, 2),
            "flop": flop,
            "mfu": round(flop / summary.median / 1e12 / ceiling, 4),
            "peak_mib": round(one.peaks[direction] / 2**20, 1),
            "host_us": None if host is None else round(host * 1e6, 1),
            "rel_error": one.errors.of(direction),
        }
        for field, reference in references(name).items():
            other = times.get((reference, direction))
            ratio = None if other is None else round(1 / round_speed_up(other, own), 4)
            record[f"time_over_{field}"] = ratio
        record["sources"] = list(lists[name])
        record["source_sha256"] = hashes[lists[name]]
        records.append(record)
    return Measured(records, limits, faults)


def _prepare_all(
    bench: StepBench,
    label: str,
    recipes: Mapping[str, Any],
    directions: Sequence[str],
    begun: float,
    seconds: float,
    screen: Screen,
) -> tuple[dict[str, Ready], list[str]]:
    """Those recipes that time and memory allow, and a line for each that failed.

    Arguments are as for :func:`measure`; ``seconds`` count from the reading ``begun`` of ``time.perf_counter``.
    """
    found: dict[str, Ready] = {}
    faults: list[str] = []
    longest = 0.0  # seconds to compile a recipe
    need = 0.0  # bytes of a recipe: all stay, as they are timed in turns
    for name in sorted(recipes, key=lambda name: recipes[name].compiled):  # compiling may take all the time there is
        start = time.perf_counter()
        late = recipes[name].compiled and start - begun + longest > _COMPILED * seconds
        if found and (late or start - begun > _PREPARING * seconds):
            screen.print(f"Time is up; not measured: {label}, {name}.")
            continue
        room = free_bytes(bench.device)
        if found and room < need:
            screen.print(f"Memory is short; not measured: {label}, {name}.")
            continue
        try:
            found[name] = prepare(bench, name, recipes[name], directions)
            if math.isfinite(room):
                need = max(need, room - free_bytes(bench.device) + max(found[name].peaks.values()))
            if recipes[name].compiled:
                longest = max(longest, time.perf_counter() - start)
        except LossMismatchError:
            raise
        except Exception as error:  # compilers and drivers raise anything; the other recipes are still wanted
            faults.append(described(f"{label}, {name}", error))
            screen.print(faults[-1], style="red")
            continue
        screen.print(f"{label}, {name}: ready after {time.perf_counter() - start:.0f} s")
    return found, faults


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What records that are compared share: all recipes of a model, batch and direction."""
    return record["model"], tuple(record["shape"]), record["direction"]


def preset_models(presets: Mapping[str, str], device: torch.device, reduced: Mapping[str, ModelConfig]):
    """The published models on a GPU, ``reduced`` elsewhere."""
    if device.type == "cuda":
        return {label: model_config(preset) for label, preset in presets.items()}
    return dict(reduced)

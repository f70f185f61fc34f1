"""What the benchmarks of whole training steps share: recipes from equal weights, checked, interleaved, written down.

A benchmark is a :class:`Suite`: the models, the recipes, a :class:`StepBench` that builds them, and what its records
say besides.
"""

import argparse
import dataclasses
import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks import environment
from benchmarks.screen import Screen
from benchmarks.timing import interleave, round_speed_up, summarize, synchronize
from benchmarks.variants import dtype_name
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import check_range, invalid, unknown_name
from scalelong_fast.models import ModelConfig
from scalelong_fast.models.registry import model_config
from scalelong_fast.training.batches import Draw
from scalelong_fast.training.checkpoint import write_json
from scalelong_fast.training.config import RunConfig, TrainConfig
from scalelong_fast.training.hardware import Execution, resolve_execution
from scalelong_fast.training.step import TrainStep

#: Largest relative difference of a first loss from that of the plain model in float32.
TOLERANCE = 2e-2
WARM_UP_STEPS = 3
SEED = 0


class Recipe(Protocol):
    """A way to train one of the models."""

    @property
    def scaling(self) -> str:
        """Of the long skips."""

    @property
    def compiled(self) -> bool:
        """Whether torch.compile may be used."""


class LossMismatchError(RuntimeError):
    """A recipe computes another loss than the plain model in float32, so that its time would mean nothing."""


class StepBench:
    """Builds recipes of one model on one device, from equal weights.

    Args:
        config: the model.
        device: where.
        batch_size: images a step.
        compiled: whether recipes that compile do so here.
    """

    def __init__(self, config: Any, device: torch.device, batch_size: int, compiled: bool):
        self.config, self.device, self.batch_size, self.compiled = config, device, batch_size, compiled
        self._losses: dict[str, float] = {}
        generator = torch.Generator().manual_seed(SEED)
        self.draws = [self._draw(generator) for _ in range(2)]
        torch.manual_seed(SEED)

    def _draw(self, generator: torch.Generator) -> Draw:
        config, batch = self.config, self.batch_size
        shape = (batch, config.in_chans, config.img_size, config.img_size)
        x0, noise = torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)
        labels = None
        if config.num_classes > 0:
            labels = torch.randint(config.num_classes, (batch,), generator=generator).to(self.device)
        u = torch.rand(batch, generator=generator)
        return Draw(x0.to(self.device), labels, noise.to(self.device), u.to(self.device))

    def execution(self, compiled: bool) -> Execution:
        """How a step is carried out here."""
        return resolve_execution(self._train(compiled))

    def _train(self, compiled: bool) -> TrainConfig:
        use = "on" if compiled and self.compiled else "off"
        return TrainConfig(batch_size=self.batch_size, device=str(self.device), compile=use)

    def model(self, recipe: Any) -> nn.Module:
        """The model of a recipe, on the device, with the weights that all have."""
        raise NotImplementedError

    def plain_model(self, scaling: str) -> nn.Module:
        """The model in plain PyTorch, to which every recipe of the same scaling is compared."""
        raise NotImplementedError

    def build(self, recipe: Any) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """The recipe as a function that takes the next step, and one that returns the loss of the first draw."""
        model = self.model(recipe)
        config = RunConfig(model=model.config, train=self._train(recipe.compiled))
        step = TrainStep(model, create_schedule("vpsde").to(self.device), config, self.execution(recipe.compiled))
        first = self.draws[0]
        count = 0

        def take() -> Tensor:
            nonlocal count
            count += 1
            return step(count - 1, self.draws[count % len(self.draws)])

        return take, lambda: step.loss_fn(first.x0, first.noise, first.u, first.labels)

    def reference_loss(self, scaling: str) -> float:
        """The first draw's loss of the plain model in float32."""
        if scaling not in self._losses:
            self._losses[scaling] = self._reference_loss(scaling)
        return self._losses[scaling]

    def _reference_loss(self, scaling: str) -> float:
        model = self.plain_model(scaling)
        train = dataclasses.replace(self._train(False), precision="fp32")
        config = RunConfig(model=model.config, train=train)
        step = TrainStep(model, create_schedule("vpsde").to(self.device), config, resolve_execution(train))
        first = self.draws[0]
        with torch.no_grad():
            return float(step.loss_fn(first.x0, first.noise, first.u, first.labels))


@dataclass
class Ready:
    """A recipe that has been built, checked and warmed up."""

    take: Callable[[], Tensor]
    error: float
    peak_bytes: int | None


def prepare(bench: StepBench, name: str, recipe: Recipe) -> Ready:
    """Build a recipe, check its loss and warm it up.

    Raises:
        LossMismatchError: its first loss is not that of the plain model in float32.
    """
    device = bench.device
    expected = bench.reference_loss(recipe.scaling)
    before = 0
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    take, probe = bench.build(recipe)
    loss = float(probe().detach())
    error = abs(loss - expected) / abs(expected)
    if not error < TOLERANCE:
        raise LossMismatchError(
            f"{name}: with equal weights, images, times and noise its loss is {loss:.8g}, that of the plain model in "
            f"float32 {expected:.8g}; the relative error {error:.2g} is not below {TOLERANCE:g}."
        )
    with warnings.catch_warnings():
        # A training run goes on eagerly where compiling fails; what is measured must be what it is called.
        warnings.filterwarnings("error", message="torch.compile failed")
        for _ in range(WARM_UP_STEPS):
            take()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return Ready(take, error, peak)


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
        flop: of one image's forward and backward.
        sources: files whose code a recipe's step runs, relative to the repository.
        references: names of the fields ``time_over_…`` of a recipe, and the recipes that they set it in relation to.
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
    flop: Callable[[Any], int]
    sources: Callable[[Any], tuple[str, ...]]
    references: Callable[[str], Mapping[str, str]]
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
    seconds: float = math.inf,
) -> Measured:
    """Time the recipes of one model, interleaved.

    Args:
        suite: the benchmark.
        label: the model's name in results.
        config: the model; its scaling and ``fused`` are replaced.
        device: where.
        batch_size, rounds, steps: images of a step, visits of each recipe, timed steps of a visit.
        compiled: whether recipes that compile do so.
        names: of the suite's recipes; those that the model cannot have are left out.
        screen: where progress goes.
        seconds: time after which no further recipe is prepared.

    Raises:
        LossMismatchError: a recipe computes another loss.
    """
    begun = time.perf_counter()
    bench = suite.bench(config, device, batch_size, compiled)
    recipes = {name: suite.recipes[name] for name in names if suite.able(bench, suite.recipes[name])}
    lists = {name: suite.sources(recipe) for name, recipe in recipes.items()}
    hashes = {sources: environment.source_hash(sources) for sources in lists.values()}
    limits = environment.ceilings(device)
    ready: dict[str, Ready] = {}
    faults = []
    for name, recipe in recipes.items():
        start = time.perf_counter()
        if ready and start - begun > seconds:
            screen.print(f"Time is up; not measured: {name}.")
            continue
        try:
            ready[name] = prepare(bench, name, recipe)
        except LossMismatchError:
            raise
        except Exception as error:  # compilers and drivers raise anything; the other recipes are still wanted
            lines = str(error).strip().splitlines()
            faults.append(f"{label}, {name}: {type(error).__name__}: {lines[0] if lines else ''}")
            screen.print(faults[-1], style="red")
            continue
        screen.print(f"{label}, {name}: ready after {time.perf_counter() - start:.0f} s")
    with screen.progress(f"time {label}", rounds * len(ready)) as advance:
        times = interleave(
            {name: one.take for name, one in ready.items()},
            rounds=rounds,
            steps=steps,
            wait=lambda: synchronize(device),
            tick=lambda name: advance(),
        )
    flop = suite.flop(config) * batch_size
    records = []
    for name, one in ready.items():
        recipe, execution = recipes[name], bench.execution(recipes[name].compiled)
        dtype = dtype_name(execution.autocast)
        summary = summarize(times[name])
        ceiling = limits["matmul_tflop_s"]["bf16" if dtype == "fp16" else dtype]
        record: dict[str, Any] = {
            "model": label,
            "shape": [batch_size, config.in_chans, config.img_size, config.img_size],
            "dtype": dtype,
            "direction": "step",
            "variant": name,
            "scaling": recipe.scaling,
            **suite.fields(bench, recipe),
            "compiled": execution.compiled,
            "median_us": round(summary.median * 1e6, 1),
            "p20_us": round(summary.p20 * 1e6, 1),
            "p80_us": round(summary.p80 * 1e6, 1),
            "images_per_second": round(batch_size / summary.median, 2),
            "bytes": None,
            "flop": flop,
            "mfu": round(flop / summary.median / 1e12 / ceiling, 4),
            "peak_mib": None if one.peak_bytes is None else round(one.peak_bytes / 2**20, 1),
            "rel_error": one.error,
        }
        for field, reference in suite.references(name).items():
            ratio = 1 / round_speed_up(times[reference], times[name]) if reference in times else None
            record[f"time_over_{field}"] = None if ratio is None else round(ratio, 4)
        record["sources"] = list(lists[name])
        record["source_sha256"] = hashes[lists[name]]
        records.append(record)
    return Measured(records, limits, faults)


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["model"], tuple(record["shape"])


def kept_records(path: Path, where: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of earlier runs on the same machine and versions, with the same settings."""

    def undated(environment: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in environment.items() if key != "date"}

    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        same = undated(old["environment"]) == undated(where) and old["settings"] == dict(settings)
        return old["records"] if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []  # missing or of another shape: it is written anew


def run(
    suite: Suite,
    args: Sequence[str],
    *,
    models: Mapping[str, ModelConfig] | None = None,
    names: Sequence[str] | None = None,
) -> int:
    """Run the command of a suite; returns the exit code. The keywords shrink the benchmark for tests."""
    options = _parser(suite).parse_args(args)
    check_range("--rounds", options.rounds, low=1, integer=True)
    device = resolve_execution(TrainConfig(device=options.device, compile="off")).device
    gpu = device.type == "cuda"
    steps = (5 if gpu else 1) if options.steps is None else options.steps
    check_range("--steps", steps, low=1, integer=True)
    if options.batch_size is not None:
        check_range("--batch-size", options.batch_size, low=1, integer=True)
    models = dict(models or suite.models(device))
    for label in options.model or ():
        if label not in models:
            if label in suite.presets:
                raise invalid("--model", label, f"{', '.join(models)} on this device")
            raise unknown_name("--model", label, models)
    chosen = {label: config for label, config in models.items() if label in (options.model or models)}
    for name in options.recipe or ():
        if name not in suite.recipes:
            raise unknown_name("--recipe", name, suite.recipes)
    wanted = options.recipe or names or suite.recipes
    screen = Screen(width=None if sys.stdout.isatty() else 160)
    where = environment.describe(device)
    path = options.out or environment.RESULTS / where["machine"] / f"{suite.command}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"rounds": options.rounds, "steps_per_round": steps, "warm_up_steps": WARM_UP_STEPS}
    records = kept_records(path, where, settings)
    faults: list[str] = []
    for label, config in chosen.items():
        batch_size = suite.batch_size(label, device) if options.batch_size is None else options.batch_size
        label, config = suite.adjusted(label, config, options)
        try:
            new = measure(
                suite,
                label,
                config,
                device,
                batch_size=batch_size,
                rounds=options.rounds,
                steps=steps,
                compiled=gpu if options.compile is None else options.compile,
                names=[name for name in suite.recipes if name in wanted],
                screen=screen,
                seconds=options.seconds,
            )
        except LossMismatchError as error:
            screen.print(f"benchmarks: error: {label}: {error}", style="red")
            return 1
        faults += new.faults
        if not new.records:
            continue
        identity = _identity(new.records[0])
        records = [record for record in records if _identity(record) != identity] + new.records
        write_json(path, {"environment": where, "settings": settings, "ceilings": new.limits, "records": records})
        headings, rows = suite.table(new.records)
        screen.table("Training step", headings, rows, text_columns=2)
    for fault in faults:
        screen.print(f"benchmarks: error: {fault}", style="red")
    screen.print(f"Written to {path}.")
    return 1 if faults else 0


def _parser(suite: Suite) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {suite.command}", description=suite.description)
    parser.add_argument(
        "--model", action="append", help=f"may be repeated; of {', '.join(suite.presets)} (default: all)"
    )
    parser.add_argument(
        "--recipe", action="append", help=f"may be repeated; of {', '.join(suite.recipes)} (default: all)"
    )
    parser.add_argument("--device", default="auto", help="auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ...")
    parser.add_argument("--rounds", type=int, default=8, help="visits of each recipe (default: 8)")
    parser.add_argument("--steps", type=int, help="timed steps of a visit (default: 5 on a GPU, 1 on a CPU)")
    sizes = {kind: {suite.batch_size(label, torch.device(kind)) for label in suite.presets} for kind in ("cuda", "cpu")}
    on_gpu, on_cpu = (" or ".join(map(str, sorted(sizes[kind]))) for kind in ("cuda", "cpu"))
    parser.add_argument("--batch-size", type=int, help=f"images a step (default: {on_gpu} on a GPU, {on_cpu} on a CPU)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only, as it takes minutes"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="prepare no further recipe after this time")
    parser.add_argument(
        "--out", type=Path, help=f"result file (default: benchmarks/results/<machine>/{suite.command}.json)"
    )
    suite.add_options(parser)
    return parser


def preset_models(presets: Mapping[str, str], device: torch.device, reduced: Mapping[str, ModelConfig]):
    """The published models on a GPU, ``reduced`` elsewhere."""
    if device.type == "cuda":
        return {label: model_config(preset) for label, preset in presets.items()}
    return dict(reduced)

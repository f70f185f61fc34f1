"""What the benchmarks of whole training steps share: recipes from equal weights, checked, interleaved, written down.

A benchmark is a :class:`Suite`: the models, the recipes, a :class:`StepBench` that builds them, and what its records
say besides. :mod:`benchmarks.model_command` makes a command of it.
"""

import argparse
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks import environment, model_check
from benchmarks.authors_recipe import AuthorsStep
from benchmarks.model_check import Built, Errors, LossMismatchError, Outcome
from benchmarks.op_timing import host_seconds, peak_bytes
from benchmarks.report_models import references
from benchmarks.screen import Screen
from benchmarks.timing import interleave, round_speed_up, summarize, synchronize
from benchmarks.variants import dtype_name
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.models import ModelConfig
from scalelong_fast.models.registry import model_config
from scalelong_fast.training.batches import Draw
from scalelong_fast.training.config import RunConfig, TrainConfig
from scalelong_fast.training.hardware import Execution, fp32_products, resolve_execution
from scalelong_fast.training.step import TrainStep

WARM_UP_STEPS = 3
SEED = 0
#: What of a recipe is timed, and how a budget of time is shared: the loss with its graph; and its gradients; and the
#: optimiser and the average.
DIRECTIONS = {"fwd": 1, "fwd_bwd": 3, "step": 3}
#: Share of a budget after which no further recipe is prepared, and by which one that compiles must be ready, going by
#: the longest so far.
_PREPARING, _COMPILED = 0.6, 0.75
#: Calls whose host time is read.
_HOST_CALLS = 10


class Recipe(Protocol):
    """A way to train one of the models."""

    @property
    def scaling(self) -> str:
        """Of the long skips."""

    @property
    def compiled(self) -> bool:
        """Whether torch.compile may be used."""


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
        self._exact: dict[str, Outcome] = {}
        self._usual: dict[tuple[str, torch.dtype | None], Errors] = {}
        generator = torch.Generator().manual_seed(SEED)
        self.draws = [self._draw(generator) for _ in range(2)]
        self.schedule = create_schedule("vpsde").to(device)
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

    def autocast(self, recipe: Any) -> torch.dtype | None:
        """The dtype that a recipe computes in here; None: float32."""
        return self.execution(recipe.compiled).autocast

    def build(self, recipe: Any) -> Built:
        """The recipe as functions."""
        return self._ours(self.model(recipe), self._train(recipe.compiled))

    def _ours(self, model: nn.Module, train: TrainConfig) -> Built:
        """A model in our training step."""
        execution = resolve_execution(train)
        step = TrainStep(model, self.schedule, RunConfig(model=model.config, train=train), execution)
        first = self.draws[0]
        count = 0

        def take() -> Tensor:
            nonlocal count
            count += 1
            draw = self.draws[count % len(self.draws)]
            # Times and noise are drawn in every step, as the authors' step does.
            fresh = dataclasses.replace(draw, noise=torch.randn_like(draw.x0), u=torch.rand_like(draw.u))
            return step(count - 1, fresh)

        def loss() -> Tensor:
            return step.loss_fn(first.x0, first.noise, first.u, first.labels)

        return Built(take, loss, model, lambda: self._predict(model, execution.autocast))

    def _predict(self, network: nn.Module, autocast: torch.dtype | None) -> Tensor:
        """The noise that a network predicts from the first draw."""
        first = self.draws[0]
        times = self.schedule.times(first.u)
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in self.schedule.alpha_sigma(times))
        noisy = alpha * first.x0 + sigma * first.noise
        with torch.autocast(self.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            return network(noisy, self.schedule.model_timesteps(times), first.labels)

    def authors(self, model: nn.Module, recipe: Any, autocast: torch.dtype | None) -> Built:
        """A model in the authors' training step."""
        step = AuthorsStep(model, autocast, self.execution(recipe.compiled).compiled)
        first = self.draws[0]
        count = 0

        def take() -> Tensor:
            nonlocal count
            count += 1
            draw = self.draws[count % len(self.draws)]
            return step(draw.x0, draw.labels)

        def loss() -> Tensor:
            return step.loss(first.x0, first.u, first.noise, first.labels).mean()

        return Built(take, loss, model, lambda: self._predict(step.network, autocast))

    def authors_autocast(self) -> torch.dtype | None:
        """The dtype of their recipe: fp16 on a GPU, as the published command has it; elsewhere that of ours."""
        own = self.execution(False).autocast
        return torch.float16 if own is not None and self.device.type == "cuda" else own

    def check(self, name: str, recipe: Any, built: Built) -> Errors:
        """Errors of a recipe against the plain model in float32.

        Raises:
            LossMismatchError: they are larger than its precision explains.
        """
        scaling, autocast = recipe.scaling, self.autocast(recipe)
        exact = self.exact(scaling)
        if (scaling, autocast) not in self._usual:
            self._usual[scaling, autocast] = model_check.errors(self._plain_outcome(scaling, autocast), exact)
        own = model_check.errors(model_check.outcome(built, autocast), exact)
        model_check.check(name, own, self._usual[scaling, autocast])
        return own

    def exact(self, scaling: str) -> Outcome:
        """What the plain model computes in float32."""
        if scaling not in self._exact:
            with fp32_products(self.device, tf32=False):
                self._exact[scaling] = self._plain_outcome(scaling, None)
        return self._exact[scaling]

    def _plain_outcome(self, scaling: str, autocast: torch.dtype | None) -> Outcome:
        names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        train = dataclasses.replace(self._train(False), precision=names[autocast])
        return model_check.outcome(self._ours(self.plain_model(scaling), train), autocast)


@dataclass
class Ready:
    """A recipe that has been built, checked and warmed up.

    Attributes:
        calls: what is timed, by direction.
        errors: relative to the plain model in float32.
        peaks: most bytes held during a call above what was held before it, by direction.
        host: seconds that the host needs to queue a call, by direction; empty where it computes itself.
    """

    calls: dict[str, Callable[[], object]]
    errors: Errors
    peaks: dict[str, int]
    host: dict[str, float]


def calls_of(built: Built, directions: Sequence[str]) -> dict[str, Callable[[], object]]:
    """What is timed of a recipe, by direction; no call leaves a gradient behind."""

    def forward() -> None:
        built.loss()

    def forward_backward() -> None:
        built.loss().backward()
        model_check.forget_gradients(built.model)

    known = {"fwd": forward, "fwd_bwd": forward_backward, "step": built.take}
    return {direction: known[direction] for direction in directions}


def prepare(bench: StepBench, name: str, recipe: Recipe, directions: Sequence[str] = ("step",)) -> Ready:
    """Build a recipe, check what it computes, warm it up, and read what a single call shows.

    Raises:
        LossMismatchError: its prediction or gradients are not those of the plain model in float32.
    """
    device = bench.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    built = bench.build(recipe)
    with warnings.catch_warnings():
        # A training run goes on eagerly where compiling fails; what is measured must be what it is called.
        warnings.filterwarnings("error", message="torch.compile failed")
        ready = Ready(calls_of(built, directions), bench.check(name, recipe, built), {}, {})
        for direction, call in ready.calls.items():
            for _ in range(WARM_UP_STEPS):
                call()
            model_check.forget_gradients(built.model)  # the authors' step frees them when it begins, not when it ends
            ready.peaks[direction] = peak_bytes(call, device)
            if device.type == "cuda":
                ready.host[direction] = host_seconds(call, device, samples=_HOST_CALLS)
            model_check.forget_gradients(built.model)
    synchronize(device)
    return ready


def free_bytes(device: torch.device) -> float:
    """What PyTorch can still allocate on a GPU; a CPU's is taken to be enough."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class VisitError(RuntimeError):
    """A recipe that had been prepared failed while it was timed; the only argument is its name."""


def named(name: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call, whose exceptions say which recipe it belongs to."""

    def run() -> None:
        try:
            call()
        except Exception as error:
            raise VisitError(name) from error

    return run


def described(what: str, error: BaseException | None) -> str:
    """One line about what failed."""
    lines = str(error).strip().splitlines()
    return f"{what}: {type(error).__name__}: {lines[0] if lines else ''}"


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
        flop: of one image, in a direction of :data:`DIRECTIONS`.
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
    """Time the recipes of one model, interleaved within each direction.

    Args:
        suite: the benchmark.
        label: the model's name in results.
        config: the model; its scaling and ``fused`` are replaced.
        device: where.
        batch_size, rounds, steps: images of a step, visits of each recipe, timed steps of a visit.
        compiled: whether recipes that compile do so.
        names: of the suite's recipes; those that the model cannot have are left out.
        screen: where progress goes.
        directions: of :data:`DIRECTIONS`.
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
    found: dict[str, Ready] = {}
    faults = []
    longest = 0.0  # seconds to compile a recipe
    need = 0.0  # bytes of a recipe: all stay, as they are timed in turns
    for name in sorted(recipes, key=lambda name: recipes[name].compiled):  # compiling may take all the time there is
        start = time.perf_counter()
        late = recipes[name].compiled and start - begun + longest > _COMPILED * seconds
        if found and (late or start - begun > _PREPARING * seconds):
            screen.print(f"Time is up; not measured: {label}, {name}.")
            continue
        room = free_bytes(device)
        if found and room < need:
            screen.print(f"Memory is short; not measured: {label}, {name}.")
            continue
        try:
            found[name] = prepare(bench, name, recipes[name], directions)
            if math.isfinite(room):
                need = max(need, room - free_bytes(device) + max(found[name].peaks.values()))
            if recipes[name].compiled:
                longest = max(longest, time.perf_counter() - start)
        except LossMismatchError:
            raise
        except Exception as error:  # compilers and drivers raise anything; the other recipes are still wanted
            faults.append(described(f"{label}, {name}", error))
            screen.print(faults[-1], style="red")
            continue
        screen.print(f"{label}, {name}: ready after {time.perf_counter() - start:.0f} s")
    ready = {name: found[name] for name in recipes if name in found}
    records = []
    for number, direction in enumerate(directions):
        share = DIRECTIONS[direction] / sum(DIRECTIONS[later] for later in directions[number:])
        now = time.perf_counter()
        times: dict[str, list[float]] = {}
        while ready and not times:
            try:
                with screen.progress(f"time {label}, {direction}", rounds * len(ready)) as advance:
                    times = interleave(
                        {name: named(name, one.calls[direction]) for name, one in ready.items()},
                        rounds=rounds,
                        steps=steps,
                        wait=lambda: synchronize(device),
                        tick=lambda name, advance=advance: advance(),
                        deadline=now + share * (begun + seconds - now),
                    )
            except VisitError as error:  # no memory left, as a rule: the others are timed without it, from the start
                name = str(error)
                faults.append(described(f"{label}, {name}, {direction}", error.__cause__))
                screen.print(faults[-1], style="red")
                del ready[name], found[name]
        flop = suite.flop(config, direction) * batch_size
        for name, one in ready.items():
            recipe = recipes[name]
            dtype = dtype_name(bench.autocast(recipe))
            summary = summarize(times[name])
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
                "rounds": len(times[name]),
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
                ratio = 1 / round_speed_up(times[reference], times[name]) if reference in times else None
                record[f"time_over_{field}"] = None if ratio is None else round(ratio, 4)
            record["sources"] = list(lists[name])
            record["source_sha256"] = hashes[lists[name]]
            records.append(record)
    return Measured(records, limits, faults)


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What records that were timed together share: all recipes of a model, batch and direction."""
    return record["model"], tuple(record["shape"]), record["direction"]


def preset_models(presets: Mapping[str, str], device: torch.device, reduced: Mapping[str, ModelConfig]):
    """The published models on a GPU, ``reduced`` elsewhere."""
    if device.type == "cuda":
        return {label: model_config(preset) for label, preset in presets.items()}
    return dict(reduced)

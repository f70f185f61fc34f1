"""``python -m benchmarks uvit``: whole training steps of the published U-ViTs: what LS costs, fused and unfused."""

import argparse
import copy
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.authors_recipe import AuthorsStep, AuthorsUViT
from benchmarks.op_variants import op_files
from benchmarks.report_uvit import REFERENCES, uvit_rows
from benchmarks.screen import Screen
from benchmarks.timing import Summary, interleave, round_speed_up, summarize, synchronize
from benchmarks.variants import STEP_SOURCES, UVIT_OPS, dtype_name
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import check_range, invalid, unknown_name
from scalelong_fast.integrations import load_uvit_checkpoint
from scalelong_fast.models import UViT, UViTConfig
from scalelong_fast.models.registry import model_config
from scalelong_fast.training.checkpoint import write_json
from scalelong_fast.training.config import RunConfig, TrainConfig
from scalelong_fast.training.hardware import Execution, resolve_execution
from scalelong_fast.training.step import Draw, TrainStep

#: Presets by the name they have in results.
MODELS = {"U-ViT-S/2": "uvit_s2", "U-ViT-M/4": "uvit_m4", "U-ViT-L/4": "uvit_l4"}
#: What a CPU is given instead: U-ViT-S/2 at a quarter of its width and depth.
REDUCED = {"embed_dim": 128, "depth": 4, "num_heads": 4}
BATCH = {"cuda": 128, "cpu": 16}

#: Largest relative difference of a first loss from that of the unfused model in float32.
TOLERANCE = 2e-2
WARM_UP_STEPS = 3
SEED = 0


@dataclass(frozen=True)
class Recipe:
    """A way to train one of the models.

    Attributes:
        scaling: of the long skips.
        fused: the model's option; None: the authors' recipe.
        compiled: whether torch.compile may be used.
    """

    scaling: str
    fused: bool | None
    compiled: bool = True


#: ``none_cat`` is the price of a U-ViT without LS; ``ls_fused`` over it, and over ``none_fused``, is the LS tax.
RECIPES = {
    "none_cat": Recipe("none", fused=False),
    "ls_cat": Recipe("ls", fused=False),
    "none_fused": Recipe("none", fused=True),
    "ls_fused": Recipe("ls", fused=True),
    "authors": Recipe("ls", fused=None, compiled=False),
    "authors_compile": Recipe("ls", fused=None),
}


class LossMismatchError(RuntimeError):
    """A recipe computes another loss than the unfused model in float32, so that its time would mean nothing."""


def training_flop(config: UViTConfig) -> int:
    """FLOP of one image's forward and backward: matrix products and attention, the backward twice the forward."""
    tokens, dim = config.num_tokens, config.embed_dim
    linear = 2 * tokens * dim * dim
    block = linear * (4 + 2 * config.mlp_ratio) + 4 * tokens * tokens * dim
    patches = 2 * 2 * tokens * dim * config.patch_size**2 * config.in_chans  # embedding and prediction
    return int(3 * ((config.depth + 1) * block + config.num_skips * 2 * linear + patches))


class Bench:
    """Builds recipes of one model on one device, from equal weights.

    Args:
        config: the U-ViT.
        device: where.
        batch_size: images a step.
        compiled: whether recipes that compile do so here.
    """

    def __init__(self, config: UViTConfig, device: torch.device, batch_size: int, compiled: bool):
        self.config, self.device, self.batch_size, self.compiled = config, device, batch_size, compiled
        self._losses: dict[str, float] = {}
        generator = torch.Generator().manual_seed(SEED)
        self.draws = [self._draw(generator) for _ in range(2)]
        torch.manual_seed(SEED)
        self.unconditional = config.num_classes <= 0 and config.clip_dim == 0
        if self.unconditional:  # the authors' recipe can be built: all start from its weights
            self._weights = AuthorsUViT(dataclasses.replace(config, scaling="ls")).state_dict()
        else:
            self._weights = UViT(dataclasses.replace(config, scaling="ls")).state_dict()

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

    def build(self, recipe: Recipe) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """The recipe as a function that takes the next step, and one that returns the loss of the first draw."""
        if recipe.fused is None:
            return self._authors(recipe)
        model = self._model(recipe.scaling, recipe.fused)
        config = RunConfig(model=model.config, train=self._train(recipe.compiled))
        schedule = create_schedule("vpsde").to(self.device)
        step = TrainStep(model, schedule, config, self.execution(recipe.compiled))
        first = self.draws[0]
        count = 0

        def take() -> Tensor:
            nonlocal count
            count += 1
            return step(count - 1, self.draws[count % len(self.draws)])

        return take, lambda: step.loss_fn(first.x0, first.noise, first.u, first.labels)

    def _authors(self, recipe: Recipe) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        model = AuthorsUViT(dataclasses.replace(self.config, scaling=recipe.scaling))
        model.load_state_dict(copy.deepcopy(self._weights))
        execution = self.execution(recipe.compiled)
        step = AuthorsStep(model.to(self.device), execution.autocast, execution.compile)
        first = self.draws[0]
        count = 0

        def take() -> Tensor:
            nonlocal count
            count += 1
            return step(self.draws[count % len(self.draws)].x0)

        return take, lambda: step.loss(first.x0, first.u, first.noise).mean()

    def _model(self, scaling: str, fused: bool) -> UViT:
        model = UViT(dataclasses.replace(self.config, scaling=scaling, fused=fused))
        weights = copy.deepcopy(self._weights)
        if self.unconditional:
            weights = {key: value for key, value in weights.items() if scaling == "ls" or not key.startswith("se.")}
            load_uvit_checkpoint(model, weights)
        else:
            own = model.state_dict().keys()
            model.load_state_dict({key: value for key, value in weights.items() if key in own})
        return model.to(self.device)

    def reference_loss(self, scaling: str) -> float:
        """The first draw's loss of the unfused model in float32."""
        if scaling not in self._losses:
            self._losses[scaling] = self._reference_loss(scaling)
        return self._losses[scaling]

    def _reference_loss(self, scaling: str) -> float:
        model = self._model(scaling, fused=False)
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


def prepare(bench: Bench, name: str, recipe: Recipe) -> Ready:
    """Build a recipe, check its loss and warm it up.

    Raises:
        LossMismatchError: its first loss is not that of the unfused model in float32.
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
            f"{name}: with equal weights, images, times and noise its loss is {loss:.8g}, that of the unfused model in "
            f"float32 {expected:.8g}; the relative error {error:.2g} is not below {TOLERANCE:g}."
        )
    for _ in range(WARM_UP_STEPS):
        take()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return Ready(take, error, peak)


def measure(
    label: str,
    config: UViTConfig,
    device: torch.device,
    *,
    batch_size: int,
    rounds: int,
    steps: int,
    compiled: bool,
    names: Sequence[str] = tuple(RECIPES),
    screen: Screen,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time the recipes of one model, interleaved.

    Args:
        label: the model's name in results.
        config: the U-ViT; its scaling and ``fused`` are replaced.
        device: where.
        batch_size, rounds, steps: images of a step, visits of each recipe, timed steps of a visit.
        compiled: whether recipes that compile do so.
        names: of :data:`RECIPES`; the authors' are left out of conditional models, which their recipe here is not for.
        screen: where progress goes.

    Returns:
        JSON records and the machine's ceilings.
    """
    bench = Bench(config, device, batch_size, compiled)
    names = [name for name in names if bench.unconditional or RECIPES[name].fused is not None]
    lists = {name: recipe_sources(RECIPES[name]) for name in names}
    hashes = {sources: environment.source_hash(sources) for sources in lists.values()}
    limits = environment.ceilings(device)
    ready: dict[str, Ready] = {}
    for name in names:
        start = time.perf_counter()
        ready[name] = prepare(bench, name, RECIPES[name])
        screen.print(f"{label}, {name}: ready after {time.perf_counter() - start:.0f} s")
    with screen.progress(f"time {label}", rounds * len(names)) as advance:
        times = interleave(
            {name: one.take for name, one in ready.items()},
            rounds=rounds,
            steps=steps,
            wait=lambda: synchronize(device),
            tick=lambda name: advance(),
        )
    records = []
    for name in names:
        recipe, execution = RECIPES[name], bench.execution(RECIPES[name].compiled)
        dtype = dtype_name(execution.autocast)
        summary: Summary = summarize(times[name])
        flop = training_flop(config) * batch_size
        peak = ready[name].peak_bytes
        record: dict[str, Any] = {
            "model": label,
            "shape": [batch_size, config.in_chans, config.img_size, config.img_size],
            "dtype": dtype,
            "residual_dtype": "fp32" if recipe.fused is None else config.residual_dtype,
            "direction": "step",
            "variant": name,
            "scaling": recipe.scaling,
            "fused": recipe.fused,
            "compiled": execution.compile,
            "median_us": round(summary.median * 1e6, 1),
            "p20_us": round(summary.p20 * 1e6, 1),
            "p80_us": round(summary.p80 * 1e6, 1),
            "images_per_second": round(batch_size / summary.median, 2),
            "bytes": None,
            "flop": flop,
            "mfu": round(flop / summary.median / 1e12 / limits["matmul_tflop_s"][_ceiling(dtype)], 4),
            "peak_mib": None if peak is None else round(peak / 2**20, 1),
            "rel_error": ready[name].error,
        }
        for reference in REFERENCES:
            known = reference in times
            record[f"time_over_{reference}"] = (
                round(1 / round_speed_up(times[reference], times[name]), 4) if known else None
            )
        record["sources"] = list(lists[name])
        record["source_sha256"] = hashes[lists[name]]
        records.append(record)
    return records, limits


def _ceiling(dtype: str) -> str:
    return "bf16" if dtype == "fp16" else dtype


def recipe_sources(recipe: Recipe) -> tuple[str, ...]:
    """Files whose code a recipe's step runs, relative to the repository."""
    if recipe.fused is None:
        return ("benchmarks/authors_recipe.py", "benchmarks/uvit.py")
    files = {*STEP_SOURCES, "benchmarks/uvit.py"}
    if recipe.scaling == "ls":
        files |= {"scalelong_fast/scaling/gates.py", "scalelong_fast/scaling/learnable.py"}
    else:
        files.add("scalelong_fast/scaling/constant.py")
    if recipe.fused:
        files |= {path for op in UVIT_OPS for path in op_files(op)}
    return tuple(sorted(files))


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


def show(records: Sequence[Mapping[str, Any]], screen: Screen) -> None:
    """Print records as a table."""
    headings, rows = uvit_rows(records)
    screen.table("Training step", headings, rows, text_columns=2)


def main(
    args: Sequence[str],
    *,
    models: Mapping[str, UViTConfig] | None = None,
    names: Sequence[str] = tuple(RECIPES),
) -> int:
    """Run the command; returns the exit code. The keywords shrink the benchmark for tests."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks uvit",
        description="Time whole training steps (forward, backward, AdamW, EMA) of the published U-ViTs: without "
        "scaling and with LS, with torch.cat and fused, all recipes of a model interleaved. On a CPU a small model "
        "stands in for all.",
    )
    parser.add_argument("--model", action="append", help=f"may be repeated; of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--device", default="auto", help="auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ...")
    parser.add_argument("--rounds", type=int, default=8, help="visits of each recipe (default: 8)")
    parser.add_argument("--steps", type=int, help="timed steps of a visit (default: 5 on a GPU, 1 on a CPU)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: 128 on a GPU, 16 on a CPU)")
    parser.add_argument("--residual-dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only, as it takes minutes"
    )
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/<machine>/uvit.json)")
    options = parser.parse_args(args)
    check_range("--rounds", options.rounds, low=1, integer=True)
    device = resolve_execution(TrainConfig(device=options.device, compile="off")).device
    gpu = device.type == "cuda"
    steps = (5 if gpu else 1) if options.steps is None else options.steps
    batch_size = BATCH[device.type] if options.batch_size is None else options.batch_size
    check_range("--steps", steps, low=1, integer=True)
    check_range("--batch-size", batch_size, low=1, integer=True)
    models = dict(models or _models(device))
    for label in options.model or ():
        if label not in models:
            if label in MODELS:
                raise invalid("--model", label, f"{', '.join(models)} on this device")
            raise unknown_name("--model", label, models)
    chosen = {label: config for label, config in models.items() if label in (options.model or models)}
    compiled = gpu if options.compile is None else options.compile
    screen = Screen(width=None if sys.stdout.isatty() else 160)
    where = environment.describe(device)
    path = options.out or environment.RESULTS / where["machine"] / "uvit.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"rounds": options.rounds, "steps_per_round": steps, "warm_up_steps": WARM_UP_STEPS}
    records = kept_records(path, where, settings)
    for label, config in chosen.items():
        config = dataclasses.replace(config, residual_dtype=options.residual_dtype)
        label = label if options.residual_dtype == "fp32" else f"{label}, bf16 stream"
        try:
            new, limits = measure(
                label,
                config,
                device,
                batch_size=batch_size,
                rounds=options.rounds,
                steps=steps,
                compiled=compiled,
                names=names,
                screen=screen,
            )
        except LossMismatchError as error:
            screen.print(f"benchmarks: error: {label}: {error}", style="red")
            return 1
        identity = _identity(new[0])
        records = [record for record in records if _identity(record) != identity] + new
        write_json(path, {"environment": where, "settings": settings, "ceilings": limits, "records": records})
        show(new, screen)
    screen.print(f"Written to {path}.")
    return 0


def _models(device: torch.device) -> dict[str, UViTConfig]:
    if device.type == "cuda":
        return {label: model_config(preset) for label, preset in MODELS.items()}
    return {"U-ViT-S/2, reduced": model_config("uvit_s2", **REDUCED)}

"""``python -m benchmarks inference``: latency and throughput of 50-step sampling, eager and compiled, none and LS."""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import environment, unet, uvit
from benchmarks.model_steps import LossMismatchError, kept_records
from benchmarks.report_inference import inference_rows
from benchmarks.screen import Screen
from benchmarks.timing import rotate, round_speed_up, summarize, synchronize
from benchmarks.variants import dtype_name
from scalelong_fast.diffusion import create_schedule, sample_images
from scalelong_fast.errors import check_range, unknown_name
from scalelong_fast.models.registry import model_config
from scalelong_fast.training.checkpoint import write_json
from scalelong_fast.training.config import TrainConfig
from scalelong_fast.training.hardware import resolve_execution

SAMPLERS = ("dpm-solver++", "ddim")
KINDS = ("eager", "compile", "ours", "ours_compile")
SCALINGS = ("none", "ls")
STEPS = 50
#: How many times the error of the plain model under the same autocast a recipe may make, and what is rounding anyway.
ERROR_FACTOR, ERROR_FLOOR = 4.0, 1e-4

_SOURCES = (
    "benchmarks/inference.py",
    "scalelong_fast/diffusion/guidance.py",
    "scalelong_fast/diffusion/samplers.py",
    "scalelong_fast/diffusion/seeds.py",
    "scalelong_fast/diffusion/solvers.py",
)
#: Models of a GPU by preset; what a CPU is given instead; and the larger of the two batches on each.
_PRESETS = {"uvit_s2": uvit.REDUCED, "unet_cifar10": {"model_channels": 32, "num_res_blocks": 1}}
_BATCHES = {"cuda": (1, 128), "cpu": (1, 4)}


def mixed(device: torch.device, autocast: torch.dtype | None) -> torch.autocast:
    """Autocast as ``scalelong-fast sample`` has it: on a GPU alone."""
    return torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None)


def models(device: torch.device) -> dict[str, Any]:
    """Configurations by their name in results; a CPU has small ones."""
    if device.type == "cuda":
        return {preset: model_config(preset) for preset in _PRESETS}
    return {f"{preset}, reduced": model_config(preset, **options) for preset, options in _PRESETS.items()}


def build(config: Any, kind: str, scaling: str, device: torch.device) -> nn.Module:
    """A model of a kind; all of one configuration have the same weights, none of them zero throughout.

    Args:
        config: of a U-ViT or a UNet; its scaling and ``fused`` are replaced.
        kind: ``eager``, the plain model (a UNet contiguous); ``compile``, the same compiled (a UNet channels_last);
            ``ours`` and ``ours_compile``, with our ops.
        scaling: of the long skips.
        device: where.
    """
    if isinstance(config, uvit.UViTConfig):
        bench, recipe = uvit.Bench(config, device, 1, False), uvit.Recipe(scaling, fused=kind.startswith("ours"))
    else:
        bench, recipe = unet.Bench(config, device, 1, False), unet.Recipe(kind, scaling)
    model = bench.model(recipe).eval()
    return torch.compile(model, dynamic=False) if kind.endswith("compile") else model


def sources(config: Any, kind: str, scaling: str) -> tuple[str, ...]:
    """Files whose code the sampling runs, relative to the repository."""
    if isinstance(config, uvit.UViTConfig):
        own = uvit.recipe_sources(uvit.Recipe(scaling, fused=kind.startswith("ours")))
    else:
        own = unet.recipe_sources(unet.Recipe(kind, scaling))
    # Of a training step's files, those that sampling runs.
    steps = ("scalelong_fast/training/", "scalelong_fast/data/", "scalelong_fast/diffusion/loss.py")
    return tuple(sorted({*_SOURCES, *(path for path in own if not path.startswith(steps))}))


def noise_error(
    name: str, model: nn.Module, plain: nn.Module, inputs: tuple[Tensor | None, ...], autocast: torch.dtype | None
) -> float:
    """‖difference‖ / ‖plain‖ of a model's noise prediction and the plain model's in float32, checked.

    Args:
        name: in the message.
        model, plain: in eval mode, from equal weights.
        inputs: images, times and labels or None.
        autocast: dtype that the model is used with.

    Raises:
        LossMismatchError: it is more than the plain model's own under the same autocast, times a factor.
    """

    def prediction(network: nn.Module, dtype: torch.dtype | None) -> Tensor:
        with torch.inference_mode(), mixed(inputs[0].device, dtype):
            return network(*inputs).float()

    exact = prediction(plain, None)
    own, usual = (float((prediction(net, autocast) - exact).norm() / exact.norm()) for net in (model, plain))
    limit = max(ERROR_FACTOR * usual, ERROR_FLOOR)
    if not own < limit:
        raise LossMismatchError(
            f"{name}: with equal weights, images and times its noise differs by {own:.2g} from the plain model's in "
            f"float32; the limit is {limit:.2g}."
        )
    return own


def measure(
    label: str,
    config: Any,
    device: torch.device,
    *,
    sampler: str,
    batch_size: int,
    steps: int,
    rounds: int,
    kinds: Sequence[str],
    screen: Screen,
    autocast: torch.dtype | None,
) -> list[dict[str, Any]]:
    """Time one sampler at one batch, all kinds and scalings interleaved; a visit is a whole sampling.

    Args:
        label, config: the model's name in results, and its configuration.
        device: where.
        sampler, batch_size, steps: of a sampling.
        rounds: samplings of each.
        kinds: of :data:`KINDS`, ``eager`` among them.
        screen: where progress goes.
        autocast: dtype, or None.

    Returns:
        JSON-ready records.

    Raises:
        LossMismatchError: a kind predicts other noise.
    """
    schedule = create_schedule("vpsde").to(device)
    shape = (config.in_chans, config.img_size, config.img_size)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch_size, *shape, generator=generator), torch.rand(batch_size, generator=generator) * 999
    labels = torch.arange(batch_size, device=device) % config.num_classes if config.num_classes > 0 else None
    inputs = x.to(device), t.to(device), labels
    ready: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    hashes: dict[str, tuple[tuple[str, ...], str | None]] = {}
    for scaling in SCALINGS:
        plain = build(config, "eager", scaling, device)
        for kind in kinds:
            name = f"{kind}_{scaling}"
            files = sources(config, kind, scaling)
            hashes[name] = files, environment.source_hash(files)
            ready[name] = build(config, kind, scaling, device)
            errors[name] = noise_error(f"{label}, {name}", ready[name], plain, inputs, autocast)

    def visit(model: nn.Module) -> float:
        synchronize(device)
        start = time.perf_counter()
        with mixed(device, autocast):
            sample_images(
                model,
                schedule,
                image_shape=shape,
                seeds=range(batch_size),
                y=labels,
                sampler=sampler,
                steps=steps,
                batch_size=batch_size,
                device=device,
            )
        synchronize(device)
        return time.perf_counter() - start

    visits: dict[str, Callable[[], float]] = {name: functools.partial(visit, model) for name, model in ready.items()}
    for run in visits.values():
        run()
    with screen.progress(f"{label}, {sampler}, batch {batch_size}", rounds * len(visits)) as advance:
        times = rotate(visits, rounds=rounds, tick=lambda name: advance())
    records = []
    for name in ready:
        kind, scaling = name.rsplit("_", 1)
        summary = summarize(times[name])
        files, digest = hashes[name]
        records.append(
            {
                "model": label,
                "shape": [batch_size, *shape],
                "dtype": dtype_name(autocast),
                "direction": "sample",
                "variant": name,
                "scaling": scaling,
                "compiled": kind.endswith("compile"),
                "sampler": sampler,
                "steps": steps,
                "median_us": round(summary.median * 1e6, 1),
                "p20_us": round(summary.p20 * 1e6, 1),
                "p80_us": round(summary.p80 * 1e6, 1),
                "images_per_second": round(batch_size / summary.median, 3),
                "rel_error": errors[name],
                "time_over_eager": round(1 / round_speed_up(times[f"eager_{scaling}"], times[name]), 4),
                "time_over_no_scaling": round(1 / round_speed_up(times[f"{kind}_none"], times[name]), 4),
                "sources": list(files),
                "source_sha256": digest,
            }
        )
    return records


def main(args: Sequence[str], *, chosen: Mapping[str, Any] | None = None) -> int:
    """Run the command; returns the exit code. The keyword shrinks the benchmark for tests."""
    options = _parser().parse_args(args)
    for argument in ("rounds", "steps"):
        check_range(f"--{argument}", getattr(options, argument), low=1, integer=True)
    execution = resolve_execution(TrainConfig(device=options.device, compile="off"))
    device = execution.device
    for batch_size in options.batch_size or ():
        check_range("--batch-size", batch_size, low=1, integer=True)
    for sampler in options.sampler or ():
        if sampler not in SAMPLERS:
            raise unknown_name("--sampler", sampler, SAMPLERS)
    found = dict(models(device) if chosen is None else chosen)
    for label in options.model or ():
        if label not in found:
            raise unknown_name("--model", label, found)
    compiled = device.type == "cuda" if options.compile is None else options.compile
    kinds = [kind for kind in KINDS if compiled or not kind.endswith("compile")]
    screen = Screen(width=None if sys.stdout.isatty() else 160)
    where = environment.describe(device)
    path = options.out or environment.RESULTS / where["machine"] / "inference.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"rounds": options.rounds, "steps": options.steps}
    records = kept_records(path, where, settings)
    limits = environment.ceilings(device)
    for label, config in found.items():
        if label not in (options.model or found):
            continue
        for sampler in options.sampler or SAMPLERS:
            for batch_size in options.batch_size or _BATCHES[device.type]:
                try:
                    new = measure(
                        label,
                        _plain(config),
                        device,
                        sampler=sampler,
                        batch_size=batch_size,
                        steps=options.steps,
                        rounds=options.rounds,
                        kinds=kinds,
                        screen=screen,
                        autocast=execution.autocast if device.type == "cuda" else None,
                    )
                except LossMismatchError as error:
                    screen.print(f"benchmarks: error: {error}", style="red")
                    return 1
                ours = {_identity(record) for record in new}
                records = [record for record in records if _identity(record) not in ours] + new
                write_json(path, {"environment": where, "settings": settings, "ceilings": limits, "records": records})
                screen.table("Sampling", *inference_rows(new), text_columns=3)
    screen.print(f"Written to {path}.")
    return 0


def _plain(config: Any) -> Any:
    return dataclasses.replace(config, dropout=0.0) if hasattr(config, "dropout") else config


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["model"], tuple(record["shape"]), record["sampler"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks inference",
        description="Time whole samplings: latency at batch 1 and throughput at a larger one, of a U-ViT and a UNet, "
        "without scaling and with LS; the plain model and ours, eager and compiled, all interleaved.",
    )
    parser.add_argument("--model", action="append", help=f"may be repeated; of {', '.join(_PRESETS)} (default: all)")
    parser.add_argument("--sampler", action="append", help=f"may be repeated; of {', '.join(SAMPLERS)} (default: all)")
    parser.add_argument("--batch-size", type=int, action="append", help="may be repeated (default: 1 and a larger one)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"calls of the model for an image (default: {STEPS})")
    parser.add_argument("--rounds", type=int, default=5, help="samplings of each (default: 5)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only, as it takes minutes"
    )
    parser.add_argument("--device", default="auto", help="auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ...")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/<machine>/inference.json)")
    return parser

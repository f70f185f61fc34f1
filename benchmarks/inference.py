"""``python -m benchmarks inference``: latency and throughput of 50-step sampling, eager and compiled, none and LS."""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks import environment
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
from benchmarks.op_timing import peak_bytes
from benchmarks.report_inference import inference_rows
from benchmarks.sampling import (
    BATCHES,
    KINDS,
    PRESETS,
    SAMPLERS,
    SCALINGS,
    STEPS,
    build,
    labels_of,
    models,
    noise_error,
    predict,
    sample,
    sources,
)
from benchmarks.screen import Screen
from benchmarks.timing import check_seconds, described, rotate, round_speed_up, summarize, survivors, synchronize
from benchmarks.variants import dtype_name
from scalelong_fast.errors import check_range
from scalelong_fast.training.checkpoint import write_json
from scalelong_fast.training.hardware import autocast_dtype

#: Seconds for all.
SECONDS = {"cuda": 480.0, "cpu": 170.0}
#: Share of the time of a model and batch after which no further network is compiled.
COMPILING = 0.6


@dataclass
class Ready:
    """Networks of one model and batch that predict the right noise, by name; all samplers use the same ones.

    Attributes:
        networks: to be sampled with.
        errors: of the noise.
        peaks: most bytes held during a call above what was held before it.
        files: whose code a sampling runs, and their hash.
        faults: a line for each that failed.
    """

    networks: dict[str, nn.Module] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    files: dict[str, tuple[tuple[str, ...], str | None]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def prepare(
    label: str,
    config: Any,
    device: torch.device,
    *,
    batch_size: int,
    kinds: Sequence[str],
    screen: Screen,
    autocast: torch.dtype | None,
    deadline: float = math.inf,
) -> Ready:
    """Build the networks, and check what they predict; arguments as for :func:`measure`.

    Args:
        deadline: reading of ``time.perf_counter`` after which no network is compiled.
    """
    torch.compiler.reset()  # one function's compiled forms are limited in number
    shape = (config.in_chans, config.img_size, config.img_size)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch_size, *shape, generator=generator), torch.rand(batch_size, generator=generator) * 999
    inputs = x.to(device), t.to(device), labels_of(config, batch_size, device)
    ready = Ready()
    plain = {scaling: build(config, "eager", scaling, device) for scaling in SCALINGS}
    # What compiles comes last: it may take all the time there is.
    for kind, scaling in itertools.product(sorted(kinds, key=is_compiled), SCALINGS):
        name = f"{kind}_{scaling}"
        if is_compiled(kind) and time.perf_counter() > deadline:
            screen.print(f"Time is up; not measured: {label}, batch {batch_size}, {name}.")
            continue
        files = sources(config, kind, scaling)
        ready.files[name] = files, environment.source_hash(files)
        try:
            network = plain[scaling] if kind == "eager" else build(config, kind, scaling, device)
            error = noise_error(f"{label}, {name}", network, plain[scaling], inputs, autocast)
            ready.peaks[name] = peak_bytes(functools.partial(predict, network, inputs, autocast), device)
        except Exception as fault:  # compilers and drivers raise anything; the other networks are still wanted
            ready.faults.append(described(f"{label}, batch {batch_size}, {name}", fault))
            screen.print(ready.faults[-1], style="red")
            continue
        ready.networks[name], ready.errors[name] = network, error
    return ready


def is_compiled(kind: str) -> bool:
    """Whether networks of a kind go through torch.compile."""
    return kind.endswith("compile")


def measure(
    label: str,
    config: Any,
    device: torch.device,
    ready: Ready,
    *,
    sampler: str,
    batch_size: int,
    steps: int,
    rounds: int,
    screen: Screen,
    autocast: torch.dtype | None,
    deadline: float = math.inf,
) -> list[dict[str, Any]]:
    """Time one sampler at one batch, all kinds and scalings interleaved; a visit is a whole sampling.

    Args:
        label, config: the model's name in results, and its configuration.
        device: where.
        ready: the networks.
        sampler, batch_size, steps: of a sampling.
        rounds: samplings of each.
        screen: where progress goes.
        autocast: dtype, or None.
        deadline: as for :func:`~benchmarks.timing.rotate`.

    Returns:
        JSON-ready records.
    """
    shape = (config.in_chans, config.img_size, config.img_size)

    def visit(model: nn.Module) -> float:
        synchronize(device)
        start = time.perf_counter()
        sample(model, config, device, sampler=sampler, batch_size=batch_size, steps=steps, autocast=autocast)
        return time.perf_counter() - start

    runs = {name: functools.partial(visit, network) for name, network in ready.networks.items()}
    order = [f"{kind}_{scaling}" for scaling in SCALINGS for kind in KINDS]

    def failed(name: str, error: BaseException) -> list[str]:
        ready.faults.append(described(f"{label}, {sampler}, batch {batch_size}, {name}", error))
        screen.print(ready.faults[-1], style="red")
        return []

    def timed(visits: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
        with screen.progress(f"{label}, {sampler}, batch {batch_size}", rounds * len(visits)) as advance:
            return rotate(visits, rounds=rounds, tick=lambda name: advance(), deadline=deadline)

    for name in [name for name in order if name in runs]:  # the first sampling warms up
        try:
            runs[name]()
        except Exception as error:  # as in preparing
            failed(name, error)
            del runs[name]
    times = survivors(timed, {name: runs[name] for name in order if name in runs}, failed)

    def over(name: str, other: str) -> float | None:
        return round(1 / round_speed_up(times[other], times[name]), 4) if other in times else None

    records = []
    for name in times:
        kind, scaling = name.rsplit("_", 1)
        summary = summarize(times[name])
        files, digest = ready.files[name]
        records.append(
            {
                "model": label,
                "shape": [batch_size, *shape],
                "dtype": dtype_name(autocast),
                "direction": "sample",
                "variant": name,
                "scaling": scaling,
                "compiled": is_compiled(kind),
                "sampler": sampler,
                "steps": steps,
                "rounds": len(times[name]),
                "median_us": round(summary.median * 1e6, 1),
                "p20_us": round(summary.p20 * 1e6, 1),
                "p80_us": round(summary.p80 * 1e6, 1),
                "images_per_second": round(batch_size / summary.median, 3),
                "peak_mib": round(ready.peaks[name] / 2**20, 2),
                "rel_error": ready.errors[name],
                "time_over_eager": over(name, f"eager_{scaling}"),
                "time_over_no_scaling": over(name, f"{kind}_none"),
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
    device = device_of(options)
    budget = SECONDS[device.type] if options.seconds is None else options.seconds
    check_seconds(budget)
    for batch_size in options.batch_size or ():
        check_range("--batch-size", batch_size, low=1, integer=True)
    check_names("--sampler", options.sampler, SAMPLERS)
    found = dict(models(device) if chosen is None else chosen)
    check_names("--model", options.model, found)
    compiled = compiles(options, device)
    kinds = [kind for kind in KINDS if compiled or not kind.endswith("compile")]
    screen = Screen(width=None if sys.stdout.isatty() else 160)
    where = environment.describe(device)
    path = result_path(options, where, "inference")
    settings = {"rounds": options.rounds, "steps": options.steps}
    records = kept_records(path, where, settings)
    limits = environment.ceilings(device)
    labels = [label for label in found if label in (options.model or found)]
    samplers = options.sampler or SAMPLERS
    pairs = list(itertools.product(labels, options.batch_size or BATCHES[device.type]))
    autocast = autocast_dtype("auto-gpu", device)
    faults: list[str] = []
    begun = time.perf_counter()
    for number, (label, batch_size) in enumerate(pairs, start=1):
        config, start = _plain(found[label]), time.perf_counter()
        ready = None
        # What one leaves of its time is the next one's.
        end = begun + budget * number / len(pairs)
        for index, sampler in enumerate(samplers):
            now = time.perf_counter()
            if now > begun + budget:
                screen.print(f"Time is up; not measured: {label}, {sampler}, batch {batch_size}.")
                continue
            same = {"batch_size": batch_size, "screen": screen, "autocast": autocast}
            if ready is None:
                ready = prepare(label, config, device, kinds=kinds, deadline=start + COMPILING * (end - start), **same)
                now = time.perf_counter()
            new = measure(
                label,
                config,
                device,
                ready,
                sampler=sampler,
                steps=options.steps,
                rounds=options.rounds,
                deadline=now + (end - now) / (len(samplers) - index),
                **same,
            )
            if new:
                records = merge(records, new, _identity, screen)
                write_json(path, {"environment": where, "settings": settings, "ceilings": limits, "records": records})
                screen.table("Sampling", *inference_rows(new), text_columns=3)
        faults += [] if ready is None else ready.faults
    return finish(screen, faults, path if records else None)


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
    parser.add_argument("--model", action="append", help=f"may be repeated; of {', '.join(PRESETS)} (default: all)")
    parser.add_argument("--sampler", action="append", help=f"may be repeated; of {', '.join(SAMPLERS)} (default: all)")
    parser.add_argument("--batch-size", type=int, action="append", help="may be repeated (default: 1 and a larger one)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"calls of the model for an image (default: {STEPS})")
    parser.add_argument("--rounds", type=int, default=5, help="samplings of each (default: 5)")
    add_compile(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"end after about this time ({by_device(SECONDS)}): make fewer rounds, and leave out what comes last",
    )
    add_device(parser)
    add_out(parser, "inference")
    return parser

"""``python -m benchmarks step``: a whole training step, ours against the authors' recipe, in one process."""

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import environment
from benchmarks.command import add_device, add_out, check_names, device_of, finish, result_path
from benchmarks.screen import Screen
from benchmarks.timing import check_seconds, interleave, round_speed_up, speed_up, summarize, synchronize
from benchmarks.uvit import training_flop
from benchmarks.variants import HASHES, MODEL, VARIANTS, Variant, Workbench, as_trained
from scalelong_fast.errors import check_range, unknown_name
from scalelong_fast.models import UViTConfig
from scalelong_fast.training.checkpoint import write_json

#: Variants that the others are set in relation to; ours_none shows what LS costs.
REFERENCES = ("authors_fp32", "authors_bf16", "ours_none")

#: Largest relative difference of a variant's first loss from that of the authors' recipe in float32.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}

WARM_UP_STEPS = 3
#: Share of a budget of time after which no further variant is built.
_PREPARING = 0.6


class LossMismatchError(RuntimeError):
    """A variant computes another loss than the authors' recipe, so that its time would mean nothing."""


def relative_error(name: str, variant: Variant, loss: float, reference: float) -> float:
    """|loss − reference| / reference of a variant, checked.

    Raises:
        LossMismatchError: it exceeds :data:`TOLERANCE` or is not a number.
    """
    error = abs(loss - reference) / abs(reference)
    limit = TOLERANCE[variant.dtype]
    if not error < limit:
        raise LossMismatchError(
            f"{name}: with equal weights, images, times and noise its loss is {loss:.8g}, that of the authors' recipe "
            f"{reference:.8g}; the relative error {error:.2g} is not below {limit:g} ({variant.dtype})."
        )
    return error


def measure(
    device: torch.device,
    *,
    rounds: int = 12,
    steps: int = 3,
    model: UViTConfig = MODEL,
    batch_size: int = 32,
    names: Sequence[str] = tuple(VARIANTS),
    screen: Screen | None = None,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Time the variants interleaved.

    Args:
        device: where.
        rounds: visits of each variant.
        steps: timed steps of a visit.
        model: the U-ViT; unconditional, scaling ``ls``.
        batch_size: images a step.
        names: of :data:`~benchmarks.variants.VARIANTS`.
        screen: where progress goes.
        seconds: time after which no further variant is built, but for the first, and no further round begun.

    Returns:
        Environment, ceilings and a record for each variant, JSON-ready. ``ratio_to_<reference>`` is the reference's
        median time over the variant's (above 1: the variant is faster), ``round_ratio_to_<reference>`` the median of
        the rounds' own ratios; both are None where the reference was not measured.

    Raises:
        UserError: an unknown variant.
        LossMismatchError: a variant's loss differs from the authors'.
    """
    screen = screen or Screen()
    for name in names:
        if name not in VARIANTS:
            raise unknown_name("variant", name, VARIANTS)
    check_range("--rounds", rounds, low=1, integer=True)
    check_range("--steps", steps, low=1, integer=True)
    check_seconds(seconds)
    begun = time.perf_counter()
    bench = Workbench(device, model, batch_size)
    for note in bench.execution().notes:
        screen.print(note)
    limits = environment.ceilings(device)
    variants: dict[str, Variant] = {}
    errors: dict[str, float] = {}
    with screen.progress("build, compile, warm up", len(names)) as advance:
        for name in names:
            start = time.perf_counter()
            if variants and start - begun > _PREPARING * seconds:
                screen.print(f"Time is up; not measured: {name}.")
                advance()
                continue
            variant = VARIANTS[name](bench)
            errors[name] = relative_error(name, variant, bench.probe(variant), bench.reference_loss(variant.scaling))
            for _ in range(WARM_UP_STEPS):
                variant.step()
            synchronize(device)
            variants[name] = variant
            advance()
            screen.print(f"{name}: ready after {time.perf_counter() - start:.0f} s")
    screen.print(f"timing {rounds} rounds of {steps + 1} steps of each")
    with screen.progress("time", rounds * len(names)) as advance:
        times = interleave(
            {name: variant.step for name, variant in variants.items()},
            rounds=rounds,
            steps=steps,
            wait=lambda: synchronize(device),
            tick=lambda name: advance(),
            around=lambda name: as_trained(name, device),
            deadline=begun + seconds,
        )
    shape = [batch_size, model.in_chans, model.img_size, model.img_size]
    label = f"U-ViT/{model.patch_size}, D {model.embed_dim}, depth {model.depth}"
    flop = training_flop(model) * batch_size
    return {
        "environment": environment.describe(device),
        "settings": {"rounds": rounds, "steps_per_round": steps, "warm_up_steps": WARM_UP_STEPS},
        "ceilings": limits,
        "records": [
            _record(name, variant, times, errors[name], label, shape, flop, limits)
            for name, variant in variants.items()
        ],
    }


def _record(
    name: str,
    variant: Variant,
    times: dict[str, list[float]],
    error: float,
    model: str,
    shape: list[int],
    flop: int,
    limits: dict[str, Any],
) -> dict[str, Any]:
    summary = summarize(times[name])
    ceiling = limits["matmul_tflop_s"]["bf16" if variant.dtype == "fp16" else variant.dtype]
    record: dict[str, Any] = {
        "model": model,
        "shape": shape,
        "dtype": variant.dtype,
        "direction": "step",
        "variant": name,
        "scaling": variant.scaling,
        "compiled": variant.compiled,
        "median_us": round(summary.median * 1e6, 1),
        "p20_us": round(summary.p20 * 1e6, 1),
        "p80_us": round(summary.p80 * 1e6, 1),
        "images_per_second": round(shape[0] / summary.median, 2),
        "rounds": len(times[name]),
        "flop": flop,
        "mfu": round(flop / summary.median / 1e12 / ceiling, 4),
        "rel_error": error,
    }
    for reference in REFERENCES:
        both = (times[reference], times[name]) if reference in times else None
        record[f"ratio_to_{reference}"] = both and round(speed_up(*both), 4)
        record[f"round_ratio_to_{reference}"] = both and round(round_speed_up(*both), 4)
    record["sources"] = list(variant.sources)
    record["source_sha256"] = HASHES[variant.sources]
    return record


def show(result: dict[str, Any], screen: Screen) -> None:
    """Print a result as a table."""
    where = result["environment"]
    first = result["records"][0]
    title = (
        f"Training step, {first['model']}, batch {first['shape'][0]}, {where['machine']}, {where['threads']} threads"
    )
    headings = (
        "variant",
        "dtype",
        "ms",
        "p20 … p80",
        "images/s",
        "MFU",
        "× authors fp32",
        "× authors bf16",
        "loss error",
    )
    rows = []
    for record in result["records"]:
        ratios = [record[f"ratio_to_{name}"] for name in ("authors_fp32", "authors_bf16")]
        rows.append(
            [
                record["variant"],
                record["dtype"],
                f"{record['median_us'] / 1e3:.1f}",
                f"{record['p20_us'] / 1e3:.1f} … {record['p80_us'] / 1e3:.1f}",
                f"{record['images_per_second']:.1f}",
                f"{record['mfu']:.1%}",
                *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                f"{record['rel_error']:.1e}",
            ]
        )
    screen.table(title, headings, rows, text_columns=2)


def main(
    args: Sequence[str],
    *,
    model: UViTConfig = MODEL,
    batch_size: int = 32,
    names: Sequence[str] = tuple(VARIANTS),
) -> int:
    """Run the command; returns the exit code. The keywords shrink the benchmark for tests."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks step",
        description="Time whole training steps (forward, backward, AdamW, EMA), all variants interleaved in this "
        "process. Run it with nothing else on the machine.",
    )
    parser.add_argument("--variant", action="append", help=f"may be repeated; of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=12, help="visits of each variant (default: 12)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a visit (default: 3; on a GPU take 50)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after about this time, with fewer rounds")
    add_device(parser)
    add_out(parser, "step")
    options = parser.parse_args(args)
    check_names("--variant", options.variant, VARIANTS)
    screen = Screen()
    device = device_of(options)
    try:
        result = measure(
            device,
            rounds=options.rounds,
            steps=options.steps,
            model=model,
            batch_size=batch_size,
            names=options.variant or names,
            screen=screen,
            seconds=options.seconds,
        )
    except LossMismatchError as error:
        screen.print(f"benchmarks: error: {error}", style="red")
        return 1
    path = result_path(options, result["environment"], "step")
    write_json(path, result)
    show(result, screen)
    return finish(screen, [], path)

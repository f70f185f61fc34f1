"""``python -m benchmarks attention``: self-attention at the models' shapes, all backends, checked and interleaved."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import environment
from benchmarks.attention_cases import AttentionCase, cases, total_bytes, total_flop, variants
from benchmarks.command import add_device, add_out, by_device, check_names, device_of, finish, result_path
from benchmarks.floors import DIRECTIONS
from benchmarks.kept import kept_records, merge
from benchmarks.ops import Outcome, measure_case
from benchmarks.report_attention import attention_rows
from benchmarks.screen import Screen
from benchmarks.timing import check_seconds, round_speed_up, summarize
from scalelong_fast.errors import check_range
from scalelong_fast.training.checkpoint import write_json

ROUNDS = {"cuda": 20, "cpu": 5}
#: Seconds after which no further shape begins.
SECONDS = {"cuda": 480.0, "cpu": 150.0}


def records_of(
    case: AttentionCase, outcomes: Sequence[Outcome], limits: Mapping[str, Any], hashes: Mapping[Any, str | None]
) -> list[dict[str, Any]]:
    """The JSON records of a case; a time over another's is the median of the rounds' own."""
    by_name = {outcome.variant.name: outcome for outcome in outcomes}
    matmul = limits["matmul_tflop_s"]["fp32" if case.dtype == torch.float32 else "bf16"] * 1e12
    records = []
    for direction in DIRECTIONS:
        moved, flop = total_bytes(case, direction), total_flop(case.shape, direction)
        floor = max(moved / (limits["copy_gb_s"] * 1e9), flop / matmul)
        for outcome in outcomes:
            timed = outcome.note is None
            record: dict[str, Any] = {
                "model": case.model,
                "shape": list(case.shape),
                "dtype": case.dtype_name,
                "direction": direction,
                "variant": outcome.variant.name,
                "note": outcome.note,
                "failed": outcome.failed,
                "bytes": moved,
                "flop": flop,
                "floor_us": _round(floor * 1e6),
                "rel_error": outcome.errors[direction] if timed else None,
                "peak_mib": _round(outcome.peaks[direction] / 2**20) if timed else None,
                "launches": outcome.launches[direction] if timed else None,
            }
            for key in ("median_us", "p20_us", "p80_us", "timer", "gb_s", "tflop_s", "fraction_of_floor"):
                record[key] = None
            for name in ("math", "authors_fp32", "sdpa"):
                record[f"time_over_{name}"] = None
            if timed:
                record |= _timings(outcome, by_name, direction, moved, flop, floor)
            record["sources"] = list(outcome.variant.sources)
            record["source_sha256"] = hashes[outcome.variant.sources]
            records.append(record)
    return records


def _timings(
    outcome: Outcome, by_name: Mapping[str, Outcome], direction: str, moved: int, flop: int, floor: float
) -> dict[str, Any]:
    times = outcome.times[direction]
    summary = summarize(times)
    found = {
        "median_us": _round(summary.median * 1e6),
        "p20_us": _round(summary.p20 * 1e6),
        "p80_us": _round(summary.p80 * 1e6),
        "timer": outcome.timers[direction],
        "gb_s": _round(moved / summary.median / 1e9),
        "tflop_s": _round(flop / summary.median / 1e12),
        "fraction_of_floor": round(floor / summary.median, 4),
    }
    for name in ("math", "authors_fp32", "sdpa"):
        if by_name[name].note is None:
            ratio = round_speed_up(by_name[name].times[direction], times)
            found[f"time_over_{name}"] = round(1 / ratio, 4)
    return found


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record["shape"]), record["dtype"]


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def main(
    args: Sequence[str], *, selected: Sequence[AttentionCase] | None = None, visit_seconds: float | None = None
) -> int:
    """Run the command; returns the exit code. The keywords shrink the benchmark for tests."""
    options = _parser().parse_args(args)
    device = device_of(options)
    rounds = ROUNDS[device.type] if options.rounds is None else options.rounds
    check_range("--rounds", rounds, low=1, integer=True)
    budget = SECONDS[device.type] if options.seconds is None else options.seconds
    check_seconds(budget)
    found = cases(device) if selected is None else list(selected)
    known = list(dict.fromkeys(case.model for case in found))
    check_names("--model", options.model, known)
    found = [case for case in found if case.model in (options.model or known)]
    screen = Screen(width=None if sys.stdout.isatty() else 160)
    where = environment.describe(device)
    path = result_path(options, where, "attention")
    limits = environment.ceilings(device)
    lists = {v.sources for case in found[:1] for v in variants(case, device, case.example(device))}
    hashes = {sources: environment.source_hash(sources) for sources in lists}
    settings = {"rounds": rounds}
    records = kept_records(path, where, settings)
    faults: list[str] = []
    begun = time.perf_counter()
    with screen.progress("attention", len(found)) as advance:
        for number, case in enumerate(found):
            if time.perf_counter() - begun > budget:
                screen.print(f"Time is up; not measured: {', '.join(map(str, found[number:]))}.")
                break
            outcomes = measure_case(case, device, rounds=rounds, visit_seconds=visit_seconds, variants_of=variants)
            faults += [f"{case}: {one.variant.name}: {one.note}" for one in outcomes if one.failed]
            new = records_of(case, outcomes, limits, hashes)
            records = merge(records, new, _identity, screen)
            write_json(path, {"environment": where, "settings": settings, "ceilings": limits, "records": records})
            advance()
    screen.table("Attention", *attention_rows(records), text_columns=4)
    return finish(screen, faults, path if records else None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks attention",
        description="Time self-attention forward (fwd), backward (bwd) and both (fwd_bwd) at the presets' shapes: "
        "explicit products, the authors' in float32, PyTorch's, xformers' where it is installed, and on a CPU ours; "
        "all interleaved, each checked against float64.",
    )
    parser.add_argument("--model", action="append", help="a preset; may be repeated (default: all, on a CPU a few)")
    parser.add_argument("--rounds", type=int, help=f"visits of each backend ({by_device(ROUNDS)})")
    parser.add_argument("--seconds", type=float, help=f"begin no further shape after this time ({by_device(SECONDS)})")
    add_device(parser)
    add_out(parser, "attention")
    return parser

"""``python -m benchmarks ops``: every op, shape and direction; PyTorch eager and compiled against each of our plans."""

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.command import add_device, add_out, check_names, device_of, finish
from benchmarks.floors import DIRECTIONS, Limits, total_bytes, total_flop
from benchmarks.op_cases import OPS, Case, cases
from benchmarks.op_timing import (
    VISIT_SECONDS,
    Visit,
    WrongResultError,
    accuracy,
    argument_sets,
    check_accuracy,
    count_launches,
    exact_results,
    host_seconds,
    kept_graphs,
    make_calls,
    make_visit,
    peak_bytes,
    time_visits,
    working_stream,
)
from benchmarks.op_variants import Variant, no_interpreter, source_lists, variants
from benchmarks.report_ops import case_name, ops_summary
from benchmarks.screen import Screen
from benchmarks.timing import speed_up, summarize
from scalelong_fast.errors import UserError, check_range
from scalelong_fast.training.checkpoint import write_json
from scalelong_fast.training.hardware import find_cxx_compiler

ROUNDS = {"cuda": 20, "cpu": 7}

#: Batch of the calls whose host time is read: small inputs, on which launching costs more than computing.
_SMALL_BATCH = {"cuda": 16, "cpu": 1}


@dataclass
class Outcome:
    """What came of one variant of a case.

    Attributes:
        variant: the variant.
        note: why there are no times, or None.
        failed: whether that is a fault, not a lack of support.
        errors: of each direction, relative, against float64.
        peaks: bytes, of each direction.
        host: seconds, of each direction.
        launches: of each direction.
        times: seconds, one number for each round, of each direction.
        timers: of each direction.
    """

    variant: Variant
    note: str | None = None
    failed: bool = False
    errors: dict[str, float | None] | None = None
    peaks: dict[str, int] | None = None
    host: dict[str, float] | None = None
    launches: dict[str, int | None] | None = None
    times: dict[str, list[float]] | None = None
    timers: dict[str, str] | None = None


def measure_case(
    case: Case,
    device: torch.device,
    *,
    rounds: int,
    visit_seconds: float | None = None,
    without: Sequence[str] = (),
    variants_of: Callable[..., list[Variant]] = variants,
) -> list[Outcome]:
    """Check and time every variant of a case in every direction.

    Args:
        case: the call.
        device: where.
        rounds: visits of each variant.
        visit_seconds: length of a visit; None: what suits the device.
        without: names of variants to leave out.
        variants_of: what is timed, from case, device and arguments; the case needs no more than it and
            :mod:`benchmarks.op_timing` ask for.
    """
    torch.compiler.reset()  # one function's compiled forms are limited in number
    with no_interpreter(), kept_graphs(), working_stream(device):
        examples = argument_sets(case, device)
        found = [v for v in variants_of(case, device, examples[0]) if v.name not in without]
        outcomes = [Outcome(variant, note=_obstacle(variant, device)) for variant in found]
        _check(case, examples[0], outcomes)
        for outcome in outcomes:
            _attempt(outcome, lambda one: _read_once(case, one, examples[0], device))
        _count_launches(case, outcomes, examples[0], device)
        for direction in DIRECTIONS:
            visits: dict[str, Visit] = {}
            _prepare(case, outcomes, examples, direction, device, visits)
            times = time_visits(visits, rounds=rounds, device=device, visit_seconds=visit_seconds)
            for outcome in outcomes:
                name = outcome.variant.name
                if name in visits:
                    outcome.times[direction], outcome.timers[direction] = times[name], visits[name].timer
            visits.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return outcomes


def _prepare(
    case: Case,
    outcomes: Sequence[Outcome],
    examples: Sequence[Any],
    direction: str,
    device: torch.device,
    visits: dict[str, Visit],
) -> None:
    def prepare(outcome: Outcome) -> None:
        visits[outcome.variant.name] = make_visit(case, outcome.variant, examples, direction, device)

    for outcome in outcomes:
        _attempt(outcome, prepare)


def _obstacle(variant: Variant, device: torch.device) -> str | None:
    if variant.name == "compile" and device.type == "cpu" and find_cxx_compiler() is None:
        return "not supported: torch.compile finds no C++ compiler here"
    return variant.obstacle


def _check(case: Case, example: Any, outcomes: Sequence[Outcome]) -> None:
    """Fill in errors; a variant that fails or computes something else keeps a note instead."""
    definition = Variant("definition", case.reference())
    cotangents = case.cotangents(definition(case, example))
    exact = exact_results(case, example, cotangents)
    yardstick = accuracy(case, definition, example, cotangents, exact)

    def look(outcome: Outcome) -> None:
        own = accuracy(case, outcome.variant, example, cotangents, exact)
        outcome.errors = {d: own.worst(d) for d in DIRECTIONS}
        check_accuracy(case, outcome.variant.name, own, yardstick)

    for outcome in outcomes:
        _attempt(outcome, look)


def _attempt(outcome: Outcome, action: Callable[[Outcome], None]) -> None:
    """Do something with a variant that has no note; what it raises becomes one: the other variants are still wanted."""
    if outcome.note is not None:
        return
    try:
        action(outcome)
    except WrongResultError as error:
        outcome.note, outcome.failed = f"wrong result: {error}", True
    except Exception as error:  # compilers and drivers raise anything
        lines = str(error).strip().splitlines()
        outcome.note, outcome.failed = f"failed: {type(error).__name__}: {lines[0] if lines else ''}", True


def _read_once(case: Case, outcome: Outcome, example: Any, device: torch.device) -> None:
    """Memory and host time, from single calls."""
    variant = outcome.variant
    outcome.peaks, outcome.host, outcome.times, outcome.timers = {}, {}, {}, {}
    compiled = variant.name == "compile"
    small = example if compiled else case.example(device, min(case.shape[0], _SMALL_BATCH[device.type]))
    with variant.forced():
        calls = {d: make_calls(case, variant, [example], d)[0] for d in DIRECTIONS}
        for direction, call in calls.items():
            call()
            outcome.peaks[direction] = peak_bytes(call, device)
        if compiled and device.type == "cpu":
            return  # compiled for one shape, and on a CPU a large call is no measure of what calling costs
        for direction in DIRECTIONS:
            outcome.host[direction] = host_seconds(make_calls(case, variant, [small], direction)[0], device)


def _count_launches(case: Case, outcomes: Sequence[Outcome], example: Any, device: torch.device) -> None:
    """Launches of all variants, under one profiler: starting it is slow."""

    def forced(variant: Variant, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with variant.forced():
                return call()

        return run

    able = [o for o in outcomes if o.note is None]
    calls = {}
    for outcome in able:
        for direction in DIRECTIONS:
            (call,) = make_calls(case, outcome.variant, [example], direction)
            calls[f"{outcome.variant.name}:{direction}"] = forced(outcome.variant, call)
    counts = count_launches(calls, device)
    for outcome in able:
        outcome.launches = {d: counts[f"{outcome.variant.name}:{d}"] for d in DIRECTIONS}


def records_of(
    case: Case, outcomes: Sequence[Outcome], limits: Limits, hashes: Mapping[tuple[str, ...], str | None], run: str
) -> list[dict[str, Any]]:
    """The JSON records of a case."""
    records = []
    dispatch = next((o.variant.plan for o in outcomes if o.variant.name == "dispatch"), None)
    by_name = {o.variant.name: o for o in outcomes}
    for direction in DIRECTIONS:
        moved, flop = total_bytes(case, direction), total_flop(case, direction)
        floor = limits.floor(case, direction)
        for outcome in outcomes:
            variant = outcome.variant
            record: dict[str, Any] = {
                "op": case.name,
                "shape": list(case.shape),
                "dtype": case.dtype_name,
                "layout": case.layout,
                "direction": direction,
                "variant": variant.name,
                "plan": variant.plan,
                "dispatch": dispatch,
                "note": outcome.note,
                "failed": outcome.failed,
                **_timings(outcome, by_name, direction),
                "bytes": moved,
                "flop": flop,
                "floor_us": _round(floor * 1e6),
                "peak_mib": None,
                "host_us": None,
                "launches": None,
                "rel_error": None,
            }
            if outcome.errors is not None:
                error = outcome.errors[direction]
                record["rel_error"] = error if math.isfinite(error) else None
            if record["median_us"] is not None:
                median = record["median_us"] / 1e6
                record["gb_s"] = round(moved / median / 1e9, 2)
                record["fraction_of_floor"] = round(floor / median, 4)
                record["peak_mib"] = _round(outcome.peaks[direction] / 2**20)
                record["host_us"] = _round(outcome.host[direction] * 1e6) if direction in outcome.host else None
                record["launches"] = outcome.launches[direction]
            record["run"] = run
            record["sources"] = list(variant.sources)
            record["source_sha256"] = hashes[variant.sources]
            records.append(record)
    return records


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _timings(outcome: Outcome, by_name: Mapping[str, Outcome], direction: str) -> dict[str, Any]:
    if outcome.note is not None:  # also one that failed halfway
        names = ("median_us", "p20_us", "p80_us", "timer", "gb_s", "fraction_of_floor")
        return dict.fromkeys((*names, "speed_up_over_eager", "speed_up_over_compile"))
    times = outcome.times[direction]
    summary = summarize(times)
    result: dict[str, Any] = {
        "median_us": _round(summary.median * 1e6),
        "p20_us": _round(summary.p20 * 1e6),
        "p80_us": _round(summary.p80 * 1e6),
        "timer": outcome.timers[direction],
        "gb_s": None,
        "fraction_of_floor": None,
    }
    for name in ("eager", "compile"):
        other = by_name.get(name)
        known = other is not None and other.note is None
        result[f"speed_up_over_{name}"] = round(speed_up(other.times[direction], times), 4) if known else None
    return result


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["op"], tuple(record["shape"]), record["dtype"], record["layout"]


def kept_records(path: Path, where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of an earlier run on the same machine and versions whose sources have not changed since."""

    def undated(environment: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in environment.items() if key != "date"}

    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if undated(old["environment"]) != undated(where):
            return []
        fresh = [r for r in old["records"] if environment.source_hash(r["sources"]) == r["source_sha256"]]
        kept = {_identity(r) for r in fresh} - {_identity(r) for r in old["records"] if r not in fresh}
        return [r for r in fresh if _identity(r) in kept]  # a case is compared inside one run: all of it or nothing
    except (OSError, ValueError, KeyError, TypeError):
        return []  # missing or of another shape: it is written anew


def measure(
    device: torch.device,
    selected: Sequence[Case],
    *,
    rounds: int | None = None,
    out: Path | None = None,
    missing: bool = False,
    seconds: float = math.inf,
    visit_seconds: float | None = None,
    without: Sequence[str] = (),
    screen: Screen | None = None,
) -> tuple[dict[str, Any], Path, list[str]]:
    """Measure cases one after the other; the result file is written after each.

    Args:
        device: where.
        selected: what.
        rounds: visits of each variant; None: what suits the device.
        out: result file; None: the machine's own.
        missing: leave out cases that the file already has, measured with the present sources.
        seconds: time after which no further case is begun.
        visit_seconds, without: as for :func:`measure_case`.
        screen: where progress goes.

    Returns:
        The content of the result file, its path, and what went wrong: a line for each.
    """
    screen = screen or Screen()
    rounds = ROUNDS[device.type] if rounds is None else rounds
    check_range("--rounds", rounds, low=1, integer=True)
    begun = time.perf_counter()
    where = environment.describe(device)
    path = out or environment.RESULTS / where["machine"] / "ops.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = kept_records(path, where)
    present = {_identity(record) for record in old}
    if missing:
        selected = [case for case in selected if case.key not in present]
    run = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    limits = Limits(device, seconds=0.3 if device.type == "cuda" else 0.1)
    # Hashed before anything is called: a file edited while this runs is not what is measured.
    lists = {sources for case in selected for sources in source_lists(case.op, device)}
    hashes = {sources: environment.source_hash(sources) for sources in lists}
    settings = {"rounds": rounds, "visit_ms": 1e3 * (visit_seconds or VISIT_SECONDS[device.type])}
    result: dict[str, Any] = {"environment": where, "settings": settings, "ceilings": {}, "records": old}
    faults: list[str] = []
    with screen.progress("ops", len(selected)) as advance:
        for number, case in enumerate(selected, start=1):
            if time.perf_counter() - begun > seconds:
                left = ", ".join(map(str, selected[number - 1 :]))
                screen.print(f"Time is up; not measured: {left}. Go on with --missing.")
                break
            start = time.perf_counter()
            try:
                outcomes = measure_case(case, device, rounds=rounds, visit_seconds=visit_seconds, without=without)
                new = records_of(case, outcomes, limits, hashes, run)
            except Exception as error:  # a reference that fails (out of memory, say): the other cases are still wanted
                lines = str(error).strip().splitlines()
                faults.append(f"{case}: {type(error).__name__}: {lines[0] if lines else ''}")
                continue
            faults += [f"{case}: {o.variant.name}: {o.note}" for o in outcomes if o.failed]
            result["records"] = [r for r in result["records"] if _identity(r) != case.key] + new
            result["ceilings"] = limits.as_json()
            write_json(path, result)
            advance()
            show_case(new, screen)
            screen.print(f"[{number}/{len(selected)}] {case}: {time.perf_counter() - start:.1f} s")
    return result, path, faults


def show_case(records: Sequence[Mapping[str, Any]], screen: Screen) -> None:
    """Print a table of all variants of one case."""
    headings = ("variant", "direction", "µs", "p20 … p80", "× eager", "× compile", "GB/s", "floor", "MiB")
    headings = (*headings, "host µs", "launches", "error")
    rows = [_row(record) for record in records if record["median_us"] is not None]
    screen.table(case_name(records[0]), headings, rows, text_columns=2)
    for name, note in {r["variant"]: r["note"] for r in records if r["note"]}.items():
        screen.print(f"  {name}: {note}")


def _row(record: Mapping[str, Any]) -> list[str]:
    def number(key: str, form: str) -> str:
        return "–" if record[key] is None else format(record[key], form)

    plan = f" ({record['plan']})" if record["variant"] == "dispatch" else ""
    return [
        record["variant"] + plan,
        record["direction"],
        number("median_us", ".4g"),
        f"{record['p20_us']:.4g} … {record['p80_us']:.4g}",
        number("speed_up_over_eager", ".2f"),
        number("speed_up_over_compile", ".2f"),
        number("gb_s", ".0f"),
        number("fraction_of_floor", ".0%"),
        number("peak_mib", ".4g"),
        number("host_us", ".0f"),
        number("launches", "d"),
        number("rel_error", ".1e"),
    ]


def main(
    args: Sequence[str],
    *,
    selected: Sequence[Case] | None = None,
    visit_seconds: float | None = None,
    without: Sequence[str] = (),
) -> int:
    """Run the command; returns the exit code. The keywords shrink the benchmark for tests."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ops",
        description="Time the ops forward (fwd), backward (bwd) and both (fwd_bwd): the PyTorch definition eager and "
        "compiled, the default dispatch, and every plan that can serve; all interleaved in this process, each checked "
        "against float64. Run it with nothing else on the machine. The file is written after each case; cases that "
        "are not selected keep their records while their sources stand.",
    )
    parser.add_argument("--op", action="append", help=f"only this op; may be repeated; of {', '.join(OPS)}")
    add_device(parser)
    parser.add_argument("--rounds", type=int, help="visits of each variant (default: 20 on a GPU, 7 on a CPU)")
    parser.add_argument("--reduced", action="store_true", help="the CPU's small shapes on a GPU too")
    parser.add_argument("--missing", action="store_true", help="only what the result file does not have yet")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further case after this time")
    add_out(parser, "ops")
    options = parser.parse_args(args)
    check_names("--op", options.op, OPS)
    device = device_of(options)
    if selected is None:
        selected = cases(device, options.reduced, tuple(op for op in OPS if op in (options.op or OPS)))
    elif options.op:
        selected = [case for case in selected if case.op in options.op]
    if not selected:
        raise UserError("--op: no case is left to measure.")
    screen = Screen(width=None if sys.stdout.isatty() else 170)
    result, path, faults = measure(
        device,
        selected,
        rounds=options.rounds,
        out=options.out,
        missing=options.missing,
        seconds=options.seconds,
        visit_seconds=visit_seconds,
        without=without,
        screen=screen,
    )
    wanted = {case.key for case in selected}
    headings, rows = ops_summary([record for record in result["records"] if _identity(record) in wanted])
    screen.table("Summary", headings, rows, text_columns=2)
    return finish(screen, faults, path)

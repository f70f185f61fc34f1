"""``python -m benchmarks aot``: compile every kernel for GPUs that are not there, and judge the code.

One record for each kernel × target × dtype × constexprs × launch configuration that the project's models and the
tables of kernels/ lead to (:mod:`benchmarks.aot_cases`).
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.aot_units import Unit, compile_units, plan, record_of, unused_lines
from benchmarks.gpu_code import TARGETS
from benchmarks.screen import Screen
from scalelong_fast.errors import UserError, check_range, unknown_name
from scalelong_fast.ops.problem import TRITON_INSTALLED, interpreting
from scalelong_fast.training.checkpoint import write_atomically
from scalelong_fast.version import __version__


def run(units: Sequence[Unit], jobs: int, screen: Screen) -> list[dict[str, Any]]:
    """Compile the units, ``jobs`` at a time; records in their order."""
    records = []
    with screen.progress("compile", len(units)) as advance:
        for unit, facts in zip(units, compile_units(units, jobs), strict=True):
            records.append(record_of(unit, facts))
            advance()
            for fault in records[-1]["faults"]:
                screen.print(f"{_title(records[-1])}: {fault}", style="red")
    return records


def _constexprs(record: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in record["constexprs"].items())


def _title(record: dict[str, Any]) -> str:
    launch = f"{record['num_warps']} warps, {record['num_stages']} stages"
    return f"{record['target']} {record['kernel']} {record['dtype']} ({_constexprs(record)}; {launch})"


_FIGURES = ("regs", "spills", "shared", "CTA/SM", "matrix", "16 B loads", "16 B stores", "tile / source")


def _figures(records: Sequence[dict[str, Any]]) -> list[str]:
    """Cells of :data:`_FIGURES`, the worst of the records."""
    records = [record for record in records if "error" not in record]
    if not records:
        return ["error"] + [""] * (len(_FIGURES) - 1)

    def fewest(what: str) -> str:
        worst = min(records, key=lambda record: record[f"wide_{what}"] / max(1, record[what]))
        return f"{worst[f'wide_{what}']}/{worst[what]}"

    def largest(what: str) -> str:
        values = [record["factors"][what] for record in records if record["factors"][what] is not None]
        return f"{max(values):g}" if values else "–"

    kinds = {" ".join(record["matrix_instructions"]) or "–" for record in records}
    return [
        str(max(record["registers"] for record in records)),
        str(max(record["spill_stores"] + record["spill_loads"] for record in records)),
        f"{max(record['shared_bytes'] for record in records) / 1024:.3g} K",
        str(min(record["ctas_per_sm"] for record in records)),
        ", ".join(sorted(kinds)),
        fewest("loads"),
        fewest("stores"),
        f"{largest('tile_loads')}/{largest('tile_stores')}",
    ]


def show(records: Sequence[dict[str, Any]], screen: Screen) -> None:
    """Print every record."""
    rows = [
        [
            *(record[key] for key in ("kernel", "target", "dtype")),
            _constexprs(record),
            *(str(record[key]) for key in ("num_warps", "num_stages")),
            *_figures([record]),
        ]
        for record in records
    ]
    headings = ("kernel", "target", "dtype", "constexprs", "warps", "stages", *_FIGURES)
    screen.table("Compiled kernels", headings, rows, text_columns=4)


def show_summary(records: Sequence[dict[str, Any]], screen: Screen) -> None:
    """Print a row for each kernel, target and dtype: the worst of its records."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["kernel"], record["target"], record["dtype"]), []).append(record)
    rows = [[*names, str(len(group)), *_figures(group)] for names, group in groups.items()]
    headings = ("kernel", "target", "dtype", "compiled", *_FIGURES)
    screen.table("Compiled kernels, the worst of each", headings, rows, text_columns=3)


def describe_environment() -> dict[str, Any]:
    """Versions that the compiled code depends on, JSON-ready; the machine is none of them."""
    import triton

    return {
        "triton": triton.__version__,
        "python": platform.python_version(),
        "scalelong_fast": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a result file, a line for each record: a change then shows as the lines of the kernels it touched."""
    lines = ",\n".join(json.dumps(record) for record in records)
    text = f'{{"environment": {json.dumps(describe_environment())},\n"records": [\n{lines}\n]}}\n'
    write_atomically(path, lambda file: file.write(text.encode()))


def _check_environment() -> None:
    if not TRITON_INSTALLED:
        raise UserError("Triton is not installed, which compiles the kernels. Install it (Linux): pip install triton.")
    if interpreting():
        raise UserError(
            "TRITON_INTERPRET=1 is set, under which Triton compiles nothing. "
            "Unset it: env -u TRITON_INTERPRET python -m benchmarks aot"
        )


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code, 1 where compiled code is not as it must be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks aot",
        description="Compile every kernel ahead of time, with no GPU, and read registers, spills, shared memory, "
        "matrix instructions, 16-byte accesses and the bytes of a tile over those that the source asks for from the "
        "code. Exit code 1 where a kernel spills, lacks the matrix instructions or the 16-byte accesses that it must "
        "have, moves a tile more often than its source says, or does not compile.",
    )
    parser.add_argument("--target", action="append", help=f"{', '.join(TARGETS)}; may be repeated (default: all)")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        default=[],
        help="kernels or cases with this in their names; may be repeated; no file is written then",
    )
    parser.add_argument("--jobs", type=int, default=_cores(), help="compile so many at once (default: all cores)")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: benchmarks/results/aot)")
    parser.add_argument("--list", action="store_true", help="print what would be compiled as JSON, and stop")
    options = parser.parse_args(args)
    targets = list(dict.fromkeys(options.target or TARGETS))
    for name in targets:
        if name not in TARGETS:
            raise unknown_name("--target", name, TARGETS)
    check_range("--jobs", options.jobs, low=1, integer=True)
    _check_environment()
    units, lines = plan(targets, options.only)
    if not units:
        raise UserError(
            f"--only: got {', '.join(options.only)}, which no kernel or case of these targets has in its name."
        )
    if options.list:
        launches = [
            {"target": unit.call.target, "kernel": unit.launch.kernel, "launch": unit.launch.key} for unit in units
        ]
        print(json.dumps({"launches": launches, "unused_lines": unused_lines(targets, lines)}, indent=1))
        return 0

    screen = Screen(None if sys.stdout.isatty() else 180)
    start = time.perf_counter()
    records = run(units, options.jobs, screen)
    (show if options.only else show_summary)(records, screen)
    bad = sum(bool(record["faults"]) for record in records)
    screen.print(f"{len(records)} compiled in {time.perf_counter() - start:.0f} s, {bad} not as they must be.")
    if options.out or not options.only:
        folder = options.out or environment.RESULTS / "aot"
        folder.mkdir(parents=True, exist_ok=True)
        for name in targets:
            own = [record for record in records if record["target"] == name]
            write_records(folder / f"{name}.json", own)
        screen.print(f"Written to {folder}.")
    return 1 if bad else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

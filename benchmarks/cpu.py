"""``python -m benchmarks cpu``: what a CPU can measure at reduced shapes, part after part, in bounded time.

Each part is a process of its own, so that one that fails ends no other.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.command import check_names
from benchmarks.screen import Screen
from scalelong_fast.errors import check_range, invalid

#: Where results go unless they are asked for elsewhere: hasty ones do not replace those of benchmarks/results/.
OUT = environment.ROOT / "runs" / "benchmarks"
_ON_CPU = ("--device", "cpu")
#: Compiling the others would take longer than all parts may.
_EAGER_STEPS = ("--variant", "authors_fp32", "--variant", "authors_bf16", "--variant", "ours_eager")
#: Seconds that are kept for the report, that it may take at most, and those without which no part is begun.
_REPORT_SECONDS, _REPORT_LIMIT, _LEAST_SECONDS = 20.0, 300.0, 5.0
#: Share of its time that a part is told: it has to start, and it ends what it has begun.
_TOLD = 0.75
#: Seconds that a process has to end when it is told to.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Part:
    """A command and its share of the time.

    Attributes:
        weight: of its share.
        args: of the command.
        bounded: whether the command takes ``--seconds``.
        folder: where its result lies under the folder of results; None: in that of the machine.
    """

    weight: float
    args: tuple[str, ...] = _ON_CPU
    bounded: bool = True
    folder: str | None = None


#: The parts by command, which is the name of the result file too; a new one is a line here.
PARTS = {
    "traffic": Part(2.4, (), bounded=False, folder="interpreter"),
    "ops": Part(3.0, (*_ON_CPU, "--missing")),
    "uvit": Part(2.0),
    "unet": Part(2.0),
    "step": Part(3.0, (*_ON_CPU, *_EAGER_STEPS, "--steps", "1")),
    "loader": Part(2.2, (*_ON_CPU, "--images", "4000")),
    "curves": Part(2.0),
    "attention": Part(1.0),
    "inference": Part(1.5),
    "convergence": Part(2.0, (*_ON_CPU, "--steps", "120", "--no-compile")),
}

DONE, FAILED, STOPPED, NO_TIME = "done", "failed", "stopped: out of time", "not begun: no time left"


@dataclass(frozen=True)
class Outcome:
    """What came of a part: one of the words above, the seconds it took, and its result file, None if it wrote none."""

    name: str
    verdict: str
    seconds: float
    path: Path | None


def command_of(name: str, part: Part, seconds: float, path: Path) -> list[str]:
    """The process of a part."""
    budget = ["--seconds", f"{seconds:.0f}"] if part.bounded else []
    return [sys.executable, "-m", "benchmarks", name, *part.args, *budget, "--out", str(path)]


def run_parts(names: Sequence[str], folder: Path, seconds: float, screen: Screen) -> list[Outcome]:
    """Run parts one after the other.

    A part is told most of its share of the time that is left; one that has not ended when all time is up is stopped.

    Args:
        names: of :data:`PARTS`.
        folder: of results; a part's file lies in the folder of the machine in it.
        seconds: for all.
        screen: where progress goes.
    """
    end = time.perf_counter() + seconds
    machine = environment.machine_name(torch.device("cpu"))
    outcomes = []
    for number, name in enumerate(names):
        part, start = PARTS[name], time.perf_counter()
        path = folder / (part.folder or machine) / f"{name}.json"
        share = (end - start) * part.weight / sum(PARTS[later].weight for later in names[number:])
        if share < _LEAST_SECONDS:
            outcomes.append(Outcome(name, NO_TIME, 0.0, None))
            continue
        screen.print(f"[{number + 1}/{len(names)}] {name}: about {share:.0f} s", style="bold")
        before = written(path)
        code = run_process(command_of(name, part, _TOLD * share, path), end - start)
        own = path if written(path) != before else None  # an older file is not what this part measured
        outcomes.append(Outcome(name, verdict_of(code), time.perf_counter() - start, own))
    return outcomes


def written(path: Path) -> tuple[int, int] | None:
    """What changes whenever a file is written; None where there is none. Files are replaced, so that inodes differ."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def verdict_of(code: int | None) -> str:
    """What an exit code of :func:`run_process` means."""
    return STOPPED if code is None else FAILED if code else DONE


def run_process(command: Sequence[str], seconds: float) -> int | None:
    """Run a command in the repository; returns its exit code, or None where it was stopped after ``seconds``."""
    # A session of its own: what the command has started ends with it.
    process = subprocess.Popen(command, cwd=environment.ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for word in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, word)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECONDS)


def main(args: Sequence[str]) -> int:
    """Run the command; returns 1 where a part failed or was stopped, or none had time."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cpu",
        description="Measure what a CPU can at reduced shapes, each part in a process of its own, then put all on one "
        f"page. Parts: {', '.join(PARTS)}. Run it with nothing else on the machine. ops takes up where an earlier run "
        "ended; the other parts make fewer rounds where time is short.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together (default: 10)")
    parser.add_argument("--part", action="append", metavar="NAME", help="only this part; may be repeated")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=OUT,
        help="where results and page.html go (default: runs/benchmarks; with benchmarks/results, which the tables of "
        "README.md and docs/results.md are made from, these are rewritten)",
    )
    options = parser.parse_args(args)
    check_range("--minutes", options.minutes, low=0, low_open=True)
    check_names("--part", options.part, PARTS)
    names = [name for name in PARTS if name in (options.part or PARTS)]
    screen = Screen()
    begun = time.perf_counter()
    folder = options.out.resolve()
    if folder.exists() and not folder.is_dir():
        raise invalid("--out", str(options.out), "a folder, or a name that is free")
    outcomes = run_parts(names, folder, max(0.0, 60 * options.minutes - _REPORT_SECONDS), screen)
    report, page = [sys.executable, "-m", "benchmarks", "report"], environment.ROOT / "docs" / "results.md"
    if folder != environment.RESULTS:
        page = folder / "page.html"
        report += ["--results", str(folder), "--html", str(page)]
    start = time.perf_counter()
    code = run_process(report, _REPORT_LIMIT)
    outcomes.append(Outcome("report", verdict_of(code), time.perf_counter() - start, page if page.is_file() else None))
    rows = [[one.name, f"{one.seconds:.0f}", shown(one.path), one.verdict] for one in outcomes]
    screen.table(f"{time.perf_counter() - begun:.0f} s altogether", ("part", "seconds", "result", "outcome"), rows)
    bad = [one.name for one in outcomes if one.verdict in (FAILED, STOPPED)]
    if bad:
        screen.print(f"benchmarks: error: {', '.join(bad)}: see above.", style="red")
    elif not any(one.verdict == DONE for one in outcomes[:-1]):
        bad = names
        screen.print("benchmarks: error: no part had time; give it more --minutes.", style="red")
    return int(bool(bad))


def shown(path: Path | None) -> str:
    """A result's path, relative to the repository where it lies there; a dash where there is none."""
    if path is None:
        return "–"
    return str(path.relative_to(environment.ROOT) if path.is_relative_to(environment.ROOT) else path)

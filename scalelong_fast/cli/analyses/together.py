"""``scalelong-fast analyze all``: every analysis, one after the other."""

import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from scalelong_fast.cli.analyses.options import Analysis, Common, DatasetOptions, TrainingOptions
from scalelong_fast.errors import UserError, check_range

if TYPE_CHECKING:
    from scalelong_fast.cli.analyses.options import Task

#: Data set of the analyses of one.
DATASET = "digits"


@dataclasses.dataclass(frozen=True)
class AllArguments(Common):
    """Every analysis in sequence, with the sizes of the scale, on digits. The failure of one does not end the others;
    the same command run again goes on from the networks that were trained."""

    workers: int | None = None
    """Processes that share the networks of an analysis out; default: one for each GPU or, without any, for each
    core."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_range("--workers", self.workers, low=1, integer=True)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one analysis ended.

    Attributes:
        name: the analysis.
        seconds: that it took.
        failure: what went wrong; None: nothing.
    """

    name: str
    seconds: float
    failure: str | None


def run_all(
    analyses: Mapping[str, Analysis], arguments: AllArguments, run: "Callable[[str, list[Task], Path], None]"
) -> int:
    """Run every analysis and sum up how each ended, also where it was interrupted on the way.

    Args:
        analyses: by name.
        arguments: of all of them.
        run: runs and writes the tasks of one.

    Returns:
        Exit code: 1 if one failed.

    Raises:
        UserError: the folder cannot be written to.
    """
    from scalelong_fast.analysis.finding import open_folder

    open_folder(arguments.out)
    console = Console()
    outcomes: list[Outcome] = []
    try:
        for number, (name, analysis) in enumerate(analyses.items(), start=1):
            head = f"\n{number}/{len(analyses)} {name}: {analysis.summary}"
            console.print(head, highlight=False, soft_wrap=True, markup=False)
            start = time.monotonic()
            failure = _failure(
                lambda name=name, analysis=analysis: run(name, _tasks(analysis, arguments), arguments.out)
            )
            outcomes.append(Outcome(name, time.monotonic() - start, failure))
    finally:
        console.print(_summary(outcomes))
    return int(any(outcome.failure is not None for outcome in outcomes))


def _tasks(analysis: Analysis, arguments: AllArguments) -> "list[Task]":
    shared = {"workers": arguments.workers} if issubclass(analysis.arguments, TrainingOptions) else {}
    own = analysis.arguments(scale=arguments.scale, out=arguments.out, **shared)
    positional = [DATASET] if issubclass(analysis.arguments, DatasetOptions) else []
    return analysis.tasks(own, *positional)


def _failure(call: Callable[[], None]) -> str | None:
    """What went wrong in a call, which is also said on stderr; a defect of ours with its traceback."""
    try:
        call()
    except UserError as error:
        print(f"scalelong-fast: error: {error}", file=sys.stderr)
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def _summary(outcomes: list[Outcome]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("analysis")
    table.add_column("seconds", justify="right")
    table.add_column("outcome", overflow="fold")
    for outcome in outcomes:
        told = "done" if outcome.failure is None else f"failed: {outcome.failure}"
        table.add_row(outcome.name, f"{outcome.seconds:.1f}", told.replace("[", r"\["))
    return table

"""``scalelong-fast analyze ANALYSIS``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from scalelong_fast.cli.analyses import ANALYSES
from scalelong_fast.cli.analyses.options import DatasetOptions
from scalelong_fast.cli.analyses.together import AllArguments, run_all
from scalelong_fast.cli.parse import parse
from scalelong_fast.errors import UserError, unknown_name

if TYPE_CHECKING:
    from scalelong_fast.cli.analyses.options import Task

USAGE = """usage: scalelong-fast analyze ANALYSIS [options]

The paper's figures and theorems, measured: each writes a JSON file, a figure (PNG, SVG) and says what it shows.

analyses:
{analyses}
  all            all of these, one after the other

examples:
  scalelong-fast analyze suggest-kappa digits --skips 6
  scalelong-fast analyze oscillation --scale smoke
  scalelong-fast analyze oscillation --preset cifar10-uvit --depth 16 --steps 2000 --batch-size 16 --seeds 0 1 2
  scalelong-fast analyze robustness --preset cifar10-uvit --data folder --path photos --steps 2000
  scalelong-fast analyze kappa --runs runs/digits-uvit
  scalelong-fast analyze all --scale smoke

Options of an analysis: scalelong-fast analyze ANALYSIS --help
"""


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(analyses="\n".join(f"  {name:<13}  {entry.summary}" for name, entry in ANALYSES.items())))
        return 0 if args else 2
    name, *rest = args
    if name == "all":
        return run_all(ANALYSES, parse(AllArguments, rest, "scalelong-fast analyze all"), run_tasks)
    if name not in ANALYSES:
        raise unknown_name("ANALYSIS", name, [*ANALYSES, "all"])
    analysis = ANALYSES[name]
    prog = f"scalelong-fast analyze {name}"
    positional: list[str] = []
    if issubclass(analysis.arguments, DatasetOptions):
        prog += " DATASET"
        if not {"-h", "--help"} & set(rest):
            if not rest or rest[0].startswith("-"):
                raise UserError(f"DATASET: expected the data set first, e.g. scalelong-fast analyze {name} digits.")
            positional = [rest.pop(0)]
    arguments = parse(analysis.arguments, rest, prog)
    run_tasks(name, analysis.tasks(arguments, *positional), arguments.out)
    return 0


def run_tasks(name: str, tasks: "list[Task]", out: Path) -> None:
    """Run the tasks one after the other, each result written and said as soon as it is there.

    Raises:
        UserError: a task failed; after all others.
    """
    from scalelong_fast.analysis.finding import open_folder, write_finding
    from scalelong_fast.analysis.progress import rich_progress
    from scalelong_fast.analysis.units import Units

    console = Console()
    open_folder(out)
    failures: list[str] = []
    for task in tasks:
        units = Units(out / "units")
        try:
            with rich_progress(name) as progress:
                finding = task(units, progress)
        except UserError as error:
            failures.append(str(error))
            if task is not tasks[-1]:
                console.print(f"{error} The next one begins.", highlight=False, soft_wrap=True, markup=False)
            continue
        except KeyboardInterrupt:
            kept = f"What was finished is kept in {out / 'units'}: the same command goes on from there."
            console.print(kept, highlight=False, soft_wrap=True, markup=False)
            raise
        paths = write_finding(finding, out, units.oldest)
        console.print(finding.sentence, highlight=False, soft_wrap=True, markup=False)
        console.print(f"Written: {', '.join(map(str, paths))}", highlight=False, soft_wrap=True, markup=False)
    if failures:
        raise UserError("\n".join(dict.fromkeys(failures)))

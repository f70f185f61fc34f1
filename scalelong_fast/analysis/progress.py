"""Progress of an analysis: nothing by default, a rich bar on the command line."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with (done, total, what is being done).
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """Show nothing."""


@contextmanager
def rich_progress(title: str) -> Iterator[Progress]:
    """A bar on stderr, gone at the end; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    options = {"console": console, "transient": True, "disable": not console.is_terminal}
    # The time left is estimated from all that was done: a single step may take minutes.
    with Bar(*columns, TimeRemainingColumn(), speed_estimate_period=math.inf, **options) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)

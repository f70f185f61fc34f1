"""A bar that counts what was done, also where the end is not known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from scalelong_fast.data.optional import import_optional


@contextmanager
def counting(
    description: str, unit: str, progress: bool, total: int | None = None, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """A progress bar, and the function that moves it on.

    Args:
        description: stands before the bar.
        unit: of what is counted.
        progress: show it.
        total: None: unknown; the bar pulses.
        done: where to begin.
    """
    if not progress:
        yield lambda count: None
        return
    rich = import_optional("rich.progress")
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn(unit),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count: bar.advance(task, count)

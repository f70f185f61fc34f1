"""Lines, tables and progress on the screen: with rich where it is installed, else in plain text."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ModuleNotFoundError:  # a bare GPU machine
    Console = None


class Screen:
    """Where a command's output goes.

    Args:
        width: columns of a table; None: the terminal's, or 120 where there is none.
    """

    def __init__(self, width: int | None = None):
        self._console = None
        if Console is not None:
            self._console = Console(width=width or (None if sys.stdout.isatty() else 120))
        self.width = width or shutil.get_terminal_size((120, 24)).columns

    def print(self, text: str, style: str | None = None) -> None:
        """Print a line as it is."""
        if self._console is None:
            print(text, flush=True)
        else:
            self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> None:
        """Print a table.

        Args:
            title: above it.
            headings: of the columns.
            rows: cells.
            text_columns: how many of the first columns are text; the others are right-aligned.
        """
        if self._console is not None:
            table = Table(title=title)
            for index, heading in enumerate(headings):
                table.add_column(heading, justify="left" if index < text_columns else "right")
            for row in rows:
                table.add_row(*row)
            self._console.print(table)
            return
        for line in plain_table(title, headings, rows, text_columns):
            print(line, flush=True)

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar in a terminal, nothing elsewhere; yields a function that advances it by one."""
        if self._console is None or not self._console.is_terminal:
            yield lambda: None
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(description, total=total)
            yield lambda: progress.advance(task)


def plain_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Lines of a table in plain text; arguments as for :meth:`Screen.table`."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]

    def aligned(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if index < text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return [title, aligned(headings), "  ".join("-" * width for width in widths), *map(aligned, rows)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what C++ code writes to standard error off the screen: PyTorch's profiler has notes for its developers."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)

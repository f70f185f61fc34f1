"""``scalelong-fast models``."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from scalelong_fast.errors import invalid, unknown_name
from scalelong_fast.models import list_models, summarize

USAGE = """usage: scalelong-fast models [PATTERN]

List the model presets with their parameters, long skips and tokens; PATTERN is shell-style, e.g. 'uvit_t2i*'.
Build one in Python: scalelong_fast.create_model(NAME, scaling="ls", **overrides)
"""


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if args and args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if len(args) > 1:
        raise invalid("PATTERN", " ".join(args), "one pattern", "Quote it, so that the shell leaves it alone.")
    names = list_models(args[0] if args else "*")
    if not names:
        raise unknown_name("PATTERN", args[0], list_models())
    table = Table("model", "input", "condition")
    for title in ("parameters", "long skips", "tokens"):
        table.add_column(title, justify="right")
    for name in names:
        summary = summarize(name)
        shape = "×".join(map(str, summary.input_shape))
        millions = f"{summary.parameters / 1e6:.1f}M"
        tokens = "–" if summary.tokens is None else str(summary.tokens)
        table.add_row(name, shape, summary.condition, millions, str(summary.skips), tokens)
    Console(width=100).print(table)
    return 0

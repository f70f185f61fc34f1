"""``scalelong-fast bench``: the benchmarks of the repository, where it is there."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import scalelong_fast
from scalelong_fast.errors import UserError

USAGE = """usage: scalelong-fast bench COMMAND ...

Runs python -m benchmarks, from the repository that the package was installed from with pip install -e.
"""


def main(args: Sequence[str], *, root: Path | None = None) -> int:
    """Run ``python -m benchmarks`` with ``args``; returns its exit code.

    Args:
        args: a command of the benchmarks and its options; none: the list of commands.
        root: the repository; None: the folder that the package lies in.

    Raises:
        UserError: there is no ``benchmarks`` folder beside the package.
    """
    root = Path(scalelong_fast.__file__).resolve().parents[1] if root is None else root
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise UserError(
            f"There are no benchmarks beside the package in {root}: they are part of the repository, not of the "
            'installed package. Clone it, run pip install -e ".[train]" in the clone, and give this command again.'
        )
    if sys.path[0] != str(root):
        sys.path.insert(0, str(root))  # before another project's benchmarks
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
    return importlib.import_module("benchmarks.__main__").main(args)

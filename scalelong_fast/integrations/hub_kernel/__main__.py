"""``python -m scalelong_fast.integrations.hub_kernel OUT``."""

import argparse
import sys
from collections.abc import Sequence

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.hub_kernel import NAME, VARIANT, build_hub_kernel


def main(argv: Sequence[str] | None = None) -> int:
    """Write the repository; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scalelong_fast.integrations.hub_kernel",
        description="Write our ops as a repository that the Hub's kernel loader takes.",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--version", type=int, default=1, help="version of the interface, from 1 (default: 1)")
    options = parser.parse_args(argv)
    try:
        out = build_hub_kernel(options.out, options.version)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"{NAME} in {out / 'build' / VARIANT}. Try it: kernels.get_local_kernel(pathlib.Path({str(out)!r}))")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

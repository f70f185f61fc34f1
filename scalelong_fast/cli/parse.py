"""tyro, with our errors as one paragraph instead of a box."""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from scalelong_fast.errors import UserError

T = TypeVar("T")


def parse(cls: type[T], args: Sequence[str], prog: str, default: Any = None, description: str | None = None) -> T:
    """Fill dataclass ``cls`` from command-line arguments.

    A field that may hold one of several dataclasses keeps the class it has in ``default``.

    Raises:
        UserError: a value that the dataclass refuses.
        SystemExit: help (0), or unknown options and words that are no numbers (2, explained by tyro).
    """
    try:
        import tyro
    except ImportError as error:
        raise UserError('the command line needs tyro: pip install "scalelong_fast[train]"') from error

    options = {} if default is None else {"default": default}
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            # Otherwise every class would become a subcommand.
            keep = (tyro.conf.AvoidSubcommands,)
            return tyro.cli(cls, args=args, prog=prog, description=description, config=keep, **options)
    except SystemExit as error:
        # tyro boxes what a dataclass raises while it is built; the original is at the end of the chain.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(stderr.getvalue())
        raise

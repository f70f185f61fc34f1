"""The command ``scalelong-fast``."""

import contextlib
import importlib
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from scalelong_fast.errors import UserError, unknown_name
from scalelong_fast.version import __version__

#: Commands and what they do; each is a module of this package with a ``main(args) -> int``.
COMMANDS = {
    "train": "train a preset into a run folder, or go on with one",
    "sample": "draw images from a trained run",
    "ema": "make averages of any width from the snapshots of a run",
    "evaluate": "compare a run's images with real ones (FID)",
    "fid-stats": "statistics of a data set, for evaluate",
    "analyze": "measure the paper's figures and theorems, and pick κ with evidence",
    "push": "publish a run on the Hugging Face Hub, with a model card",
    "prepare": "pack a data set into memory-mapped shards to train on",
    "models": "list the model presets",
    "presets": "show the training presets beside the paper's settings",
    "plan": "predict memory, time and the best sharding of a run on any number of GPUs",
    "tune": "time the fused ops' plans on this machine and remember the fastest",
    "bench": "run the repository's benchmarks",
}

USAGE = """usage: scalelong-fast COMMAND ...

Diffusion models with scaled long skip connections (ScaleLong), fast.

commands:
{commands}

start here:
  scalelong-fast train digits-uvit             train on handwritten digits, a few minutes on a laptop
  scalelong-fast sample runs/digits-uvit --labels 3,7 --out digits.png

Each command explains itself: scalelong-fast COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit code: 0 done; 1 the run failed (a non-finite loss, a process that died or hangs); 2 bad input or
        environment, explained on stderr; 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())))
        return 0 if args else 2
    if args[0] == "--version":
        print(f"scalelong_fast {__version__}")
        return 0
    with warnings.catch_warnings(), _quiet_threads():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            if args[0] not in COMMANDS:
                raise unknown_name("COMMAND", args[0], COMMANDS)
            return importlib.import_module(f"scalelong_fast.cli.{args[0].replace('-', '_')}").main(args[1:])
        except UserError as error:
            return _fail(str(error), 2)
        except ImportError as error:
            if (error.name or "").startswith("scalelong_fast"):  # a defect of ours, which no installation mends
                raise
            return _fail(f'{error}. Install what the command line needs: pip install "scalelong_fast[train]"', 2)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except Exception as error:
            from scalelong_fast.training import NonFiniteLossError, RankError

            if isinstance(error, (NonFiniteLossError, RankError)):
                return _fail(str(error), 1)
            raise


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """No traceback for an OSError in a thread: TensorBoard's writer raises it again in the main one (a full disk)."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


def _fail(message: str, code: int) -> int:
    print(f"scalelong-fast: error: {message}", file=sys.stderr)
    return code

"""``python -m benchmarks``."""

import importlib
import sys
from collections.abc import Sequence

from scalelong_fast.errors import UserError, unknown_name

#: Commands and what they do; each is a module of this package with a ``main(args) -> int``.
COMMANDS = {
    "ops": "time every op: PyTorch eager and compiled against each of our plans",
    "models": "time training steps of all models: uvit, then unet",
    "uvit": "time training steps of the published U-ViTs: the authors' recipe, plain and ours, what scaling costs",
    "unet": "time training steps of the UNets: plain, compiled and fused, what scaling costs",
    "curves": "time and memory of training steps against batch, tokens, width and number of long skips",
    "attention": "time attention: explicit, the authors' in fp32, PyTorch's, xformers', ours for CPUs",
    "inference": "time 50-step sampling: latency and throughput, eager and compiled",
    "train": "time a whole training step against the authors' recipe: another name for step",
    "step": "time a whole training step against the authors' recipe",
    "convergence": "loss by time: the scalings' factor in steps times ours in throughput",
    "stream": "compare a bf16 with an fp32 residual stream by the loss reached on digits",
    "loader": "time the reading of packed data, alone and beside training steps",
    "plan": "compare the planner's memory and time with real passes",
    "scaling": "time training steps of several processes against one with as many threads",
    "digits": "judge the samples of a digits run: recognisable, and no copies",
    "traffic": "count the bytes that the kernels move, with no GPU",
    "aot": "compile every kernel with no GPU, and look for spills and missing matrix instructions",
    "sanitize": "look for bad memory accesses and races on a GPU",
    "groups": "rewrite the tables and the picture of docs/groupnorm-and-kappa.md",
    "reproduction": "rewrite docs/reproduction.md from the findings of scalelong-fast analyze",
    "cpu": "measure what a CPU can at reduced shapes, in ten minutes, and put all on one page",
    "compare": "time the working tree against an earlier commit",
    "report": "rewrite the tables of README.md and docs/{results,planning}.md, or put all on one page (--html)",
}

#: Modules of commands that are not called like theirs.
_MODULES = {"train": "step"}

USAGE = """usage: python -m benchmarks COMMAND ...

Measurements behind the tables of README.md and docs/results.md, kept in benchmarks/results/<machine>/<table>.json.

commands:
{commands}

start here, with nothing else running on the machine:
  python -m benchmarks step
  python -m benchmarks report

Each command explains itself: python -m benchmarks COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit code: 0 done; 1 a check failed; 2 bad input or environment, explained on stderr; 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<12} {text}" for name, text in COMMANDS.items())))
        return 0 if args else 2
    try:
        if args[0] not in COMMANDS:
            raise unknown_name("COMMAND", args[0], COMMANDS)
        return importlib.import_module(f"benchmarks.{_MODULES.get(args[0], args[0])}").main(args[1:])
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"benchmarks: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())

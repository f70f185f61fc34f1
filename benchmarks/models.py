"""``python -m benchmarks models``: the training steps of all models, ``uvit`` and then ``unet``."""

import argparse
import time
from collections.abc import Sequence

from benchmarks import unet, uvit
from benchmarks.model_command import add_options, run

SUITES = (uvit.SUITE, unet.SUITE)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code, the larger of the two."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks models",
        description="Time the training steps of all models: uvit, then unet, each into its own result file. --model, "
        "--recipe and --batch-size belong to these two.",
    )
    add_options(parser)
    options = parser.parse_args(args)
    begun = time.perf_counter()
    code = 0
    for number, suite in enumerate(SUITES):
        left = max(0.0, options.seconds - (time.perf_counter() - begun)) / (len(SUITES) - number)
        code = max(code, run(suite, [*args, "--seconds", str(left)]))
    return code

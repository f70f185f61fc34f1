"""Seconds of a training step, measured for several runs in turns, so that what slows the machine slows all alike."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from scalelong_fast.analysis.progress import Progress, silent
from scalelong_fast.analysis.training import Ready, set_up
from scalelong_fast.training import RunConfig

#: Steps before anything is timed: memory is allocated, moments are made.
WARM_UP = 2


def step_seconds(
    configs: Mapping[str, RunConfig], rounds: int, steps: int = 2, progress: Progress = silent
) -> dict[str, list[float]]:
    """Seconds of a step of each run, the drawing of its batch included, evaluation and saving not.

    Args:
        configs: runs by name.
        rounds: visits of each run; every round begins with another one.
        steps: timed steps of a visit, after an untimed one that fills the caches again.
        progress: told after each visit.

    Returns:
        By name, one mean for each round.
    """
    runs = {name: set_up(config) for name, config in configs.items()}
    taken = dict.fromkeys(runs, 0)

    def take(name: str, count: int) -> None:
        run = runs[name]
        for _ in range(count):
            run.step(taken[name], run.source(taken[name]))
            taken[name] += 1
        _wait(run)

    try:
        for name in runs:
            take(name, WARM_UP)
        names, seconds = list(runs), {name: [] for name in runs}
        for number in range(rounds):
            first = number % len(names)
            for place, name in enumerate(names[first:] + names[:first]):
                progress(number * len(names) + place, rounds * len(names), f"time of a step, {name}")
                take(name, 1)
                start = time.perf_counter()
                take(name, steps)
                seconds[name].append((time.perf_counter() - start) / steps)
    finally:
        for run in runs.values():
            run.source.close()
    return seconds


def ratio_spread(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile over rounds of a round's own ratio, which a drift leaves unmoved."""
    p20, median, p80 = np.percentile(np.asarray(own) / np.asarray(other), [20, 50, 80])
    return float(p20), float(median), float(p80)


def _wait(run: Ready) -> None:
    device = run.step.execution.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)

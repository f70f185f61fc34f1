"""Interleaved timing: every variant is measured in every round, so that a drifting machine hits all alike."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Summary:
    """Median and 20th and 80th percentile of some times, in seconds."""

    median: float
    p20: float
    p80: float


def summarize(times: Sequence[float]) -> Summary:
    """Percentiles of ``times`` (seconds), linearly interpolated between neighbours."""
    p20, median, p80 = np.percentile(times, [20, 50, 80])
    return Summary(float(median), float(p20), float(p80))


def speed_up(reference: Sequence[float], times: Sequence[float]) -> float:
    """How many times faster than the reference: the ratio of the medians; above 1 is faster."""
    return statistics.median(reference) / statistics.median(times)


def round_speed_up(reference: Sequence[float], times: Sequence[float]) -> float:
    """The median over rounds of each round's own speed-up, which a slow drift of the machine leaves unmoved."""
    return statistics.median(r / t for r, t in zip(reference, times, strict=True))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that makes a call and returns the seconds it took: by events on a GPU, else by the host's clock."""

    def on_host(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def on_gpu(call: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

    return on_gpu if device.type == "cuda" else on_host


def rotate(
    visits: Mapping[str, Callable[[], float]], *, rounds: int, tick: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """Make visits round-robin.

    Each round begins with another variant, so that none always follows the same one after a round's end.

    Args:
        visits: by name; each returns the seconds of a call.
        rounds: visits of each variant.
        tick: told the name of the variant after each visit.

    Returns:
        What the visits returned, by name: one number for each round.
    """
    names = list(visits)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds if names else 0):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(visits[name]())
            tick(name)
    return times


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    steps: int,
    wait: Callable[[], None] = lambda: None,
    tick: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time callables round-robin.

    A visit is one untimed call, since another variant has just emptied the caches, and then ``steps`` timed ones.

    Args:
        variants: callables by name; each call is one step.
        rounds: visits of each variant.
        steps: timed calls of a visit.
        wait: blocks until queued work is done; called before each reading of the clock.
        tick: told the name of the variant after each visit.
        clock: seconds, monotonic.

    Returns:
        Seconds per step by name: one number, a visit's mean, for each round.
    """

    def visit(step: Callable[[], object]) -> float:
        step()
        wait()
        start = clock()
        for _ in range(steps):
            step()
        wait()
        return (clock() - start) / steps

    return rotate({name: functools.partial(visit, step) for name, step in variants.items()}, rounds=rounds, tick=tick)

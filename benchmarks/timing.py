"""Interleaved timing: every variant is measured in every round, so that a drifting machine hits all alike."""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch

from scalelong_fast.errors import invalid

Name = TypeVar("Name", bound=Hashable)


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


def check_seconds(seconds: float) -> None:
    """Refuse a budget of time that is none; infinite means that there is none to keep to."""
    if not seconds >= 0:
        raise invalid("--seconds", seconds, "a number >= 0")


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


#: Rounds that are made whatever the time: fewer say nothing about the spread.
MIN_ROUNDS = 3


def rotate(
    visits: Mapping[Name, Callable[[], float]],
    *,
    rounds: int,
    tick: Callable[[Name], None] = lambda name: None,
    deadline: float = math.inf,
) -> dict[Name, list[float]]:
    """Make visits round-robin.

    Each round begins with another variant, so that none always follows the same one after a round's end.

    Args:
        visits: by name; each returns the seconds of a call.
        rounds: visits of each variant.
        tick: told the name of the variant after each visit.
        deadline: reading of ``time.perf_counter`` after which no round begins, but for the first :data:`MIN_ROUNDS`.

    Returns:
        What the visits returned, by name: one number for each round.
    """
    names = list(visits)
    times: dict[Name, list[float]] = {name: [] for name in names}
    for index in range(rounds if names else 0):
        if index >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(visits[name]())
            tick(name)
    return times


def interleave(
    variants: Mapping[Name, Callable[[], object]],
    *,
    rounds: int,
    steps: int,
    wait: Callable[[], None] = lambda: None,
    tick: Callable[[Name], None] = lambda name: None,
    around: Callable[[Name], AbstractContextManager[object]] = lambda name: nullcontext(),
    clock: Callable[[], float] = time.perf_counter,
    deadline: float = math.inf,
) -> dict[Name, list[float]]:
    """Time callables round-robin.

    A visit is one untimed call, since another variant has just emptied the caches, and then ``steps`` timed ones.

    Args:
        variants: callables by name; each call is one step.
        rounds: visits of each variant.
        steps: timed calls of a visit.
        wait: blocks until queued work is done; called before each reading of the clock.
        tick: told the name of the variant after each visit.
        around: the context in which the variant of a name is visited.
        clock: seconds, monotonic.
        deadline: as for :func:`rotate`.

    Returns:
        Seconds per step by name: one number, a visit's mean, for each round.
    """

    def visit(name: Name, step: Callable[[], object]) -> float:
        with around(name):
            step()
            wait()
            start = clock()
            for _ in range(steps):
                step()
            wait()
            return (clock() - start) / steps

    visits = {name: functools.partial(visit, name, step) for name, step in variants.items()}
    return rotate(visits, rounds=rounds, tick=tick, deadline=deadline)


class _CallError(RuntimeError):
    """A call that was timed failed; the only argument is its name."""


def survivors(
    measure: Callable[[Mapping[Name, Callable[[], Any]]], dict[Name, list[float]]],
    calls: Mapping[Name, Callable[[], Any]],
    failed: Callable[[Name, BaseException], Collection[Name]],
) -> dict[Name, list[float]]:
    """Measure calls, and where one fails (no memory is left, as a rule) the others from the start without it.

    What a GPU reports only when it is waited for is nobody's failure here: it ends the measurement.

    Args:
        measure: such as :func:`interleave`.
        calls: by name.
        failed: told the name of each that failed and what it raised; returns the names that are to go with it.

    Returns:
        What ``measure`` returned for those that are left; empty where none is.
    """

    def named(name: Name, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise _CallError(name) from error

    left = dict(calls)
    while left:
        try:
            return measure({name: functools.partial(named, name, call) for name, call in left.items()})
        except _CallError as error:
            name = error.args[0]
            gone = {name, *failed(name, cast(BaseException, error.__cause__))}
        # The error is forgotten by now, and with its frames what the failed call held.
        gc.collect()
        left = {name: call for name, call in left.items() if name not in gone}
    return {}


def described(what: str, error: BaseException) -> str:
    """One line about what failed."""
    lines = str(error).strip().splitlines()
    return f"{what}: {type(error).__name__}: {lines[0] if lines else ''}"

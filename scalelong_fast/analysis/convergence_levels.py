"""How soon training curves reach a level, seed by seed against ``none``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalelong_fast.analysis.learning_curve import steps_to
from scalelong_fast.analysis.statistics import Band, band
from scalelong_fast.analysis.step_time import ratio_spread
from scalelong_fast.errors import invalid

#: A curve: steps, and the values recorded at them.
Curve = tuple[Sequence[float], Sequence[float]]
#: What a 95 % band over seeds says.
FASTER, SLOWER, NEITHER = "faster", "slower", "no difference shown (the 95 % band holds 1)"
ALONE = "one seed, which shows nothing,"
#: Measures in words.
_NAMES = {"loss": "loss", "distance": "Fréchet distance"}


@dataclass(frozen=True)
class Level:
    """What a curve is to come down to.

    Attributes:
        measure: ``loss`` or ``distance``.
        value: the level, or the share.
        relative: a share of what ``none`` of the same seed has at the end.
    """

    measure: str
    value: float
    relative: bool = False

    def of(self, none: Curve) -> float:
        """The level for a seed, given the curve of ``none``; a share of an empty one's end is out of reach."""
        if not self.relative:
            return self.value
        return self.value * none[1][-1] if none[1] else -math.inf

    def describe(self) -> str:
        """In words."""
        name = _NAMES[self.measure]
        return f"{self.value:g} × none's final {name}" if self.relative else f"{name} {self.value:g}"


@dataclass(frozen=True)
class Reached:
    """How soon each scaling reached a level.

    Attributes:
        level: the level.
        steps: by scaling, those of each seed; None where it did not get there.
        times: seconds of a step by scaling, one for each round of the timing.
        factors: by scaling but ``none``, the steps of ``none`` over its own: geometric mean over seeds, with its band;
            None where one of the two did not get there with every seed, or was there at step 0.
    """

    level: Level
    steps: dict[str, list[float | None]]
    times: Mapping[str, Sequence[float]]
    factors: dict[str, Band | None]

    def in_seconds(self, scaling: str) -> Band | None:
        """The seconds of ``none`` over those of a scaling: the factor in steps times that in the time of a step, whose
        spread over rounds widens the band."""
        factor = self.factors[scaling]
        if factor is None:
            return None
        p20, median, p80 = ratio_spread(self.times["none"], self.times[scaling])
        return Band(median * factor.mean, p20 * factor.low, p80 * factor.high, factor.count)

    def why_no_factor(self, scaling: str) -> str:
        """Of a scaling without a factor, which of the two is the reason; ``{}`` stands for the level."""
        own, none = self.steps[scaling], self.steps["none"]
        if None in own:
            if None in none:
                return f"Neither {scaling} nor none got to {{}} with every seed."
            return f"{scaling} did not get to {{}} with every seed, none did."
        if None in none:
            return f"{scaling} got to {{}} with every seed, none did not."
        return f"At step 0 already {scaling} or none was at {{}}, which compares nothing."

    def describe(self) -> str:
        """The factors in steps, in words."""
        factors = [f"{'–' if f is None else format(f.mean, '.2f')} ({scaling})" for scaling, f in self.factors.items()]
        return f"to {self.level.describe()} {', '.join(factors)}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        median = {scaling: float(np.median(rounds)) for scaling, rounds in self.times.items()}
        seconds = {s: [None if n is None else n * median[s] for n in own] for s, own in self.steps.items()}
        return {
            "measure": self.level.measure,
            "level": self.level.value,
            "relative_to_none": self.level.relative,
            "steps": self.steps,
            "seconds": seconds,
            "steps_over_own": {s: None if f is None else f.as_dict() for s, f in self.factors.items()},
            "seconds_over_own": {s: None if (f := self.in_seconds(s)) is None else f.as_dict() for s in self.factors},
        }


def compare_levels(
    level: Level, curves: Mapping[str, Sequence[Curve]], times: Mapping[str, Sequence[float]]
) -> Reached:
    """How soon the curves of each scaling, one per seed, came down to ``level``; ``none`` is among them.

    Raises:
        UserError: a level that is no share was reached before the training began.
    """
    levels = [level.of(none) for none in curves["none"]]
    steps = {
        scaling: [steps_to(value, *curve) for value, curve in zip(levels, own, strict=True)]
        for scaling, own in curves.items()
    }
    if not level.relative and any(step == 0 for own in steps.values() for step in own):
        name = _NAMES[level.measure]
        raise invalid(f"--{level.measure}-levels", level.value, f"levels below the {name} at step 0")
    factors = {s: _factor(own, steps["none"]) for s, own in steps.items() if s != "none"}
    return Reached(level, steps, times, factors)


def _factor(own: Sequence[float | None], none: Sequence[float | None]) -> Band | None:
    pairs = [(a, b) for a, b in zip(own, none, strict=True) if a is not None and b is not None]
    if len(pairs) < len(own) or any(0 in pair for pair in pairs):
        return None
    logs = band([math.log(b / a) for a, b in pairs])
    return Band(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.count)


def verdict(reached: Sequence[Reached], scalings: Sequence[str]) -> str:
    """Whether scalings were faster than ``none``, plainly: by the 95 % band of the factor over seeds."""
    told = []
    for scaling in scalings:
        found: dict[str, list[str]] = {}
        without: dict[str, list[str]] = {}
        for entry in reached:
            factor, in_seconds = entry.factors[scaling], entry.in_seconds(scaling)
            if factor is None or in_seconds is None:
                without.setdefault(entry.why_no_factor(scaling), []).append(entry.level.describe())
                continue
            steps, seconds = _judge(factor), _judge(in_seconds)
            for word in dict.fromkeys((steps, seconds)):
                unit = "" if steps == seconds else " in steps" if word == steps else " in seconds"
                found.setdefault(word, []).append(f"{entry.level.describe()}{unit}")
        if found:
            head = "faster" if set(found) == {FASTER} else "partly faster" if FASTER in found else "not faster"
            details = "; ".join(f"{word} to {', '.join(levels)}" for word, levels in found.items())
            told.append(f"{scaling} was {head} than none: {details}.")
        told += [why.format(", ".join(levels)) for why, levels in without.items()]
    return " ".join(told)


def _judge(factor: Band) -> str:
    if factor.count < 2:
        return ALONE
    return FASTER if factor.low > 1 else SLOWER if factor.high < 1 else NEITHER

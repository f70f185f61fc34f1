"""Bands over seeds, and how well one number explains another."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from scalelong_fast.data.optional import import_optional

#: Coverage of every confidence band here.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Band:
    """Mean of independent values with a two-sided 95 % confidence interval of Student's t.

    Attributes:
        mean: of the values.
        low, high: of the interval; equal to the mean, and no interval at all, where there is one value only.
        count: how many values.
    """

    mean: float
    low: float
    high: float
    count: int

    def overlaps(self, other: "Band") -> bool:
        """Whether the two intervals have a point in common; always so where one of them is of a single value."""
        if min(self.count, other.count) < 2:
            return True
        return self.low <= other.high and other.low <= self.high

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def band(values: Sequence[float]) -> Band:
    """The :class:`Band` of at least one value, one per seed."""
    array = np.asarray(values, dtype=np.float64)
    mean, count = float(array.mean()), len(array)
    if count == 1:
        return Band(mean, mean, mean, 1)
    quantile = float(import_optional("scipy.stats").t.ppf((1 + CONFIDENCE) / 2, count - 1))
    half = quantile * float(array.std(ddof=1)) / math.sqrt(count)
    return Band(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Line:
    """Least squares y ≈ slope · x + offset.

    Attributes:
        slope, offset: of the line.
        r2: share of the variance of y that it explains, 1 for a perfect fit; NaN where y does not vary.
    """

    slope: float
    offset: float
    r2: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit a line through at least two points of differing x."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    slope = float(((xs - xs.mean()) * (ys - ys.mean())).sum() / ((xs - xs.mean()) ** 2).sum())
    offset = float(ys.mean() - slope * xs.mean())
    total = float(((ys - ys.mean()) ** 2).sum())
    left = float(((ys - slope * xs - offset) ** 2).sum())
    return Line(slope, offset, 1 - left / total if total > 0 else math.nan)

"""Scalings against ``none`` at equal seeds."""

from collections.abc import Mapping, Sequence

from scalelong_fast.analysis.statistics import Band, band


def less_none(by_scaling: Mapping[str, Sequence[float]]) -> dict[str, Band]:
    """What each scaling has more than ``none``, seed by seed: equal seeds see equal batches.

    Args:
        by_scaling: a value for each seed, by scaling.

    Returns:
        The band of the differences by scaling but ``none``; empty where there is no ``none``.
    """
    none = by_scaling.get("none")
    if none is None:
        return {}
    pairs = {scaling: zip(own, none, strict=True) for scaling, own in by_scaling.items() if scaling != "none"}
    return {scaling: band([own - other for own, other in pair]) for scaling, pair in pairs.items()}


def sign(difference: Band) -> str:
    """What a band of differences to ``none`` shows: ``less`` or ``more`` where it leaves out 0."""
    if difference.count < 2 or difference.low <= 0 <= difference.high:
        return "no difference shown"
    return "less" if difference.mean < 0 else "more"

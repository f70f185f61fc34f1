"""The picture of ``convergence``: curves against steps and against seconds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scalelong_fast.analysis.statistics import band

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = {"loss": "loss on the probe", "distance": "Fréchet distance of samples"}


def draw_curves(
    figure: "Figure",
    curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]],
    seconds_per_step: Mapping[str, float],
    measures: Mapping[str, tuple[str, str]],
) -> None:
    """Draw a row for each measure, mean and 95 % band over the seeds that did not diverge, on the left by steps, on the
    right by seconds.

    Args:
        figure: empty.
        curves: by scaling, a curve for each seed.
        seconds_per_step: by scaling.
        measures: by name, the keys of steps and values in a curve.
    """
    figure.set_size_inches(9, 3.6 * len(measures) + 0.4)
    for row, (measure, (steps, values)) in enumerate(measures.items()):
        for column, unit in enumerate(("steps", "seconds")):
            axes = figure.add_subplot(len(measures), 2, 2 * row + column + 1)
            for scaling, found in curves.items():
                factor = seconds_per_step[scaling] if unit == "seconds" else 1.0
                whole = [curve for curve in found if curve[steps]]  # one that diverged is empty
                if not whole:
                    continue
                places = [factor * step for step in whole[0][steps]]
                bands = [band(column) for column in zip(*(curve[values] for curve in whole), strict=True)]
                axes.plot(places, [b.mean for b in bands], marker=".", linewidth=1, label=scaling)
                axes.fill_between(places, [max(b.low, 0.0) for b in bands], [b.high for b in bands], alpha=0.2)
            axes.set_xlabel("step" if unit == "steps" else "seconds of training, evaluation left out")
            axes.set_ylabel(_LABELS[measure])
            axes.set_yscale("log")
            axes.grid(True, alpha=0.3)
            axes.legend()
    figure.suptitle("Convergence by scaling (ScaleLong Fig. 5), mean and 95 % band")

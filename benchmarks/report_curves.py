"""The part of ``python -m benchmarks report`` on growth: tables and pictures, from ``curves.json``."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import slug

#: What is varied, and what its axis is called.
SWEEPS = {
    "batch": "images",
    "tokens": "tokens (UNet: pixels)",
    "width": "width (UNet: channels)",
    "skips": "long skips",
}
#: What is read off a training step: key of a record, its axis, and what it is divided by there.
QUANTITIES = {"median_us": ("ms", 1e3), "peak_mib": ("peak MiB", 1)}

_COLOURS = {"eager": "#555555", "compile": "#c8a24a", "ours": "#7fb2e5", "ours_compile": "#2a6fbb"}


def kinds(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The kinds of recipe among records: their variants without the scaling."""
    return list(dict.fromkeys(record["variant"].rsplit("_", 1)[0] for record in records))


def curve(records: Sequence[Mapping[str, Any]], sweep: str, variant: str, key: str) -> list[tuple[int, float]]:
    """Points of one curve of one model, by where they lie on the axis.

    Args:
        records: of the model.
        sweep: of :data:`SWEEPS`.
        variant: a recipe's name.
        key: of the number on the other axis; records without one are left out.
    """
    own = [r for r in records if sweep in r["sweeps"] and r["variant"] == variant and r.get(key) is not None]
    return sorted((record[sweep], record[key]) for record in own)


def growth(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Exponent e and R² of y ∝ x^e, fitted to logarithms by least squares.

    Returns:
        None below three points, through two of which anything goes, or where they do not differ in x. R² of a constant
        y is 1.
    """
    if len(points) < 3 or len({x for x, _ in points}) < 2:
        return None
    xs, ys = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    slope = statistics.linear_regression(xs, ys).slope
    constant = max(ys) == min(ys)
    return slope, 1.0 if constant else statistics.correlation(xs, ys) ** 2


def curves_rows(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a row for each model, sweep and kind of recipe."""
    headings = ["model", "varied", "recipe", "from – to", "time ∝, none", "LS", "R² ≥"]
    headings += ["memory ∝, none", "LS", "R² ≥", "LS tax, time", "memory"]
    rows = []
    for label in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == label]
        for sweep in SWEEPS:
            rows += [_row(label, own, sweep, kind) for kind in kinds(own)]
    return headings, [row for row in rows if row]


def _row(label: str, records: Sequence[Mapping[str, Any]], sweep: str, kind: str) -> list[str]:
    none, ls = f"{kind}_none", f"{kind}_ls"
    along = [x for x, _ in curve(records, sweep, none, "median_us")]
    if len(along) < 2:  # the base point alone is no sweep
        return []
    fits = []
    for key in QUANTITIES:
        pair = [growth(curve(records, sweep, variant, key)) for variant in (none, ls)]
        known = [fit[1] for fit in pair if fit is not None]
        fits += ["–" if fit is None else f"{fit[0]:.2f}" for fit in pair]
        fits.append(f"{min(known):.3f}" if known else "–")
    plain = dict(curve(records, sweep, none, "peak_mib"))
    memory = [peak / plain[x] for x, peak in curve(records, sweep, ls, "peak_mib") if plain.get(x)]
    return [
        label,
        sweep,
        kind,
        f"{along[0]} – {along[-1]}",
        *fits,
        _range([ratio for _, ratio in curve(records, sweep, ls, "time_over_no_scaling")]),
        _range(memory),
    ]


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.3f} – {max(ratios):.3f}" if ratios else "–"


def curves_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of ``curves.json``."""
    from benchmarks.report import STALE, conditions, is_stale, markdown

    records = result["records"]
    headings, rows = curves_rows(records)
    stale = {
        (record["model"], sweep, record["variant"].rsplit("_", 1)[0])
        for record in records
        if is_stale(record, root)
        for sweep in record["sweeps"]
    }
    for row in rows:
        row[2] += STALE * (tuple(row[:3]) in stale)
    shown = list(dict.fromkeys(record["model"] for record in records))
    bases = [record for record in records if len(record["sweeps"]) == len(SWEEPS)]
    at = "; ".join(
        dict.fromkeys(f"{r['model']}: {', '.join(f'{sweep} {r[sweep]}' for sweep in SWEEPS)}" for r in bases)
    )
    note = (
        "Whole training steps; one of batch, tokens (of a UNet: pixels), width (of a UNet: channels of the outermost "
        f"level) and number of long skips is varied, the others are those of the base point ({at}). ∝: exponent e of "
        "y ∝ x^e, fitted to the logarithms over all points of the curve, without scaling and with LS, and the lower "
        "R² of the two; costs that do not grow pull both down. Time: median of interleaved rounds. Memory: "
        "the most that a step holds above weights, AdamW's moments and the average. LS tax: with LS over without, "
        "same recipe, lowest and highest over the points; of time, the median of the rounds' own."
    )
    paths = [picture_path(result, label) for label in shown]
    images = [f"![Time and memory of {label}]({path})" for label, path in zip(shown, paths, strict=True)]
    images = [image for image, path in zip(images, paths, strict=True) if (root / path).is_file()]
    return [*markdown(headings, rows), "", note, "", conditions(result), *([""] * bool(images)), *images]


def picture_path(result: Mapping[str, Any], label: str) -> str:
    """Where the curves of a model lie, relative to the repository."""
    from benchmarks.report_plots import picture_path as path_of

    return path_of(f"curves-{slug(label)}", result)


def draw_curves(result: Mapping[str, Any], label: str, path: Path) -> None:
    """Draw time and memory of one model against each sweep, both axes logarithmic: a straight line is a power."""
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    from benchmarks.report_plots import save

    records = [record for record in result["records"] if record["model"] == label]
    figure, grid = pyplot.subplots(
        len(QUANTITIES), len(SWEEPS), figsize=(13, 6), layout="constrained", sharey="row", squeeze=False
    )
    for axes_of_row, (key, (unit, factor)) in zip(grid, QUANTITIES.items(), strict=True):
        for axes, (sweep, title) in zip(axes_of_row, SWEEPS.items(), strict=True):
            ticks: set[int] = set()
            for kind in kinds(records):
                for scaling, style in (("none", "--o"), ("ls", "-s")):
                    points = [(x, y / factor) for x, y in curve(records, sweep, f"{kind}_{scaling}", key)]
                    if len(points) < 2:  # the base point alone is no curve
                        continue
                    ticks |= {x for x, _ in points}
                    fit = growth(points)
                    note = "" if fit is None else f" x^{fit[0]:.2f}"
                    axes.plot(
                        *zip(*points, strict=True),
                        style,
                        color=_COLOURS.get(kind),
                        markersize=4,
                        linewidth=1,
                        label=f"{kind}, {'LS' if scaling == 'ls' else 'none'}{note}",
                    )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(sorted(ticks))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
            axes.tick_params(axis="y", which="both", labelsize=7)
            axes.set_xlabel(title)
            axes.grid(alpha=0.3, linewidth=0.5)
            if ticks:
                axes.legend(fontsize=6)
        axes_of_row[0].set_ylabel(f"{label}\ntraining step, {unit}", fontsize=8)
    save(figure, result, path)

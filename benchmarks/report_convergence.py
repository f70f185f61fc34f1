"""The part of ``python -m benchmarks report`` on convergence, from ``convergence.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: The variant that all factors are set against: plain PyTorch without scaling.
BASELINE = "eager_none"
_STYLES = {"eager": "--", "ours": "-", "ours_compile": ":"}


def convergence_rows(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a row for each scaling and way to compute a step."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "–" if value is None else format(value, form)

    def band(record: Mapping[str, Any]) -> str:
        found = record["factor_steps_band"]
        return number(record["factor_steps"]) + ("" if found is None else f" ({found[0]:.2f} – {found[1]:.2f})")

    headings = ["scaling", "step", "ms", "p20 – p80", "steps to the loss", "seconds", "× in steps (95 %)"]
    rows = [
        [
            record["scaling"],
            record["variant"].removesuffix(f"_{record['scaling']}"),
            f"{record['median_us'] / 1e3:.4g}",
            f"{record['p20_us'] / 1e3:.4g} – {record['p80_us'] / 1e3:.4g}",
            number(record["steps_to_level"], ".0f"),
            number(record["seconds_to_level"], ".4g"),
            band(record),
            number(record["factor_throughput"]),
            number(record["factor"]),
            number(record["loss_gap"], ".1e"),
        ]
        for record in records
    ]
    return [*headings, "× in throughput", "× in time", "loss gap"], rows


def convergence_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of ``convergence.json``."""
    from benchmarks.report import STALE, conditions, is_stale, markdown

    records = result["records"]
    if not records:
        return ["Networks were trained, and their steps not timed.", "", conditions(result)]
    headings, rows = convergence_rows(records)
    for row, record in zip(rows, records, strict=True):
        row[1] += STALE * is_stale(record, root)
    settings, first = result["settings"], records[0]
    note = (
        f"{first['model']} of depth {settings['depth']} on {settings['data']}, batch {first['shape'][0]}, "
        f"{settings['steps']} steps, {first['seeds']} seeds. The loss to reach (averaged weights, fixed probe) is "
        f"{settings['level']}, seed by seed. × in steps: the steps of none over a scaling's own, geometric mean over "
        "seeds with its 95 % band; × in throughput: over plain eager PyTorch without scaling, from "
        f"{first['rounds']} interleaved rounds; × in time: the product of both, – where not every seed got there. "
        "The paper's abstract has an acceleration of about 1.5 by CS and LS. eager: plain PyTorch; ours: our ops, "
        "eager; ours_compile: compiled; authors: their released recipe re-created, with its own optimiser, so that "
        "the steps of our trainings say nothing of it. Loss gap: the largest relative difference between plain and "
        f"fused losses, not compiled, in {settings['check_steps']} steps of training."
    )
    return [*markdown(headings, rows), "", note, "", conditions(result)]


def draw_convergence(result: Mapping[str, Any], path: Path) -> None:
    """Draw the mean loss against steps, and against seconds of each way to compute them."""
    from matplotlib import pyplot

    from benchmarks.report_plots import save

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    times = {record["variant"]: record["median_us"] / 1e6 for record in result["records"]}
    for place, (scaling, found) in enumerate(result["curves"].items()):
        steps = found[0]["steps"]
        losses = [sum(values) / len(found) for values in zip(*(curve["losses"] for curve in found), strict=True)]
        left.plot(steps, losses, color=f"C{place}", linewidth=1.2, label=scaling)
        for kind, style in _STYLES.items():
            if f"{kind}_{scaling}" in times:
                seconds = [step * times[f"{kind}_{scaling}"] for step in steps]
                right.plot(seconds, losses, color=f"C{place}", linestyle=style, linewidth=1.2)
    for kind, style in _STYLES.items():
        right.plot([], [], color="black", linestyle=style, label=kind)
    left.set_xlabel("step")
    right.set_xlabel("seconds of training")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylabel("loss on the probe, mean over seeds")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, result, path)

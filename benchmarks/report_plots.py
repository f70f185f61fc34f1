"""Pictures of ``python -m benchmarks report`` besides the bars of the ops: roofline, peak memory, curves."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report_convergence, report_curves
from benchmarks.report_ops import groups

#: Variants that pictures show, in the order of the legend, and their colours.
COLOURS = {"eager": "#555555", "compile": "#9e9e9e", "dispatch": "#2a6fbb"}
#: FLOP/byte from which an op is shown under the roof; below, the bytes say all.
INTENSE = 1.0
#: Names of dtypes in the ceilings of a result file, by that of the product.
_CEILINGS = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16", "float32_to_bfloat16": "bf16"}


def picture_path(kind: str, result: Mapping[str, Any]) -> str:
    """Where a picture of a result file lies, relative to the repository."""
    return f"docs/images/{kind}-{re.sub(r'[^a-z0-9-]', '-', result['environment']['machine'])}.png"


def roofline_points(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the roofline shows: ops of :data:`INTENSE` and more, forward and backward together, as they were timed.

    Returns:
        For each timed variant of :data:`COLOURS`: ``op``, ``variant``, ``dtype``; ``intensity``, FLOP over the bytes
        that must move; ``tflop_s``, 10^12 FLOP over the median time.
    """
    return [
        {
            "op": record["op"],
            "variant": record["variant"],
            "dtype": record["dtype"],
            "intensity": record["flop"] / record["bytes"],
            "tflop_s": record["flop"] / record["median_us"] / 1e6,
        }
        for record in _counted(records)
        if _is_intense(record)
    ]


def bandwidth_bars(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """10^9 bytes that must move over the median time, by op and shape, then by variant: the other ops."""
    return _by_case([record for record in _counted(records) if not _is_intense(record)], "gb_s")


def _is_intense(record: Mapping[str, Any]) -> bool:
    return record["flop"] >= INTENSE * record["bytes"]


def op_memory(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Peak MiB of a forward and its backward, by op and shape, then by variant."""
    return _by_case([record for record in records if record["direction"] == "fwd_bwd"], "peak_mib")


def step_memory(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Peak MiB of whole training steps, by model and recipe, where it was recorded."""
    return {
        f"{record['model']}, {record['variant']}": {"peak": record["peak_mib"]}
        for record in records
        if record["direction"] == "step" and record["peak_mib"] is not None
    }


def _counted(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of :data:`COLOURS` that were timed and whose bytes are in the record, forward and backward together."""
    return [
        record
        for record in records
        if record["direction"] == "fwd_bwd"
        and record["variant"] in COLOURS
        and record["median_us"] is not None
        and record.get("bytes")
    ]


def _by_case(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """A figure of the variants of :data:`COLOURS`, where it is known, by op and shape, then by variant."""
    found: dict[str, dict[str, float]] = {}
    for (name, _), group in groups(records).items():
        known = {v: group[v][key] for v in COLOURS if v in group and group[v].get(key) is not None}
        found.update({name: known} if known else {})
    return found


def draw_roofline(result: Mapping[str, Any], path: Path) -> None:
    """Draw the FLOP a second of products under the measured ceilings, and the bytes a second of the other ops."""
    from matplotlib import pyplot

    points, bars = roofline_points(result["records"]), bandwidth_bars(result["records"])
    limits = result["ceilings"]
    height = max(4.5, 0.9 + 0.34 * len(bars))
    figure, (roof, bandwidth) = pyplot.subplots(1, 2, figsize=(13, height), layout="constrained")
    _draw_roof(roof, points, limits)
    _draw_bars(bandwidth, bars, "{:.3g}")
    bandwidth.axvline(limits["copy_gb_s"], color="black", linewidth=0.8, label="copy, measured")
    bandwidth.set_xlabel("GB/s: bytes that must move / time, forward + backward")
    if bars:
        bandwidth.legend(fontsize=7, loc="lower right")
    save(figure, result, path)


def _draw_roof(axes: Any, points: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> None:
    slope = limits["copy_gb_s"] / 1e3  # TFLOP/s for each FLOP/byte
    used = {_CEILINGS[point["dtype"]] for point in points}
    ceilings = {dtype: value for dtype, value in limits["matmul_tflop_s"].items() if dtype in used}
    intensities = [point["intensity"] for point in points] + [value / slope for value in ceilings.values()]
    low, high = min(intensities, default=1.0) / 2, max(intensities, default=1.0) * 2
    for dtype, value in ceilings.items():
        corner = value / slope
        axes.plot([low, corner, high], [low * slope, value, value], color="black", linewidth=0.8)
        axes.text(high, value, f"{dtype} ", ha="right", va="bottom", fontsize=7)
    ops = list(dict.fromkeys(point["op"] for point in points))
    for point in points:
        bf16 = _CEILINGS[point["dtype"]] == "bf16"
        axes.plot(
            point["intensity"],
            point["tflop_s"],
            marker="osv^DP*X<>"[ops.index(point["op"]) % 10],
            color=COLOURS[point["variant"]],
            fillstyle="full" if bf16 else "none",
            markersize=6,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP/byte that must move")
    axes.set_ylabel("TFLOP/s (full: bf16, hollow: fp32), forward + backward")
    for index, op in enumerate(ops):
        axes.plot([], [], marker="osv^DP*X<>"[index % 10], color="black", linestyle="", fillstyle="none", label=op)
    for variant in dict.fromkeys(point["variant"] for point in points):
        axes.plot([], [], marker="s", color=COLOURS[variant], linestyle="", label=variant)
    if points:
        axes.legend(fontsize=7, loc="lower right")


def draw_memory(bars: Mapping[str, Mapping[str, float]], result: Mapping[str, Any], path: Path) -> None:
    """Draw bars of peak memory, in MiB."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.42 * len(bars)), layout="constrained")
    _draw_bars(axes, bars, "{:.4g}")
    axes.set_xscale("log")
    axes.set_xlabel("peak MiB, above what is there before")
    if any(len(row) > 1 for row in bars.values()):
        axes.legend(fontsize=7, loc="lower right")
    save(figure, result, path)


def _draw_bars(axes: Any, bars: Mapping[str, Mapping[str, float]], form: str) -> None:
    variants = list(dict.fromkeys(variant for row in bars.values() for variant in row))
    height = 0.8 / max(1, len(variants))
    for place, variant in enumerate(variants):
        rows = [(index, row[variant]) for index, row in enumerate(bars.values()) if variant in row]
        where = [index + (place - (len(variants) - 1) / 2) * height for index, _ in rows]
        axes.barh(where, [value for _, value in rows], height, color=COLOURS.get(variant, "#2a6fbb"), label=variant)
        for at, (_, value) in zip(where, rows, strict=True):
            axes.text(value, at, f" {form.format(value)}", va="center", fontsize=6)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=7)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.margins(x=0.08)


def save(figure: Any, result: Mapping[str, Any], path: Path) -> None:
    """Write a figure, headed by machine, version and date of a result, and close it."""
    from matplotlib import pyplot

    where = result["environment"]
    figure.suptitle(f"{where['machine']}, PyTorch {where['torch']}, {where['date']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def pictures(results: Path) -> dict[str, Callable[[Path], None]]:
    """The pictures that there are results for: how to draw each, by its path relative to the repository."""
    found: dict[str, Callable[[Path], None]] = {}
    for file in sorted(results.glob("*/ops.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if _counted(result["records"]):
            found[picture_path("roofline", result)] = lambda path, result=result: draw_roofline(result, path)
        bars = op_memory(result["records"])
        if bars:
            found[picture_path("memory-ops", result)] = lambda path, b=bars, result=result: draw_memory(b, result, path)
    for command in ("uvit", "unet"):
        for file in sorted(results.glob(f"*/{command}.json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            bars = step_memory(result["records"])
            if bars:
                name = picture_path(f"memory-{command}", result)
                found[name] = lambda path, b=bars, result=result: draw_memory(b, result, path)
    for file in sorted(results.glob("*/convergence.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        found[picture_path("convergence", result)] = lambda path, r=result: report_convergence.draw_convergence(r, path)
    for file in sorted(results.glob("*/curves.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        for label in dict.fromkeys(record["model"] for record in result["records"]):
            name = report_curves.picture_path(result, label)
            found[name] = lambda path, label=label, result=result: report_curves.draw_curves(result, label, path)
    return found


def draw_plots(results: Path, root: Path) -> list[str]:
    """Draw roofline, memory and curves of every machine; returns lines about what was not drawn."""
    wanted = pictures(results)
    if not wanted:
        return []
    try:
        import matplotlib
    except ModuleNotFoundError:
        return [f"{path} was not drawn: matplotlib is not installed." for path in wanted]
    matplotlib.use("Agg")
    for path, draw in wanted.items():
        draw(root / path)
    return []

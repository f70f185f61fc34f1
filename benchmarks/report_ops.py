"""The ops' part of ``python -m benchmarks report``: tables, bars and where we lose, from ``ops.json``."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Variants that are not plans of ours.
BASELINES = ("eager", "compile", "dispatch")
NO_GPU = "**No GPU measurement yet.** What the kernels gain on a GPU is predicted, not measured."

#: Directions in the order of interest.
_DIRECTIONS = {"fwd_bwd": "fwd + bwd", "fwd": "fwd", "bwd": "bwd"}


_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def case_name(record: Mapping[str, Any]) -> str:
    """Op, shape, dtype and layout in few words; ``fp32→bf16`` is a float32 stream under bf16 autocast."""
    layout = "" if record["layout"] == "rows" else f" {record['layout']}"
    dtype = "→".join(_DTYPES.get(name, name) for name in record["dtype"].split("_to_"))
    return f"{record['op']} {'×'.join(map(str, record['shape']))}{layout} {dtype}"


def groups(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """Records by (case, direction), then by variant; the most interesting direction first within a case."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    names = dict.fromkeys(case_name(record) for record in records)
    for name in names:
        for direction in _DIRECTIONS:
            found[name, direction] = {}
    for record in records:
        found[case_name(record), record["direction"]][record["variant"]] = record
    return {key: group for key, group in found.items() if group}


def best_plan(group: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The fastest timed plan that is more than the PyTorch definition, or None."""
    plans = [r for name, r in group.items() if name not in BASELINES and r["median_us"] is not None]
    return min(plans, key=lambda record: record["median_us"], default=None)


def _number(record: Mapping[str, Any] | None, key: str, form: str) -> str:
    return "–" if record is None or record.get(key) is None else format(record[key], form)


def ops_summary(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the comparison: one row for each case and direction."""
    headings = ["op", "direction", "eager µs", "compile µs", "dispatch µs", "plan", "× eager", "× compile"]
    headings += ["of the floor", "fastest plan", "launches", "MiB", "eager MiB"]
    rows = []
    for (name, direction), group in groups(records).items():
        eager, compiled, ours = (group.get(variant) for variant in BASELINES)
        best = best_plan(group)
        rows.append(
            [
                name,
                _DIRECTIONS[direction],
                _number(eager, "median_us", ".4g"),
                _number(compiled, "median_us", ".4g"),
                _number(ours, "median_us", ".4g"),
                "–" if ours is None else str(ours["plan"]),
                _number(ours, "speed_up_over_eager", ".2f"),
                _number(ours, "speed_up_over_compile", ".2f"),
                _number(ours, "fraction_of_floor", ".0%"),
                "–" if best is None else f"{best['variant']} {best['median_us']:.4g}",
                _number(ours, "launches", "d"),
                _number(ours, "peak_mib", ".4g"),
                _number(eager, "peak_mib", ".4g"),
            ]
        )
    return headings, rows


def ops_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of ``ops.json``: a row for each case, forward and backward together; the file has the rest."""
    from benchmarks.report import STALE, conditions, is_stale, markdown

    rows = []
    for (name, direction), group in groups(result["records"]).items():
        if direction != "fwd_bwd":
            continue
        eager, compiled, ours = (group.get(variant) for variant in BASELINES)
        best = best_plan(group)
        stale = any(is_stale(record, root) for record in group.values())
        rows.append(
            [
                name + STALE * stale,
                _number(eager, "median_us", ".4g"),
                _number(compiled, "median_us", ".4g"),
                "–" if ours is None else f"{ours['plan']} {_number(ours, 'median_us', '.4g')}",
                _number(ours, "speed_up_over_eager", ".2f"),
                _number(ours, "speed_up_over_compile", ".2f"),
                _number(ours, "fraction_of_floor", ".0%"),
                "–" if best is None else f"{best['variant']} {_number(best, 'median_us', '.4g')}",
                _number(ours, "launches", "d"),
                f"{_number(ours, 'peak_mib', '.4g')} ({_number(eager, 'peak_mib', '.4g')})",
                f"{_number(ours, 'host_us', '.0f')} ({_number(eager, 'host_us', '.0f')})",
            ]
        )
    headings = ["op, forward + backward", "eager µs", "compile µs", "dispatch: plan, µs", "× eager", "× compile"]
    headings += ["of the floor", "fastest plan, µs", "launches", "peak MiB (eager)", "host µs (eager)"]
    settings = result["settings"]
    notes = (
        f"Medians of {settings['rounds']} interleaved rounds. × : how many times faster dispatch, which is what a call "
        "gets, is than PyTorch eager and compiled. Floor: the bytes that must move at the copy bandwidth and the "
        "products at PyTorch's own rate for their shape, both of the same run. Host: the host's time for a call on "
        "small inputs. Every plan is within four times the error of its definition in PyTorch against float64. In the "
        "UNet's ops (GroupNorm, channels, conv1x1) eager and compile are what a user writes under autocast, eager on "
        "contiguous images; _pooled: the skip's statistics are handed over, _raw: the concat is returned too."
    )
    wrong = [f"{case_name(r)}: {r['variant']}: {r['note']}" for r in result["records"] if r["failed"]]
    faults = ["", f"**Faults**: {'; '.join(dict.fromkeys(wrong))}."] if wrong else []
    picture = picture_path(result)
    image = ["", f"![Speed-up over PyTorch eager]({picture})"] if (root / picture).is_file() else []
    return [*markdown(headings, rows), *faults, "", notes, "", conditions(result), *image]


def losses(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of "where we lose", beyond the spread: cases in which a plan of ours is slower than PyTorch eager, or what a
    call gets, forward and backward together, is slower than PyTorch compiled."""
    rows = []
    for (name, direction), group in groups(records).items():
        eager = group.get("eager")
        if eager is None or eager["median_us"] is None:
            continue
        slower = {
            variant: record["speed_up_over_eager"]
            for variant, record in group.items()
            if variant not in ("eager", "compile") and record["median_us"] is not None and _is_slower(record, eager)
        }
        dispatch, compiled = group.get("dispatch"), group.get("compile")
        ratio = slower.pop("dispatch", None)
        known = all(record is not None and record["median_us"] is not None for record in (dispatch, compiled))
        to_compiled = dispatch["speed_up_over_compile"] if known and _is_slower(dispatch, compiled) else None
        # A plan is a forward and its backward: single directions are listed only where a call as users make it loses.
        if ratio is None and (direction != "fwd_bwd" or not (slower or to_compiled)):
            continue
        plans = ", ".join(f"{variant} {value:.2f}" for variant, value in slower.items()) or "–"
        answer = "–" if dispatch is None else str(dispatch["plan"])
        ratios = ["within the spread" if value is None else f"{value:.2f}" for value in (ratio, to_compiled)]
        rows.append([name, _DIRECTIONS[direction], plans, answer, *(ratios if known else [ratios[0], "–"])])
    return rows


def _is_slower(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Slower by more than the spread."""
    return record["median_us"] > other["median_us"] and record["p20_us"] > other["p80_us"]


def losses_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of "where we lose", from ``ops.json``."""
    from benchmarks.report import markdown

    rows = losses(result["records"])
    machine = result["environment"]["machine"]
    if not rows:
        return [f"{machine}: no plan is slower than PyTorch eager or compiled by more than the spread."]
    headings = ["op", "direction", "plans slower than eager (×)", "dispatch takes", "dispatch × eager"]
    headings += ["dispatch × compile"]
    note = (
        f"{machine}. × below 1: slower than PyTorch, by more than the spread (p20 above its p80). Cases within the "
        "spread are not listed."
    )
    return [*markdown(headings, rows), "", note]


def gpu_note(results: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of results, if there are any, among which there is none from a GPU."""
    return NO_GPU if results and not any(map(is_gpu, results)) else None


def is_gpu(result: Mapping[str, Any]) -> bool:
    """Whether a result file was measured on a GPU."""
    return result["environment"]["device"] != "cpu"


def picture_path(result: Mapping[str, Any]) -> str:
    """Where the bars of a machine lie, relative to the repository."""
    return f"docs/images/ops-{re.sub(r'[^a-z0-9-]', '-', result['environment']['machine'])}.png"


#: Behind a bar's number, which would else be crossed by the line at 1.
_BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}


def draw_all(results: Path, root: Path) -> list[str]:
    """Draw the bars of every machine's ``ops.json``; returns lines about what was not drawn."""
    notes = []
    for path in sorted(results.glob("*/ops.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not draw(result, root / picture_path(result)):
            notes.append(f"{picture_path(result)} was not drawn: matplotlib is not installed.")
    return notes


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """Bars of the speed-up over eager, forward and backward together; False where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {name: group for (name, direction), group in groups(result["records"]).items() if direction == "fwd_bwd"}
    variants = [v for v in ("compile", "two_gemm", "dispatch", "best plan")]
    colours = {"compile": "#9e9e9e", "two_gemm": "#c8a24a", "dispatch": "#2a6fbb", "best plan": "#7fb2e5"}
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.62 * len(shown)))
    height = 0.8 / len(variants)
    for row, group in enumerate(shown.values()):
        for place, variant in enumerate(variants):
            record = best_plan(group) if variant == "best plan" else group.get(variant)
            ratio = None if record is None else record["speed_up_over_eager"]
            if ratio is None:
                continue
            label = variant if row == 0 or variant not in axes.get_legend_handles_labels()[1] else None
            where = row + (place - (len(variants) - 1) / 2) * height
            axes.barh(where, ratio, height, color=colours[variant], label=label)
            name = f" {ratio:.2f}" + (f" {record['variant']}" if variant == "best plan" else "")
            axes.text(ratio, where, name, va="center", fontsize=6, zorder=3, bbox=_BEHIND)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), list(shown), fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("speed-up over PyTorch eager, forward + backward (right of 1: faster)")
    where = result["environment"]
    axes.set_title(f"{where['machine']}, PyTorch {where['torch']}, {where['date']}", fontsize=9)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True

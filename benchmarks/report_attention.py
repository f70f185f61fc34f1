"""The part of ``python -m benchmarks report`` on attention, from ``attention.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def groups(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """The records of each shape, dtype and backend, by direction."""
    found: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for record in records:
        key = record["model"], tuple(record["shape"]), record["dtype"], record["variant"]
        found.setdefault(key, {})[record["direction"]] = record
    return list(found.values())


def attention_rows(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a row for each shape, dtype and backend that was timed."""
    headings = ["first preset", "B × L × H × d", "dtype", "backend", "fwd ms", "bwd ms", "fwd + bwd ms", "p20 – p80"]
    headings += ["TFLOP/s", "GB/s", "of the floor", "/ sdpa", "/ authors fp32", "peak MiB", "error"]
    return headings, [_row(group) for group in groups(records) if _timed(group)]


def _timed(group: Mapping[str, Mapping[str, Any]]) -> bool:
    return group["fwd_bwd"]["median_us"] is not None


def _row(group: Mapping[str, Mapping[str, Any]]) -> list[str]:
    both = group["fwd_bwd"]

    def ratio(name: str) -> str:
        value = both[f"time_over_{name}"]
        return "–" if value is None else f"{value:.2f}"

    return [
        both["model"],
        " × ".join(map(str, both["shape"])),
        _DTYPES[both["dtype"]],
        both["variant"],
        *(_milliseconds(group[direction]["median_us"]) for direction in ("fwd", "bwd", "fwd_bwd")),
        f"{_milliseconds(both['p20_us'])} – {_milliseconds(both['p80_us'])}",
        f"{both['tflop_s']:.3g}",
        f"{both['gb_s']:.3g}",
        f"{both['fraction_of_floor']:.0%}",
        ratio("sdpa"),
        ratio("authors_fp32"),
        f"{both['peak_mib']:.4g}",
        f"{both['rel_error']:.1e}",
    ]


def _milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1e3:.4g}"


def attention_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of ``attention.json``."""
    from benchmarks.report import STALE, conditions, is_stale, markdown

    records = result["records"]
    headings, rows = attention_rows(records)
    timed = [group for group in groups(records) if _timed(group)]
    for row, group in zip(rows, timed, strict=True):
        row[3] += STALE * any(is_stale(record, root) for record in group.values())
    rounds = [record.get("rounds", result["settings"]["rounds"]) for record in records]
    spread = str(max(rounds)) if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    note = (
        f"{spread} interleaved rounds; all but the first times are of forward and backward "
        "together. math: explicit products and softmax; authors_fp32: q, k and v raised to float32, as in the released "
        "code; cpu_op: ours, for bf16 on a CPU. Floor: the bytes that must move at the copy bandwidth, or the six "
        "products at that of a large matrix product of the dtype, whichever takes longer; the softmax is not in it. "
        "/: time over another backend's (below 1: faster), the median of the rounds' own. Error: the largest of output "
        "and gradient against float64, relative; at most four times that of math."
    )
    others: dict[str, list[str]] = {}
    for record in records:
        if record["note"]:
            shape = " × ".join(map(str, record["shape"]))
            others.setdefault(f"{record['variant']}: {record['note']}", []).append(f"{shape} {record['dtype']}")
    count = len({(tuple(record["shape"]), record["dtype"]) for record in records})
    left = [
        what + ("" if len(set(where)) == count else f" ({', '.join(dict.fromkeys(where))})")
        for what, where in others.items()
    ]
    untimed = ["", f"Not timed: {'; '.join(left)}."] if left else []
    return [*markdown(headings, rows), *untimed, "", note, "", conditions(result)]

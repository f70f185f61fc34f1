"""The README's table of the bytes that the kernels move, from ``results/interpreter/traffic.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _row(records: list[Mapping[str, Any]], stale: str) -> list[str]:
    def span(values: list[float]) -> str:
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        return low if low == high else f"{low} – {high}"

    compiled = [record.get("compiled_bytes") for record in records]
    first = records[0]
    return [
        first["op"] + stale,
        first["plan"],
        first["direction"],
        span([record["growth"] for record in records]),
        span([record["moved_bytes"] / record["floor_bytes"] for record in records]),
        span([record["asked_bytes"] / record["floor_bytes"] for record in records]),
        "–" if None in compiled else span([record["compiled_bytes"] / record["floor_bytes"] for record in records]),
    ]


def traffic_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of ``traffic.json``: a row for each op, plan and direction, over its layouts."""
    from benchmarks.report import STALE, is_stale, markdown

    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in result["records"]:
        groups.setdefault((record["op"], record["plan"], record["direction"]), []).append(record)
    rows = [_row(own, STALE * any(is_stale(dict(record), root) for record in own)) for own in groups.values()]
    headings = ("op", "plan", "direction", "growth / the floor's", "moved / floor", "asked / floor", "compiled / floor")
    where = result["environment"]
    note = (
        "Bytes loaded and stored by our kernels in Triton's interpreter, bf16, at small shapes. Floor: every feature "
        "read and written once in each pass that must be. Moved: each address once a launch; asked: as often as the "
        "kernel asked, which the caches answer (tiles of a matrix product). Growth: of the moved bytes with tokens, "
        "pixels or batch, in units of the floor's growth: 1.00 is no pass over memory too many; below 1, a launch "
        "reads twice what the caches hold. Compiled: moved, times how often the compiled code of the kernels moves a "
        "tile on the worst target (docs/benchmarks.md). Parameters and statistics make the difference between growth "
        f"and moved at these sizes. Triton {where['triton']}; {where['date']}."
    )
    return [*markdown(headings, rows), "", note]

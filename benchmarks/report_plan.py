"""The part of ``python -m benchmarks report`` on the planner, from ``plan.json``: a table of docs/planning.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plan_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of ``plan.json``; times where they were measured, which is on GPUs."""
    from benchmarks.report import STALE, is_stale, markdown

    def times(record: Mapping[str, Any]) -> list[str]:
        return [f"{record[key] / 1e3:.1f}" if key in record else "–" for key in ("predicted_us", "median_us")]

    records = result["records"]
    timed = any("median_us" in record for record in records)
    rows = [
        [
            f"`{record['model']}`, batch {record['shape'][0]}" + STALE * is_stale(record, root),
            record["variant"],
            record["dtype"],
            f"{record['predicted_mib']:.1f}",
            f"{record['peak_mib']:.1f}",
            f"{record['ratio']:.3f}",
            *(times(record) if timed else []),
        ]
        for record in records
    ]
    headings = ["network", "recomputed", "dtype", "predicted MiB", "measured", "predicted / measured"]
    where = result["environment"]
    device = where["cpu_model"] if where["device"] == "cpu" else where["device"]
    note = f"{device}; PyTorch {where['torch']}, Python {where['python']}; {where['date']}."
    return [*markdown([*headings, *(["predicted ms", "measured"] if timed else [])], rows), "", note]

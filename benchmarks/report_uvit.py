"""The U-ViT part of ``python -m benchmarks report``: training steps and the LS tax, from ``uvit.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Recipes that the others are set in relation to.
REFERENCES = ("none_cat", "none_fused", "ls_cat", "authors")


def uvit_rows(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table of records."""
    headings = ["model", "recipe", "stream", "ms", "p20 – p80", "images/s", "MFU", "peak MiB"]
    headings += ["time / none_cat", "/ none_fused", "/ ls_cat", "/ authors", "loss error"]
    rows = []
    for record in records:
        ratios = [record[f"time_over_{name}"] for name in REFERENCES]
        rows.append(
            [
                record["model"],
                record["variant"] + (" (compiled)" if record["compiled"] else ""),
                record["residual_dtype"],
                f"{record['median_us'] / 1e3:.4g}",
                f"{record['p20_us'] / 1e3:.4g} – {record['p80_us'] / 1e3:.4g}",
                f"{record['images_per_second']:.4g}",
                f"{record['mfu']:.1%}",
                "–" if record["peak_mib"] is None else f"{record['peak_mib']:.0f}",
                *("–" if ratio is None else f"{ratio:.3f}" for ratio in ratios),
                f"{record['rel_error']:.1e}",
            ]
        )
    return headings, rows


def uvit_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of ``uvit.json``."""
    from benchmarks.report import STALE, conditions, is_stale, markdown

    records = result["records"]
    headings, rows = uvit_rows(records)
    for row, record in zip(rows, records, strict=True):
        row[1] += STALE * is_stale(record, root)
    settings = result["settings"]
    batches = ", ".join(str(size) for size in dict.fromkeys(record["shape"][0] for record in records))
    notes = [
        f"{settings['rounds']} interleaved rounds of {settings['steps_per_round']} steps, batch {batches}. A ratio is "
        "the recipe's time over another's (below 1: faster), the median of the rounds' own. none_cat, ls_cat: "
        "torch.cat before the skip's Linear; none_fused, ls_fused: our ops. Loss error: relative, of the first loss "
        "against the unfused model in fp32."
    ]
    for model, group in _by_model(records).items():
        ls = group.get("ls_fused")
        if ls is not None and ls["time_over_none_cat"] is not None and ls["time_over_none_fused"] is not None:
            notes.append(
                f"{model}: LS, fused, takes {ls['time_over_none_cat']:.3f} of the time without scaling and with "
                f"torch.cat, and {ls['time_over_none_fused']:.3f} of fused no scaling."
            )
    return [*markdown(headings, rows), "", " ".join(notes), "", conditions(result)]


def _by_model(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record["model"], {})[record["variant"]] = record
    return found

"""The part of ``python -m benchmarks report`` on sampling, from ``inference.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Fields of a record that set its time against another's; None where that was not measured.
RATIOS = ("time_over_eager", "time_over_no_scaling")


def inference_rows(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table of records."""
    headings = ["model", "recipe", "sampler", "batch", "ms", "p20 – p80", "images/s", "time / eager", "/ no scaling"]
    headings += ["peak MiB", "noise error"]
    rows = [
        [
            record["model"],
            record["variant"],
            f"{record['sampler']}, {record['steps']} steps",
            str(record["shape"][0]),
            f"{record['median_us'] / 1e3:.4g}",
            f"{record['p20_us'] / 1e3:.4g} – {record['p80_us'] / 1e3:.4g}",
            f"{record['images_per_second']:.4g}",
            *("–" if record[over] is None else f"{record[over]:.3f}" for over in RATIOS),
            f"{record['peak_mib']:.4g}",
            f"{record['rel_error']:.1e}",
        ]
        for record in records
    ]
    return headings, rows


def inference_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of ``inference.json``."""
    from benchmarks.report import STALE, conditions, is_stale, markdown

    records = result["records"]
    headings, rows = inference_rows(records)
    for row, record in zip(rows, records, strict=True):
        row[1] += STALE * is_stale(record, root)
    rounds = [record["rounds"] for record in records]
    spread = str(max(rounds)) if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    note = (
        f"{spread} interleaved rounds, a visit is a whole sampling; at batch 1 the time is the "
        "latency. A ratio is the median of the rounds' own (below 1: faster). Eager: the plain model with the same "
        "scaling; no scaling: the same recipe without. Peak: what one call of the network "
        "holds above the weights. Noise error: of one prediction, relative, against the plain "
        "model in fp32 from equal weights."
    )
    return [*markdown(headings, rows), "", note, "", conditions(result)]

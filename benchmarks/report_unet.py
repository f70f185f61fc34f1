"""The UNets' part of ``python -m benchmarks report``: all decoder concats of a model, and its training steps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoder_model import BANDWIDTH, RECIPES, is_modelled, modelled_bytes
from benchmarks.op_cases import Case, decoder_cases
from benchmarks.report_ops import NO_GPU, is_gpu

_DIRECTIONS = {"fwd_bwd": "fwd + bwd", "fwd": "fwd", "bwd": "bwd"}
_GPU, _CPU = torch.device("cuda"), torch.device("cpu")


def _all_decoders() -> dict[str, list[Counter[Case]]]:
    """The decoders that there are cases of, by label; a CPU's and a reduced GPU's differ in dtype alone."""
    found: dict[str, list[Counter[Case]]] = {}
    for groups in (decoder_cases(_GPU), decoder_cases(_GPU, reduced=True), decoder_cases(_CPU)):
        for label, cases in groups.items():
            found.setdefault(label, []).append(cases)
    return found


def decoder_sums(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The times of all concats of a decoder together, where all have been measured.

    Returns:
        For each model and direction: ``model``, ``direction``; µs of ``eager``, ``compile`` and ``dispatch`` (None
        where one is missing) and of the ``floor``; and the ``records`` that were added up.
    """
    by_key: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for record in records:
        key = record["op"], tuple(record["shape"]), record["dtype"], record["layout"], record["direction"]
        by_key.setdefault(key, {})[record["variant"]] = record
    found = []
    for label, alternatives in _all_decoders().items():
        for cases in alternatives:
            for direction in _DIRECTIONS:
                groups = [(by_key.get((*case.key, direction)), count) for case, count in cases.items()]
                if any(group is None for group, _ in groups):
                    continue
                row: dict[str, Any] = {"model": label, "direction": direction}
                for name in ("eager", "compile", "dispatch"):
                    times = [(group.get(name, {}).get("median_us"), count) for group, count in groups]
                    known = all(time is not None for time, _ in times)
                    row[name] = sum(time * count for time, count in times) if known else None
                row["floor"] = sum(next(iter(group.values()))["floor_us"] * count for group, count in groups)
                row["records"] = [record for group, _ in groups for record in group.values()]
                found.append(row)
    return found


def decoder_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of the decoders in ``ops.json``; nothing where none has been measured."""
    from benchmarks.report import STALE, conditions, is_stale, markdown

    def milliseconds(value: float | None) -> str:
        return "–" if value is None else f"{value / 1e3:.4g}"

    def ratio(numerator: float | None, denominator: float | None, form: str) -> str:
        return "–" if numerator is None or denominator is None else format(numerator / denominator, form)

    rows = [
        [
            row["model"] + STALE * any(is_stale(record, root) for record in row["records"]),
            _DIRECTIONS[row["direction"]],
            *(milliseconds(row[name]) for name in ("eager", "compile", "dispatch")),
            ratio(row["eager"], row["dispatch"], ".2f"),
            ratio(row["compile"], row["dispatch"], ".2f"),
            ratio(row["floor"], row["dispatch"], ".0%"),
        ]
        for row in decoder_sums(result["records"])
    ]
    if not rows:
        return []
    headings = ["decoder concat + norm, all skips", "direction", "eager ms", "compile ms", "dispatch ms"]
    headings += ["× eager", "× compile", "of the floor"]
    note = (
        "Measured: sums over all long skips of the model. Eager on contiguous features, compiled and dispatch on "
        "channels_last; the raw concat is written too, and the skip's statistics are there, as in the networks."
    )
    return [*markdown(headings, rows), "", note, "", conditions(result)]


def decoder_model_note(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the modelled times, which no machine had a part in."""
    from benchmarks.report import markdown

    rows = []
    for label, cases in decoder_cases(_GPU).items():
        assert is_modelled(label)
        for direction, name in _DIRECTIONS.items():
            moved = {
                recipe: sum(modelled_bytes(case, recipe, direction) * count for case, count in cases.items())
                for recipe in RECIPES
            }
            rows.append(
                [
                    label,
                    name,
                    *(f"{moved[recipe] / BANDWIDTH * 1e3:.2f}" for recipe in RECIPES),
                    f"{moved['eager'] / moved['fused']:.1f}",
                    f"{moved['compile'] / moved['fused']:.1f}",
                ]
            )
    headings = ["decoder concat + norm, all skips", "direction", "eager ms", "compile ms", "fused ms"]
    headings += ["eager / fused", "compile / fused"]
    note = (
        f"**Model, not measured**: the bytes that LS's pooling, product, concat, GroupNorm and SiLU move in bf16, over "
        f"{BANDWIDTH / 1e12:g} TB/s, the copy bandwidth of an H200; compiled at its best, convolutions excluded."
    )
    gpu = any(map(is_gpu, results)) and any(
        is_modelled(row["model"]) for result in results if is_gpu(result) for row in decoder_sums(result["records"])
    )
    return "\n".join([*markdown(headings, rows), "", note, *([] if gpu else ["", NO_GPU])])


def unet_rows(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table of records of training steps."""
    headings = ["model", "recipe", "ms", "p20 – p80", "images/s", "MFU", "peak MiB (/ eager)", "× eager", "× compile"]
    headings += ["time / no scaling", "/ compile_none", "loss error"]

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    peaks = {(record["model"], record["variant"]): record["peak_mib"] for record in records}
    rows = []
    for record in records:
        peak, eager = record["peak_mib"], peaks.get((record["model"], f"eager_{record['scaling']}"))
        relative = "" if peak is None or eager is None else f" ({peak / eager:.2f})"
        rows.append(
            [
                record["model"],
                record["variant"] + (" (compiled)" if record["compiled"] else ""),
                f"{record['median_us'] / 1e3:.4g}",
                f"{record['p20_us'] / 1e3:.4g} – {record['p80_us'] / 1e3:.4g}",
                f"{record['images_per_second']:.4g}",
                f"{record['mfu']:.1%}",
                number(peak, ".0f") + relative,
                *(
                    number(None if record[f"time_over_{name}"] is None else 1 / record[f"time_over_{name}"], ".2f")
                    for name in ("eager", "compile")
                ),
                number(record["time_over_no_scaling"], ".3f"),
                number(record["time_over_compile_none"], ".3f"),
                f"{record['rel_error']:.1e}",
            ]
        )
    return headings, rows


def unet_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of ``unet.json``."""
    from benchmarks.report import STALE, conditions, is_stale, markdown

    records = result["records"]
    headings, rows = unet_rows(records)
    for row, record in zip(rows, records, strict=True):
        row[1] += STALE * is_stale(record, root)
    settings = result["settings"]
    batches = ", ".join(
        f"{size} ({model})" for model, size in {record["model"]: record["shape"][0] for record in records}.items()
    )
    note = (
        f"{settings['rounds']} interleaved rounds of {settings['steps_per_round']} steps, batch {batches}. A ratio is "
        "the median of the rounds' own. eager: the plain model, contiguous; compile: the same in channels_last, under "
        "torch.compile where the row says so; ours: fused, channels_last. × eager, × compile: how many times faster "
        "than these with the same scaling. No scaling: the same recipe without. Dropout 0 everywhere. Loss error: "
        "relative, of the first loss against the plain model in fp32."
    )
    return [*markdown(headings, rows), "", note, "", conditions(result)]

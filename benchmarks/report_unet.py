"""The UNets' part of ``python -m benchmarks report``: all decoder concats of a model together, from ``ops.json``."""

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

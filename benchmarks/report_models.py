"""The models' part of ``python -m benchmarks report``: training steps, from ``uvit.json`` and ``unet.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: What the files of both models say, by kind of recipe; a recipe's name is its kind and its scaling.
KINDS = (
    "authors: their released recipe re-created (they released no UNet: there, the plain network in their training "
    "step); eager: plain PyTorch; channels_last: plain PyTorch, a UNet in that layout; compile: plain PyTorch under "
    "torch.compile, a UNet in channels_last; ours: our ops, eager; ours_compile: our ops, compiled"
)
#: What steps of ours are held against, of the same scaling.
COMPARED = ("authors", "eager", "compile")


def references(name: str) -> dict[str, str]:
    """The recipes that a recipe's time is set in relation to, by the name of the field ``time_over_…``."""
    kind, _, scaling = name.rpartition("_")
    same = {other: f"{other}_{scaling}" for other in COMPARED}
    return {**same, "no_scaling": f"{kind}_none", "compile_none": "compile_none"}


def model_rows(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: one row for each model and recipe, with a column for each direction that was timed.

    What is no time is that of the training step, or of the longest direction that there is.
    """
    headings = ["model", "recipe", "fwd ms", "fwd + bwd ms", "step ms", "p20 – p80", "images/s", "MFU", "peak MiB"]
    headings += ["host ms", "× authors", "× eager", "× compile", "time / no scaling", "/ compile_none", "error"]
    return headings, [_row(group) for group in by_recipe(records)]


def by_recipe(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """The records of each model and recipe, by direction."""
    found: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(_key(record), {})[record["direction"]] = record
    return list(found.values())


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["model"], tuple(record["shape"]), record["variant"]


def longest(group: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of the records of a recipe by direction, that of the training step, or what comes nearest."""
    return next(group[direction] for direction in ("step", "fwd_bwd", "fwd") if direction in group)


def losses(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each step of ours that is slower than the authors', plain PyTorch's or the compiled one's, beyond the spread."""
    groups = {_key(record): record for record in map(longest, by_recipe(records))}
    found = []
    for (model, shape, name), record in groups.items():
        slower = []
        for field in COMPARED:
            other, ratio = groups.get((model, shape, references(name)[field])), record.get(f"time_over_{field}")
            if other is not None and ratio is not None and ratio > 1 and record["p20_us"] > other["p80_us"]:
                slower.append(f"{1 / ratio:.2f} × {other['variant']}")
        if slower and name.startswith("ours"):
            found.append(f"{model}, batch {shape[0]}, {name}: {', '.join(slower)}")
    return found


def not_compared(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What steps of ours have not been timed beside, for each model and batch."""
    missing: dict[tuple[Any, ...], list[str]] = {}
    for record in map(longest, by_recipe(records)):
        model, shape, name = _key(record)
        others = missing.setdefault((model, shape), [])
        if name.startswith("ours"):
            unknown = [field for field in COMPARED if record.get(f"time_over_{field}") is None]
            others += [other for field in unknown if (other := references(name)[field]) not in others]
    timed = {_key(record)[:2] for record in records if record["variant"].startswith("ours")}
    lines = []
    for (model, shape), others in missing.items():
        if (model, shape) not in timed:
            lines.append(f"{model}, batch {shape[0]}: no step of ours was timed")
        elif others:
            lines.append(f"{model}, batch {shape[0]}: {', '.join(others)}")
    return lines


def _row(group: Mapping[str, Mapping[str, Any]]) -> list[str]:
    record = longest(group)

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def milliseconds(value: float | None) -> str:
        return number(None if value is None else value / 1e3, ".4g")

    ratios = {name: record.get(f"time_over_{name}") for name in references("_")}
    return [
        record["model"],
        record["variant"] + (" (compiled)" if record["compiled"] else ""),
        *(milliseconds(group.get(direction, {}).get("median_us")) for direction in ("fwd", "fwd_bwd", "step")),
        f"{milliseconds(record['p20_us'])} – {milliseconds(record['p80_us'])}",
        f"{record['images_per_second']:.4g}",
        f"{record['mfu']:.1%}",
        number(record["peak_mib"], ".0f"),
        milliseconds(record.get("host_us")),
        *(number(ratios[name] and 1 / ratios[name], ".2f") for name in ("authors", "eager", "compile")),
        *(number(ratios[name], ".3f") for name in ("no_scaling", "compile_none")),
        f"{record['rel_error']:.1e}",
    ]


def models_table(result: Mapping[str, Any], root: Path) -> list[str]:
    """Markdown of ``uvit.json`` or ``unet.json``."""
    from benchmarks.report import STALE, conditions, is_stale, markdown

    records = result["records"]
    headings, rows = model_rows(records)
    for row, group in zip(rows, by_recipe(records), strict=True):
        row[1] += STALE * any(is_stale(record, root) for record in group.values())
    settings = result["settings"]
    batches = {record["model"]: record["shape"][0] for record in records}

    def spread(setting: str) -> str:
        values = [record.get(setting, settings[setting]) for record in records]  # a record's own goes first
        return str(max(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"

    note = (
        f"{spread('rounds')} interleaved rounds of {spread('steps_per_round')} steps, batch "
        f"{', '.join(f'{size} ({model})' for model, size in batches.items())}. {KINDS}. A ratio is the median of the "
        "rounds' own; × authors, × eager, × compile: how many times faster the step is than theirs with the same "
        "scaling; time / no scaling: over the same recipe without, the price of CS and LS. MFU: FLOP of forward and "
        "backward over the step's time, as a share of the matrix product measured in the same run. Peak: what a step "
        "holds above weights, AdamW's moments and averages. Host: until a step is queued. Error: relative, of all "
        "gradients (forward alone: of the prediction) against the plain model in fp32."
    )
    slow, apart = losses(records), not_compared(records)
    # The choice itself: UViT._use_fused and UNet._use_fused.
    verdict = (
        f"**Where we lose** (how many times faster, beyond the spread): {'; '.join(slow)}. A model that is left the "
        "choice (`fused=None`) takes our ops on a GPU and plain PyTorch on a CPU, a UNet in channels_last."
        if slow
        else f"**Where we lose**: {'nowhere' if not apart else 'nowhere that was compared'}, beyond the spread."
    )
    if apart:
        verdict += f" Not compared with: {'; '.join(apart)}."
    return [*markdown(headings, rows), "", note, "", verdict, "", conditions(result)]

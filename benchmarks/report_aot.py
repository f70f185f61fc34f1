"""The README's tables of the compiled kernels, from ``results/aot/*.json``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compiled_traffic import EXPLAINED
from benchmarks.gpu_code import TARGETS

#: What stands for a kernel: the first of these dtypes that it is compiled for.
_DTYPES = ("bfloat16", "float16", "float32")


def read_targets(folder: Path) -> dict[str, dict[str, Any]]:
    """Result files by target, in the targets' order."""
    paths = {target: folder / f"{target}.json" for target in TARGETS}
    return {target: json.loads(path.read_text(encoding="utf-8")) for target, path in paths.items() if path.is_file()}


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return "–"
    if "error" in record:
        return "does not compile"
    figures = [
        str(record["registers"]),
        f"{record['shared_bytes'] / 1024:.3g}",
        str(record["ctas_per_sm"]),
        *record["matrix_instructions"],
    ]
    spills = record["spill_stores"] + record["spill_loads"]
    return " · ".join(figures + [f"**{spills} spills**"] * bool(spills))


def _representative(records: Sequence[dict[str, Any]], kernel: str) -> dict[str, Any] | None:
    """Of the first dtype, the record that takes most registers; one with an error before all."""
    for dtype in _DTYPES:
        own = [record for record in records if record["kernel"] == kernel and record["dtype"] == dtype]
        if own:
            return max(own, key=lambda record: ("error" in record, record.get("registers", 0)))
    return None


def aot_table(by_target: dict[str, dict[str, Any]], root: Path) -> list[str]:
    """Markdown of all targets: a row for each kernel, a column for each target."""
    from benchmarks.report import STALE, is_stale, markdown

    records = {target: result["records"] for target, result in by_target.items()}
    everything = [record for own in records.values() for record in own]
    stale = {record["kernel"] for record in everything if is_stale(record, root)}
    rows = [
        [kernel + STALE * (kernel in stale), *(_cell(_representative(own, kernel)) for own in records.values())]
        for kernel in dict.fromkeys(record["kernel"] for record in everything)
    ]
    bad = sum(bool(record["faults"]) for record in everything)
    verdict = (
        f"**{bad} of them spill or lack an instruction that they must have**"
        if bad
        else "none spills, and none lacks the matrix instructions or 16-byte accesses that it must have"
    )
    versions = sorted({f"Triton {result['environment']['triton']}" for result in by_target.values()})
    dates = sorted({result["environment"]["date"] for result in by_target.values()})
    note = (
        "Registers of a thread · KiB of shared memory · blocks that fit into a multiprocessor · matrix instructions, "
        "of the bf16 kernel that takes most registers (fp32 where there is no bf16 one). Compiled ahead of time, "
        f"without a GPU: {len(everything)} combinations of kernel, target, dtype, constants and launch configuration; "
        f"{verdict}. {', '.join(versions)}; {' to '.join(sorted({dates[0], dates[-1]}))}."
    )
    return [*markdown(["kernel", *records], rows), "", note]


#: Columns of :func:`factors_table`.
_FACTORS = {
    "tile_loads": "tiles loaded",
    "tile_stores": "tiles stored",
    "vector_loads": "vectors loaded",
    "vector_stores": "vectors stored",
    "ahead": "tiles ahead of the loop",
}


def factors_table(by_target: dict[str, dict[str, Any]], root: Path) -> list[str]:
    """Markdown of all targets: for each kernel how much more its compiled code moves than its source says."""
    from benchmarks.report import STALE, is_stale, markdown

    everything = [record for result in by_target.values() for record in result["records"] if "factors" in record]
    if not everything:
        return []
    stale = {record["kernel"] for record in everything if is_stale(record, root)}

    def worst(kernel: str, what: str) -> str:
        own = [record["factors"][what] for record in everything if record["kernel"] == kernel]
        own = [value for value in own if value is not None]
        return f"{max(own):g}" if own else "–"

    rows = [
        [kernel + STALE * (kernel in stale), *(worst(kernel, what) for what in _FACTORS)]
        for kernel in dict.fromkeys(record["kernel"] for record in everything)
    ]
    seen = {(record["kernel"], record["target"]) for record in everything}
    why = "; ".join(
        f"{kernel} on {target}: {reason}"
        for (kernel, target), (_, reason) in EXPLAINED.items()
        if (kernel, target) in seen
    )
    note = (
        "Bytes that compiled loads and stores move in a trip of their loop, over those of the tensor that the source "
        "moves there: the largest of all combinations of target, dtype, constants and launch configuration. Masks are "
        "ignored. 1: each element once. Vectors are what a row, a channel or a sample has one number of: several "
        "threads hold the same one, and ask the cache for it. Ahead: tiles that a pipeline loads before its loop "
        "begins, which the loop leaves out at its end."
    )
    return [*markdown(["kernel", *_FACTORS.values()], rows), "", note + (f" Above 1: {why}." if why else "")]

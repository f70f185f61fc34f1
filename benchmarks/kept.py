"""What a run keeps of the result file of earlier ones, and what of it is replaced."""

import functools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.screen import Screen


def kept_records(path: Path, where: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of earlier runs on the same machine and versions.

    A setting of theirs that is another now is written into each record: what a record says itself goes before the
    ``settings`` of the file.

    Args:
        path: of the file.
        where: :func:`benchmarks.environment.describe` of this run.
        settings: of this run.
    """
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if undated(old["environment"]) != undated(where):
            return []
        changed = {key: value for key, value in old["settings"].items() if settings.get(key) != value}
        return [{**changed, **record} for record in old["records"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # missing or of another shape: it is written anew


def undated(where: Mapping[str, Any]) -> dict[str, Any]:
    """Machine and versions without the day."""
    return {key: value for key, value in where.items() if key != "date"}


def merge(
    old: Sequence[dict[str, Any]],
    new: Sequence[dict[str, Any]],
    key: Callable[[Mapping[str, Any]], Hashable],
    screen: Screen,
) -> list[dict[str, Any]]:
    """The old records, with the new ones in the place of those that were measured again.

    What is compared was timed together, so that records of one ``key`` are replaced all or none: none where an old
    variant of the present code is not among the new ones, as after a run of some recipes, or one cut short. That is
    printed, and the old records stay.

    Args:
        old, new: with ``variant``, ``sources`` and ``source_sha256``.
        key: what records that were timed together share.
        screen: where it is said what was not replaced.
    """
    present = functools.cache(lambda *sources: environment.source_hash(sources))
    groups: dict[Hashable, list[dict[str, Any]]] = {}
    for record in new:
        groups.setdefault(key(record), []).append(record)
    records = list(old)
    for group, own in groups.items():
        earlier = [record for record in records if key(record) == group]
        held = {r["variant"] for r in earlier if present(*r["sources"]) == r["source_sha256"]}
        lacking = sorted(held - {record["variant"] for record in own})
        if lacking:
            named = ", ".join(map(str, group)) if isinstance(group, tuple) else str(group)
            screen.print(
                f"Not written: {named}: the file has {', '.join(lacking)} too, timed together, which this run has not. "
                "Measure these as well, or give --out for a file of this run's own.",
                style="yellow",
            )
            continue
        records = [record for record in records if key(record) != group] + own
    return records

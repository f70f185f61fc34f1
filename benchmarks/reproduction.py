"""``python -m benchmarks reproduction``: what docs/reproduction.md shows, from the findings in docs/findings."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.findings import FINDINGS, PICTURES, STUDIES, Kept, read_kept, take
from benchmarks.report import STALE
from benchmarks.reproduction_items import ITEMS, Item
from benchmarks.reproduction_tables import TABLES
from scalelong_fast.errors import UserError, unknown_name

PAGE = ROOT / "docs" / "reproduction.md"
NOT_RUN = "not run yet"

#: The marker of the table of everything.
OVERVIEW = "overview"

_OPEN = re.compile(r"<!-- benchmark:([\w-]+) -->")


def overview(kept: Mapping[str, Kept | None]) -> list[str]:
    """A row for every figure, table and theorem of the paper."""
    rows = [f"| {item.label} | {item.subject} | {_measured_by(item, kept)} | {_result(item, kept)} |" for item in ITEMS]
    return ["| in the paper | what it says | measured by | result |", "|---|---|---|---|", *rows]


def _measured_by(item: Item, kept: Mapping[str, Kept | None]) -> str:
    if item.finding is None:
        return "–"
    found = kept.get(item.finding)
    return f"[`{item.finding}`](#{item.finding})" + (f", {found.scale}" if found else "")


def _result(item: Item, kept: Mapping[str, Kept | None]) -> str:
    if item.finding is None:
        return item.otherwise
    found = kept.get(item.finding)
    if found is None:
        return NOT_RUN
    return f"{item.judge(found.data) if item.judge else 'see there'}{STALE if found.stale else ''}"


def section(name: str, found: Kept | None) -> list[str]:
    """What one finding shows: command, settings, sentence, table, picture."""
    study = STUDIES[name]
    if found is None:
        return [f"{NOT_RUN}: `{study.command}`"]
    lines = [f"{found.sentence}{STALE if found.stale else ''}", ""]
    if name in TABLES:
        lines += [*TABLES[name](found.data), ""]
    scale = f"`--scale {found.scale}`" if found.scale != "own settings" else "with the settings it had then"
    return [
        *lines,
        f"![{name}](images/analysis/{name}.png)",
        "",
        f"`{study.command}`, {scale}: `{settings_text(found.settings)}`; version {found.version}. "
        f"[Numbers](findings/{name}.json).",
    ]


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as name=value, those of None left out."""
    words = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            words.append(settings_text(value))
        elif value is not None and value != []:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"{key}={text}")
    return " ".join(words)


def render(name: str, kept: Mapping[str, Kept | None]) -> str:
    """Markdown of one marker.

    Raises:
        UserError: an unknown marker, or a finding that lacks what its table needs.
    """
    if name != OVERVIEW and name not in STUDIES:
        raise unknown_name("marker", name, [OVERVIEW, *STUDIES])
    try:
        return "\n".join(overview(kept) if name == OVERVIEW else section(name, kept[name]))
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{name}: the findings do not hold what the page shows ({type(error).__name__}: {error}). Run the analysis "
            "again and take it: python -m benchmarks reproduction --take DIR."
        ) from error


def updated(text: str, findings: Path = FINDINGS, root: Path = ROOT) -> str:
    """``text`` of the page with what stands between each pair of markers made anew.

    Raises:
        UserError: a marker without its end or an unknown one, or a broken finding.
    """
    kept = {name: read_kept(name, findings, root) for name in STUDIES}
    pieces, position = [], 0
    while match := _OPEN.search(text, position):
        closing = f"<!-- /benchmark:{match[1]} -->"
        end = text.find(closing, match.end())
        following = _OPEN.search(text, match.end())
        if end < 0 or (following and following.start() < end):
            raise UserError(f"marker {match[0]} has no {closing} before the next marker. Put one in.")
        pieces += [text[position : match.end()], "\n", render(match[1], kept), "\n", closing]
        position = end + len(closing)
    return "".join(pieces) + text[position:]


def main(
    args: Sequence[str], *, page: Path = PAGE, findings: Path = FINDINGS, pictures: Path = PICTURES, root: Path = ROOT
) -> int:
    """Run the command; returns the exit code. The keywords point it at other files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks reproduction",
        description="Rewrite what docs/reproduction.md shows of docs/findings. Findings whose code has changed since "
        "they were measured are marked as stale.",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page would change")
    way.add_argument(
        "--take",
        type=Path,
        metavar="DIR",
        help="first take the findings that scalelong-fast analyze --out DIR wrote with --scale digits",
    )
    options = parser.parse_args(args)
    if options.take is not None:
        for line in take(options.take, findings, pictures, root):
            print(line)
    old = page.read_text(encoding="utf-8")
    new = updated(old, findings, root)
    if options.check:
        late = "out of date: run python -m benchmarks reproduction"
        print(f"{page.name} is {late if new != old else 'in sync.'}")
        return int(new != old)
    if new != old:
        page.write_text(new, encoding="utf-8")
    print(f"{page.name} {'rewritten' if new != old else 'was in sync already'}.")
    return 0

"""What an analysis found: numbers, a figure and a sentence, written together."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalelong_fast.data.optional import import_optional
from scalelong_fast.errors import UserError
from scalelong_fast.training.files import write_atomically, write_json
from scalelong_fast.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Finding:
    """The result of one analysis.

    Attributes:
        name: the analysis, and the stem of its files.
        reference: the paper's figure or theorem.
        sentence: what the numbers show, in one or two sentences.
        settings: what they depend on, JSON-ready.
        data: the numbers, JSON-ready; NaN and infinity become null.
        draw: draws them on an empty matplotlib figure.
        markdown: the numbers as a table, of an analysis that has one.
    """

    name: str
    reference: str
    sentence: str
    settings: dict[str, Any]
    data: dict[str, Any]
    draw: "Callable[[Figure], None]" = field(repr=False, compare=False)
    markdown: str = field(default="", repr=False)


def open_folder(out: Path) -> Path:
    """Create the folder that findings go to, before anything is computed.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--out: cannot write to {out} ({error.strerror}). Make it writable or choose another folder."
        ) from error
    return out


def write_finding(finding: Finding, out: Path, measured: float | None = None) -> list[Path]:
    """Write ``NAME.json``, ``NAME.png``, ``NAME.svg`` and, of one with a table, ``NAME.md`` into ``out``, each replaced
    atomically.

    Equal findings give equal bytes: figures carry no date and no random identifiers, and JSON no date but ``measured``.

    Args:
        finding: what to write.
        out: the folder.
        measured: when the code was read that computed the oldest of its numbers, in seconds since 1970 (see
            :class:`~scalelong_fast.analysis.units.Units`); JSON has it as UTC.

    Returns:
        The paths.

    Raises:
        UserError: the folder cannot be written to, or matplotlib is missing.
    """
    matplotlib, module = import_optional("matplotlib"), import_optional("matplotlib.figure")
    figure = module.Figure(figsize=(9, 4), dpi=120, layout="constrained")  # not pyplot: no backend, no global state
    finding.draw(figure)
    open_folder(out)
    paths = [out / f"{finding.name}.{ending}" for ending in ("json", "png", "svg")]
    content = {
        "analysis": finding.name,
        "reference": finding.reference,
        "sentence": finding.sentence,
        "settings": finding.settings,
        "version": __version__,
        "data": finding.data,
    }
    if measured is not None:
        content["measured"] = datetime.fromtimestamp(measured, timezone.utc).isoformat(timespec="seconds")
    try:
        write_json(paths[0], json_ready(content))
        write_atomically(paths[1], lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
        with matplotlib.rc_context({"svg.hashsalt": finding.name}):
            write_atomically(paths[2], lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
        if finding.markdown:
            paths.append(out / f"{finding.name}.md")
            write_atomically(paths[3], lambda file: file.write(finding.markdown.encode()))
    except OSError as error:
        raise UserError(
            f"--out: writing to {out} failed ({error}). Free some space or choose another folder."
        ) from error
    return paths


def json_ready(value: Any) -> Any:
    """``value`` with tuples as lists, paths as text and what JSON has no number for as None."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The comparison of an ablation's networks: numbers, a sentence, a Markdown table and a figure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scalelong_fast.analysis.ablation_tables import Row, Table
from scalelong_fast.analysis.paper import REPORTED
from scalelong_fast.analysis.statistics import Band, band

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is measured of each network, and what it is called.
MEASURES = {"loss": "loss", "distance": "Fréchet distance"}

#: What a difference is called; of both measures less is better. Where one of the two rows lost a seed, those that are
#: left show nothing: they are the ones that went well.
LOWER, HIGHER, LOST, NOT_SHOWN = VERDICTS = ("lower", "higher", "seeds lost", "not shown")


def compare(table: Table, outcomes: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a table with their bands.

    Args:
        table: what is compared.
        outcomes: by row and seed: ``loss`` and ``distance``, or ``diverged`` (the step), or ``failed`` (why).

    Returns:
        For each row: label, model and batch size; the paper's number (None: not known); ``outcomes``; for each measure
        its band over the seeds that have it (None: no seed has); ``against``, the label of the row it is compared with,
        and for each measure what the differences at equal seeds show (:data:`VERDICTS`), with their band where a seed
        has both.
    """
    measured = [m for m in MEASURES if any(m in outcome for row in table.rows for outcome in outcomes[row.label])]
    return [_compare_row(table, row, outcomes, measured) for row in table.rows]


def _compare_row(
    table: Table, row: Row, outcomes: Mapping[str, Sequence[dict[str, Any]]], measured: Sequence[str]
) -> dict[str, Any]:
    own = outcomes[row.label]
    reported = REPORTED.get((table.reference, row.label))
    found: dict[str, Any] = {
        "series": row.series,
        "point": row.point,
        "label": row.label,
        "model": row.model,
        "batch_size": row.batch_size,
        "paper": None if reported is None else vars(reported),
        "outcomes": list(own),
        "against": row.against,
        "differences": {},
    }
    for measure in MEASURES:
        values = [outcome[measure] for outcome in own if measure in outcome]
        found[measure] = band(values).as_dict() if values else None
        if row.against in outcomes and measure in measured:
            pairs = zip(own, outcomes[row.against], strict=True)
            changes = [a[measure] - b[measure] for a, b in pairs if measure in a and measure in b]
            difference = band(changes) if changes else None
            found["differences"][measure] = {
                **({} if difference is None else difference.as_dict()),
                "verdict": LOST if difference is None or difference.count < len(own) else _verdict(difference),
            }
    return found


def _verdict(difference: Band) -> str:
    if difference.count > 1 and difference.high < 0:
        return LOWER
    return HIGHER if difference.count > 1 and difference.low > 0 else NOT_SHOWN


def describe(table: Table, rows: Sequence[dict[str, Any]], recipe: str) -> str:
    """What a table shows, in a sentence or two."""
    parts = []
    for measure, name in MEASURES.items():
        whole = [row for row in rows if row[measure] is not None and row[measure]["count"] == len(row["outcomes"])]
        if whole:
            best = min(whole, key=lambda row: row[measure]["mean"])
            among = f" of the {len(whole)} rows that lost no seed" if len(whole) < len(rows) else ""
            parts.append(f"{name} lowest with {best['label']} ({best[measure]['mean']:.4g}){among}")
    head = f"{table.title}, {recipe}: {'; '.join(parts) or 'no row came through with every seed'} ({table.reference})."
    compared = [_describe_measure(rows, measure, name) for measure, name in MEASURES.items()]
    return " ".join([head, *filter(None, compared), *_describe_losses(rows)])


def _describe_measure(rows: Sequence[dict[str, Any]], measure: str, name: str) -> str:
    """Which rows differ from what they are compared with; empty where none is compared."""
    sorted_out: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for row in rows:
        if measure in row["differences"]:
            sorted_out[row["differences"][measure]["verdict"]].append(f"{row['label']} (against {row['against']})")
    said = [
        f"{verdict} with {', '.join(those)}" for verdict, those in sorted_out.items() if those and verdict != NOT_SHOWN
    ]
    if others := len(sorted_out[NOT_SHOWN]):
        said.append(f"no difference shown in {others} of {sum(map(len, sorted_out.values()))} comparisons")
    return f"{name.capitalize()}: {'; '.join(said)}." if said else ""


def _describe_losses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Networks that diverged, or were not measured at all."""
    diverged = [row["label"] for row in rows if any("diverged" in outcome for outcome in row["outcomes"])]
    missing = sum("failed" in outcome for row in rows for outcome in row["outcomes"])
    said = [f"Diverged: {', '.join(diverged)}."] if diverged else []
    return said + ([f"Networks missing: {missing}; the same command tries them again."] if missing else [])


def to_markdown(table: Table, rows: Sequence[dict[str, Any]], recipe: str) -> str:
    """The table, with what is the same for all rows above it and the notes below."""
    lines = [
        f"**{table.reference}: {table.title}** ({recipe}; mean ± half of the 95 % band over seeds)",
        "",
        "| setting | the paper | loss | Fréchet distance | against | loss is | distance is | what was run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for row in rows:
        shown = [row["differences"].get(measure, {}).get("verdict", "") for measure in MEASURES]
        cells = [row["label"], _paper_cell(row, notes), *(_cell(row, measure) for measure in MEASURES)]
        cells += [row["against"] or "", *shown, _changes(row)]
        lines.append(f"| {' | '.join(cells)} |")
    if any(row["paper"] is None for row in rows):
        notes.append("—: the paper's number is not known here (scalelong_fast/analysis/paper.py).")
    return "\n".join([*lines, "", *notes, ""])


def _paper_cell(row: dict[str, Any], notes: list[str]) -> str:
    paper = row["paper"]
    if paper is None:
        return "—"
    note = f"The paper: {paper['metric']}; {paper['source']}."
    if note not in notes:
        notes.append(note)
    return paper["value"]


def _cell(row: dict[str, Any], measure: str) -> str:
    """The band of a measure, and of the seeds without one why."""
    found, outcomes = row[measure], row["outcomes"]
    parts = []
    if found is not None:
        width = f" ± {found['mean'] - found['low']:.2g}" if found["count"] > 1 else ""
        parts.append(f"{found['mean']:.4g}{width}")
    steps = [outcome["diverged"] for outcome in outcomes if "diverged" in outcome]
    if steps:
        parts.append(f"diverged, seen at step {', '.join(map(str, steps))} ({len(steps)} of {len(outcomes)} seeds)")
    parts += [outcome["failed"].replace("|", "/") for outcome in outcomes if "failed" in outcome]
    return "; ".join(parts)


def _changes(row: dict[str, Any]) -> str:
    changes = {**row["model"], **({"batch": row["batch_size"]} if row["batch_size"] else {})}
    return ", ".join(f"{name} {value}" for name, value in changes.items())


def draw(figure: "Figure", table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Both measures of every row, those of one point side by side.

    A row without any seed left has no mark, and one that lost some has a hollow one: those that are left went well.
    """
    series = list(dict.fromkeys(row["series"] for row in rows))
    shared = len({row["point"] for row in rows}) < len(rows) and all(row["point"] for row in rows)
    places = [row["point"] if shared else row["label"] for row in rows]
    points = list(dict.fromkeys(places))
    lost = ""
    for number, (measure, name) in enumerate(MEASURES.items(), start=1):
        axes = figure.add_subplot(1, 2, number)
        for line, called in enumerate(series):
            known = [n for n, row in enumerate(rows) if row["series"] == called and row[measure] is not None]
            shift = 0.5 * (line - (len(series) - 1) / 2) / len(series) if shared else 0
            at = {n: points.index(places[n]) + shift for n in known}
            axes.errorbar(
                list(at.values()),
                [rows[n][measure]["mean"] for n in known],
                yerr=[rows[n][measure]["mean"] - rows[n][measure]["low"] for n in known],
                marker="o",
                linestyle="none",
                capsize=3,
                label=called,
            )
            for n in known:
                if rows[n][measure]["count"] < len(rows[n]["outcomes"]):
                    axes.plot(at[n], rows[n][measure]["mean"], "o", color="white", markersize=4, zorder=3)
                    lost = "; hollow: seeds lost"
        axes.set_xticks(range(len(points)), points, rotation=30, ha="right")
        axes.set_ylabel(f"{name}, mean and 95 % band")
        axes.grid(True, axis="y", alpha=0.3)
    if shared:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(series))
    figure.suptitle(f"{table.title} ({table.reference}){lost}")

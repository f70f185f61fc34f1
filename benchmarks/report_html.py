"""``python -m benchmarks report --html``: all results on one page that needs nothing beside it, and no network."""

import base64
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.report_ops import draw_all
from benchmarks.report_plots import draw_plots
from scalelong_fast.errors import UserError

TEMPLATE = Path(__file__).with_name("page.html.j2")
#: Names that a table's command has, where it is another.
_COMMANDS = {"residual_dtype": "stream", "where_we_lose": "ops", "decoder": "ops"}
#: A picture in a table's Markdown; the page has its own below.
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")


def evidence(results: Path, root: Path) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the list of result files; a table without a file has a row that says so.

    Raises:
        UserError: a file that is no result.
    """
    from benchmarks.report import FILES, NOT_MEASURED, TABLES, is_stale

    rows, found = [], set()
    for path in sorted(results.glob("*/*.json")):
        name = path.relative_to(results).as_posix()
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            where, records = result["environment"], result["records"]
            stale = sum(is_stale(record, root) for record in records)
            cells = [str(where.get("device", "no device")), _cpu(where), _versions(where), str(where["date"])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{name}: not a result file ({type(error).__name__}: {error}). Measure it again, or delete it."
            ) from error
        found |= {path.stem, path.parent.name}
        verdict = "empty" if not records else "current" if not stale else f"{stale} of {len(records)} records stale"
        rows.append([name, *cells, str(len(records)), verdict])
    missing = [name for name in dict.fromkeys(FILES.get(table, table) for table in TABLES) if name not in found]
    rows += [[name, "–", "–", "–", "–", "0", NOT_MEASURED] for name in missing]
    return ["result file", "device", "processor", "versions", "date", "records", "evidence"], rows


def _cpu(where: dict[str, Any]) -> str:
    return f"{where['cpu_model']}, threads: {where['threads']}" if "cpu_model" in where else "–"


def _versions(where: dict[str, Any]) -> str:
    known = {"scalelong_fast": "scalelong_fast", "torch": "PyTorch", "cuda": "CUDA", "triton": "Triton"}
    known["python"] = "Python"
    return ", ".join(f"{name} {where[key]}" for key, name in known.items() if where.get(key))


def html_page(results: Path, root: Path = ROOT) -> str:
    """The page: evidence, every table, every picture, drawn anew.

    Raises:
        UserError: a broken result file, or markdown-it-py or jinja2 is missing.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    from benchmarks.__main__ import COMMANDS
    from benchmarks.report import TABLES, render

    headings, rows = evidence(results, root)
    sections = []
    for name in TABLES:
        about = COMMANDS.get(_COMMANDS.get(name, name), "")
        title = name.replace("_", " ")
        body = Markup(_html(render(name, results, root)))
        sections.append({"name": name, "title": title[:1].upper() + title[1:], "about": about, "body": body})
    pictures, notes = _pictures(results)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        evidence={"headings": headings, "rows": rows},
        gpu=any(row[1] not in ("cpu", "–", "no device") for row in rows),
        sections=sections,
        pictures=pictures,
        notes=notes,
    )


def _missing(error: ModuleNotFoundError) -> UserError:
    return UserError(f'{error}. The page needs jinja2 and markdown-it-py: pip install "scalelong_fast[train]"')


def _html(markdown: str) -> str:
    """HTML of a table's Markdown; tags in it stay text, and stale or missing evidence is marked."""
    try:
        from markdown_it import MarkdownIt
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    from benchmarks.report import NOT_MEASURED, STALE

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(_IMAGE.sub("", markdown))
    body = body.replace(STALE, f" <mark>{STALE.strip(' ()')}</mark>")
    return body.replace(f"<p>{NOT_MEASURED}</p>", f"<p><mark>{NOT_MEASURED}</mark></p>")


def _pictures(results: Path) -> tuple[dict[str, str], list[str]]:
    """The pictures by name, as text that stands for them in a page, and lines about those that were not drawn."""
    with tempfile.TemporaryDirectory() as folder:
        notes = [*draw_all(results, Path(folder)), *draw_plots(results, Path(folder))]
        files = sorted(Path(folder).glob("docs/images/*.png"))
        return {path.stem: _data_uri(path) for path in files}, notes


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

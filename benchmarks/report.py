"""``python -m benchmarks report``: the tables of README.md and docs/, from the result files."""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, source_hash
from benchmarks.report_aot import aot_table, factors_table, read_targets
from benchmarks.report_attention import attention_table
from benchmarks.report_convergence import convergence_table
from benchmarks.report_curves import curves_table
from benchmarks.report_inference import inference_table
from benchmarks.report_loader import loader_table
from benchmarks.report_models import models_table
from benchmarks.report_ops import draw_all, gpu_note, losses_table, ops_table
from benchmarks.report_plan import plan_table
from benchmarks.report_plots import draw_plots
from benchmarks.report_scaling import scaling_table
from benchmarks.report_traffic import traffic_table
from benchmarks.report_unet import decoder_model_note, decoder_table
from scalelong_fast.errors import UserError, invalid, unknown_name

#: Where tables are shown.
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "planning.md")
NOT_MEASURED = "not measured yet"
STALE = " (stale)"

_OPEN = re.compile(r"<!-- benchmark:([\w-]+) -->")
_LABELS = {
    "authors_fp32": "authors' recipe, fp32",
    "authors_bf16": "authors' recipe, bf16 autocast",
    "authors_compile_bf16": "authors' recipe, bf16 autocast, model compiled",
    "ours": "scalelong_fast",
    "ours_none": "scalelong_fast, no scaling",
    "ours_eager": "scalelong_fast, eager",
}


def is_stale(record: dict[str, Any], root: Path = ROOT) -> bool:
    """Whether a source of the record has changed, or gone, since it was measured."""
    return source_hash(record["sources"], root) != record["source_sha256"]


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first column is text and whose others are right-aligned."""
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def conditions(result: Mapping[str, Any]) -> str:
    """Machine, versions, date and measured limits of a result."""
    where = result["environment"]
    device = where["cpu_model"] if where["device"] == "cpu" else where["device"]
    cuda = f", CUDA {where['cuda']}" if where["cuda"] else f", {where['threads']} threads on {where['cores']} cores"
    versions = f"PyTorch {where['torch']}, Python {where['python']}"
    limits = result["ceilings"]
    products = ", ".join(f"{value:.3g} TFLOP/s {dtype}" for dtype, value in limits["matmul_tflop_s"].items())
    return (
        f"{device}{cuda}; {versions}; {where['date']}. Measured limits of the machine: {limits['copy_gb_s']:.3g} GB/s "
        f"copy, {products} matrix product."
    )


def step_table(result: dict[str, Any], root: Path = ROOT) -> list[str]:
    """Markdown of ``step.json``."""

    def ratio(record: dict[str, Any], reference: str) -> str:
        value = record[f"ratio_to_{reference}"]
        by_round = record[f"round_ratio_to_{reference}"]
        return "–" if value is None else f"{value:.2f} ({by_round:.2f})"

    rows = [
        [
            _LABELS.get(record["variant"], record["variant"]) + (STALE if is_stale(record, root) else ""),
            record["dtype"],
            f"{record['median_us'] / 1e3:.4g}",
            f"{record['p20_us'] / 1e3:.4g} – {record['p80_us'] / 1e3:.4g}",
            f"{record['images_per_second']:.4g}",
            "–" if record.get("mfu") is None else f"{record['mfu']:.1%}",
            ratio(record, "authors_fp32"),
            ratio(record, "authors_bf16"),
            f"{record['rel_error']:.1e}",
        ]
        for record in result["records"]
    ]
    headings = (
        "training step",
        "dtype",
        "median ms",
        "p20 – p80 ms",
        "images/s",
        "MFU",
        "speed-up over authors fp32",
        "over authors bf16",
        "loss error",
    )
    first = result["records"][0]
    size, steps = " × ".join(map(str, first["shape"])), result["settings"]["steps_per_round"]
    notes = [
        f"{first['model']}, batch {size}; {first['rounds']} interleaved rounds of {steps} "
        "steps. Speed-up: ratio of medians (median of the rounds' ratios). Loss error: relative, of the first loss "
        "against the authors' recipe in fp32 from equal weights, images, times and noise. MFU: FLOP of forward and "
        "backward over the time, as a share of the matrix product measured in the same run."
    ]
    ours = next((record for record in result["records"] if record["variant"] == "ours"), None)
    if ours is not None and ours["ratio_to_ours_none"] is not None:
        tax, by_round = 1 / ours["ratio_to_ours_none"], 1 / ours["round_ratio_to_ours_none"]
        notes.append(f"With LS our step takes {tax:.3f} ({by_round:.3f}) times as long as without.")
    return [*markdown(headings, rows), "", " ".join(notes), "", conditions(result)]


def stream_summary(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows (dtype, seeds, loss, loss minus fp32's of the same seed), each as mean ± standard deviation."""
    losses = {(record["dtype"], record["seed"]): record["loss"] for record in records}
    rows = []
    for dtype in dict.fromkeys(record["dtype"] for record in records):
        own = {seed: loss for (kind, seed), loss in losses.items() if kind == dtype}
        paired = [loss - losses["fp32", seed] for seed, loss in own.items() if ("fp32", seed) in losses]
        difference = "–" if dtype == "fp32" or not paired else _spread(paired, "+.6f")
        rows.append([dtype, str(len(own)), _spread(list(own.values()), ".6f"), difference])
    return rows


def _spread(values: Sequence[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {statistics.stdev(values):.6f}" if len(values) > 1 else mean


def residual_dtype_table(result: dict[str, Any], root: Path = ROOT) -> list[str]:
    """Markdown of ``residual_dtype.json``."""
    stale = {record["dtype"] for record in result["records"] if is_stale(record, root)}
    rows = [[dtype + STALE * (dtype in stale), *rest] for dtype, *rest in stream_summary(result["records"])]
    headings = ("residual stream", "seeds", "loss, mean ± sd", "minus fp32 of the same seed, mean ± sd")
    settings = result["settings"]
    note = (
        f"{settings['preset']}, {settings['steps']} steps under {settings['autocast']} autocast; loss of the averaged "
        f"weights over all images at {settings['evaluation_passes']} fixed times and noises each, in fp32."
    )
    return [*markdown(headings, rows), "", note, "", conditions(result)]


def digits_table(result: dict[str, Any], root: Path = ROOT) -> list[str]:
    """Markdown of ``digits.json``."""
    rows = [
        [
            f"`{record['model']}`" + (STALE if is_stale(record, root) else ""),
            record["variant"],
            f"{record['steps']}",
            f"{record['training_seconds']:.0f}",
            f"{record['sampler']}, guidance {record['guidance']:g}",
            f"{record['recognised']:.1%}",
            f"{record['nearest_ratio']:.2f}",
        ]
        for record in result["records"]
    ]
    headings = ("model", "scaling", "steps", "training s", "sampler", "recognised", "nearest real digit")
    note = (
        f"{result['records'][0]['shape'][0]} samples, 20 of each digit. Recognised: read as the digit asked for by a "
        "support vector machine fitted on the real digits. Nearest real digit: median distance, in units of that "
        "between real digits; copies would have 0."
    )
    return [*markdown(headings, rows), "", note, "", conditions(result)]


#: Tables by the name of their marker and result file; a new one is a function and a line here.
TABLES: dict[str, Callable[[dict[str, Any], Path], list[str]]] = {
    "step": step_table,
    "residual_dtype": residual_dtype_table,
    "digits": digits_table,
    "loader": loader_table,
    "scaling": scaling_table,
    "ops": ops_table,
    "where_we_lose": losses_table,
    "uvit": models_table,
    "decoder": decoder_table,
    "unet": models_table,
    "curves": curves_table,
    "convergence": convergence_table,
    "attention": attention_table,
    "inference": inference_table,
    "traffic": traffic_table,
    "aot": aot_table,
    "aot_factors": factors_table,
    "plan": plan_table,
}

#: Result files of tables that are not named like theirs.
FILES = {"where_we_lose": "ops", "decoder": "ops", "aot_factors": "aot"}

#: What to say of all machines' results together, by table.
NOTES: dict[str, Callable[[list[dict[str, Any]]], str | None]] = {
    "ops": gpu_note,
    "uvit": gpu_note,
    "decoder": decoder_model_note,
    "unet": gpu_note,
}


def render(name: str, results: Path = RESULTS, root: Path = ROOT) -> str:
    """Markdown of one table for every machine that has its result file.

    Raises:
        UserError: unknown table, or a result file that cannot be read.
    """
    if name not in TABLES:
        raise unknown_name("benchmark", name, TABLES)
    parts, found = [], []
    # Compiled code belongs to no machine: one table of a folder of files.
    file = FILES.get(name, name)
    for path in sorted(results.glob("aot" if file == "aot" else f"*/{file}.json")):
        try:
            found.append(read_targets(path) if path.is_dir() else json.loads(path.read_text(encoding="utf-8")))
            lines = TABLES[name](found[-1], root)
            parts += ["\n".join(lines)] if lines else []
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{path.parent.name}/{path.name}: not a result of this benchmark ({type(error).__name__}: {error}). "
                "Measure it again, or delete it."
            ) from error
    note = NOTES[name](found) if name in NOTES else None
    return "\n\n".join([*parts, note] if note else parts) or NOT_MEASURED


def updated(text: str, results: Path = RESULTS, root: Path = ROOT, page: str = "README.md") -> str:
    """``text`` of a page with what stands between each pair of markers replaced by the table they name.

    Args:
        text: of the page.
        results: folder of the result files.
        root: of the repository.
        page: the page's place in it.

    Raises:
        UserError: a marker without its end, an unknown table, or a broken result file.
    """
    pieces, position = [], 0
    while match := _OPEN.search(text, position):
        name = match[1]
        closing = f"<!-- /benchmark:{name} -->"
        end = text.find(closing, match.end())
        following = _OPEN.search(text, match.end())
        if end < 0 or (following and following.start() < end):
            raise UserError(f"{page}: marker {match[0]} has no {closing} before the next marker. Put one in.")
        table = render(name, results, root)
        if page.startswith("docs/"):  # tables link to files in docs/ alone
            table = table.replace("](docs/", "](")
        pieces += [text[position : match.end()], "\n", table, "\n", closing]
        position = end + len(closing)
    return "".join(pieces) + text[position:]


def main(args: Sequence[str], *, pages: Sequence[Path] = PAGES, results: Path = RESULTS, root: Path = ROOT) -> int:
    """Run the command; returns the exit code. The keywords point it at other files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description="Rewrite the tables between <!-- benchmark:NAME --> and <!-- /benchmark:NAME --> in "
        f"{', '.join(page.name for page in pages)}. "
        f"Tables: {', '.join(TABLES)}. Rows whose sources have changed since are marked as stale.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page would change")
    parser.add_argument("--html", type=Path, metavar="OUT", help="only write one page with all results and pictures")
    parser.add_argument("--results", type=Path, metavar="DIR", help="with --html: result files of another folder")
    options = parser.parse_args(args)
    if options.results is not None:
        if options.html is None:
            raise invalid(
                "--results", str(options.results), "--html beside it", "The pages here have their own results."
            )
        results = options.results
    if options.html is not None:
        return _write_page(options.html, results, root)
    old = {page: page.read_text(encoding="utf-8") for page in pages}

    def tables() -> dict[Path, str]:
        return {page: updated(text, results, root, page.relative_to(root).as_posix()) for page, text in old.items()}

    new = tables()
    if options.check:
        for page in pages:
            late = new[page] != old[page]
            print(f"{page.name} is {'out of date: run python -m benchmarks report' if late else 'in sync.'}")
        return int(new != old)
    for line in [*draw_all(results, root), *draw_plots(results, root)]:
        print(line)
    new = tables()  # with the pictures there are now
    for page in pages:
        if new[page] != old[page]:
            page.write_text(new[page], encoding="utf-8")
        print(f"{page.name} {'rewritten' if new[page] != old[page] else 'was in sync already'}.")
    for name in TABLES:
        if not any(f"<!-- benchmark:{name} -->" in text for text in new.values()):
            print(f"No page has a <!-- benchmark:{name} --> marker, so table {name} is shown nowhere.")
    return 0


def _write_page(path: Path, results: Path, root: Path) -> int:
    from benchmarks.report_html import html_page
    from scalelong_fast.training.files import write_atomically

    if path.is_dir():
        raise invalid("--html", str(path), "a file to write")
    text = html_page(results, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))
    print(f"Written to {path}.")
    return 0

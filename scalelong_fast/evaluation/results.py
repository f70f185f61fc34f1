"""Results of evaluations: the list in the run's folder, and a table for people."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalelong_fast.errors import UserError
from scalelong_fast.training.files import write_json

if TYPE_CHECKING:
    from rich.table import Table


def read_results(path: Path) -> list[dict[str, Any]]:
    """All results so far, oldest first; none where there is no file.

    Raises:
        UserError: a file that is something else.
    """
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"RUN: {path} cannot be read ({error}). Move it away; new results start a new file.") from error
    if not isinstance(results, list):
        raise UserError(f"RUN: {path} holds no list of results. Move it away; new results start a new file.")
    return results


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Add a result to the file, which is replaced atomically.

    Raises:
        UserError: it cannot be written; earlier results are untouched.
    """
    _write(path, [*read_results(path), result])


def complete_result(path: Path, result: dict[str, Any]) -> None:
    """Replace the newest result of the file by what it has become.

    Raises:
        UserError: it cannot be written; what was there is untouched.
    """
    _write(path, [*read_results(path)[:-1], result])


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    try:
        write_json(path, results)
    except OSError as error:
        raise UserError(
            f"RUN: cannot write {path} ({error}); earlier results are untouched. The new one: {json.dumps(results[-1])}"
        ) from error


def as_table(result: dict[str, Any]) -> "Table":
    """A result as two columns, the numbers first."""
    from rich.table import Table

    extractor, reference, drawn = result["extractor"], result["reference"], result["sampling"]
    table = Table(show_header=False)
    table.add_row("FID" if extractor["name"] == "inception" else "Fréchet distance", f"[bold]{result['fid']:.4f}")
    if result["kid"] is not None:
        kid = result["kid"]
        of = f"of {kid['of_generated']:,} generated and {kid['of_reference']:,} reference images"
        subsets = f"{kid['subsets']} subsets of {kid['size']}"
        table.add_row("KID", f"{kid['mean']:.6f} ± {kid['std']:.6f} over {subsets}, {of}")
    table.add_row("generated images", f"{result['n']:,}" if result["n"] else "number unknown")
    counted = f"{reference['n']:,} images" if reference["n"] else "number of images unknown"
    table.add_row("reference", f"{reference['name']} ({counted}, data {reference['data_fingerprint'] or 'unknown'})")
    table.add_row("extractor", f"{extractor['name']} ({extractor['fingerprint']}), {extractor['width']} features")
    if drawn is not None:
        table.add_row("sampler", f"{drawn['sampler']}, {drawn['steps']} steps, {drawn['precision']}")
        table.add_row("guidance", f"{drawn['guidance']:g}")
        table.add_row("condition", drawn["condition"])
        table.add_row("seed", str(drawn["seed"]))
        step = "unknown step" if drawn["step"] is None else f"step {drawn['step']:,}"
        table.add_row("model", f"{step}, weights {drawn['weights']}")
    if result["protocol"] is not None:
        differs = "; ".join(result["deviations"])
        table.add_row("protocol", result["protocol"] + (f", but {differs}" if differs else ""))
    return table

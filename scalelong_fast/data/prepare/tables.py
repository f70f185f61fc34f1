"""Images in a table of Hugging Face datasets: from the hub, from save_to_disk, or from parquet files."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scalelong_fast.data.optional import import_optional
from scalelong_fast.data.prepare.source import SPLITS, Source, UnreadableError, fingerprint
from scalelong_fast.errors import UserError, invalid

_IMAGES = ("image", "img", "jpg", "png", "webp")
_LABELS = ("label", "labels", "fine_label", "cls")
_CAPTIONS = ("captions", "caption", "sentences_raw", "sentences", "text", "answer")

#: What is read of a table besides its images; see :class:`scalelong_fast.data.prepare.recipes.Recipe`.
Condition = Literal["labels", "captions", "none", "found"]


def is_table(names: Iterable[str]) -> bool:
    """Whether the files of a folder are a table's: of one written by ``save_to_disk``, or parquet."""
    return any(name in ("state.json", "dataset_dict.json") or name.endswith(".parquet") for name in names)


def open_local(path: Path, split: str, condition: Condition) -> Source:
    """The table in a local folder or file; of several splits the one asked for.

    Raises:
        UserError: it cannot be read, has no such split, no column of images, or labels that are none.
    """
    datasets = import_optional("datasets")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    try:
        if path.is_dir() and not any(file.suffix == ".parquet" for file in files):
            table = datasets.load_from_disk(str(path))
        else:
            files = [path] if path.is_file() else _parquet_of(path, files, split)
            table = datasets.Dataset.from_parquet([str(file) for file in files])
    except UserError:
        raise
    except Exception as error:  # pyarrow, json and datasets each raise their own kinds on damaged files
        raise UserError(
            f"--source: the table in {str(path)!r} cannot be read ({type(error).__name__}: {error}). Write or download "
            "it again."
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise invalid("--split", split, f"one of {', '.join(sorted(table))}, the splits in {str(path)!r}")
        table = table[split]
    sizes = ((file.relative_to(path).as_posix() if path.is_dir() else file.name, file.stat().st_size) for file in files)
    facts = {"kind": "table", "path": str(path), "fingerprint": fingerprint(sizes)}
    return _source(table, str(path), facts, split, condition)


def _parquet_of(path: Path, files: list[Path], split: str) -> list[Path]:
    """The parquet files of a split; all of them where their names and folders speak of no split."""
    parquet = [file for file in files if file.suffix == ".parquet"]
    chosen = [file for file in parquet if file.name.startswith(split) or file.parent.name == split]
    known = {name for file in parquet for name in (file.parent.name, re.split("[-_.]", file.name)[0])} & SPLITS
    if not chosen and (known or split != "train"):
        found = f"one of {', '.join(sorted(known))}, the splits" if known else "none, since there are no splits"
        raise invalid("--split", split, f"{found} in {str(path)!r}")
    return chosen or parquet


def open_hub(name: str, split: str, revision: str | None, condition: Condition, begun: str | None = None) -> Source:
    """A data set of the Hugging Face hub, downloaded into its cache or found there.

    Args:
        name: on the hub.
        split: to read.
        revision: a commit, branch or tag; None: that of ``begun``, else the newest.
        condition: what to read besides the images.
        begun: the commit that the preparation was begun with. With it the hub is not asked which is the newest, and
            where it cannot be reached, its data are taken from the cache of datasets.

    Raises:
        UserError: it cannot be downloaded, has no column of images, or labels that are none.
    """
    datasets = import_optional("datasets")
    try:
        if begun is not None and revision in (None, begun):
            commit = begun
        else:
            commit = import_optional("huggingface_hub").HfApi().dataset_info(name, revision=revision).sha
        table = datasets.load_dataset(name, split=split, revision=commit)
        _check_commit(table, name, commit)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many unrelated kinds when the network is down
        begun_with = f" OUT was begun with --revision {begun}, for which the cache may do." if begun else ""
        raise UserError(
            f"--source: there is no local {name!r}, and downloading it from the hub (split {split!r}) failed "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Accept the data set's terms on its page "
            "and log in with `hf auth login` where it asks for that; without a network, give a local copy with "
            "--source PATH (a folder of images, an archive, parquet files, or what Dataset.save_to_disk wrote)."
            f"{begun_with}"
        ) from error
    facts = {"kind": "hub", "path": name, "revision": commit}
    return _source(table, name, facts, split, condition)


def _check_commit(table: Any, name: str, commit: str) -> None:
    """Raise if the hub could not be reached and datasets took the newest of its cache, which is of another commit."""
    folders = [Path(file["filename"]).parent.name for file in table.cache_files]
    other = next((folder for folder in folders if re.fullmatch("[0-9a-f]{40}", folder) and folder != commit), None)
    if other is not None:
        raise UserError(
            f"--source: the hub cannot be reached, and the newest copy of {name!r} in the cache of datasets is of "
            f"revision {other}, not of {commit}. Try again when there is a network, or give --revision {other} and "
            "another OUT."
        )


def _source(table: Any, where: str, facts: dict[str, Any], split: str, condition: Condition) -> Source:
    datasets = import_optional("datasets")
    typed = (name for name, feature in table.features.items() if isinstance(feature, datasets.Image))
    column = _find(table, _IMAGES) or next(typed, None)
    if column is None:
        raise invalid("--source", f"columns {table.column_names} in {where}", f"one of images: {', '.join(_IMAGES)}")
    if len(table) == 0:
        raise invalid("--source", f"{where} with no rows", "a table with images")
    table = table.with_format(None)
    encoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    labels, class_names = _labels(table, where) if condition in ("labels", "found") else (None, ())
    captions = _captions(table, where) if condition == "captions" else None

    def read(index: int) -> bytes:
        row = encoded[index][column]
        if row is None or (row["bytes"] is None and row["path"] is None):
            raise UnreadableError(f"row {index} of {where} has no image")
        return row["bytes"] if row["bytes"] is not None else Path(row["path"]).read_bytes()

    facts = {**facts, "split": split, "images": len(table), "datasets": datasets.__version__}
    return Source(_Rows(where, len(table)), read, labels, class_names, captions, facts)


class _Rows:
    """Names of a table's rows, made when they are asked for."""

    def __init__(self, where: str, count: int):
        self.where, self.count = where, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        return f"row {index} of {self.where}"


def _find(table: Any, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in table.column_names), None)


def _labels(table: Any, where: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    column = _find(table, _LABELS)
    if column is None:
        return None, ()
    values = table.select_columns([column])[:][column]
    if all(type(value) is str for value in values):
        names, labels = np.unique(np.array(values), return_inverse=True)
        return labels.astype(np.int64), tuple(names.tolist())
    if not all(type(value) is int and value >= 0 for value in values):
        bad = next(value for value in values if type(value) is not int or value < 0)
        raise invalid("--source", f"label {bad!r} in {where}", "names, or whole numbers from 0 on")
    labels = np.array(values, np.int64)
    known = getattr(table.features[column], "names", None)
    names = tuple(known) if known else tuple(map(str, range(int(labels.max()) + 1)))
    if labels.max() >= len(names):
        raise invalid("--source", f"label {labels.max()} in {where}", f"labels of its {len(names)} classes")
    return labels, names


def _captions(table: Any, where: str) -> list[list[str]] | None:
    """Captions of the first of the usual columns that holds text or lists of texts; None: there is no such column."""
    columns = (column for column in _CAPTIONS if column in table.column_names)
    return next((found for column in columns if (found := _captions_in(table, column, where)) is not None), None)


def _captions_in(table: Any, column: str, where: str) -> list[list[str]] | None:
    captions = []
    for index, value in enumerate(table.select_columns([column])[:][column]):
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
            return None  # a column of this name that holds something else
        if not listed:
            raise UserError(f"--source: row {index} of {where} has no caption. Remove it, or give it one.")
        captions.append([" ".join(text.split()) for text in listed])
    return captions

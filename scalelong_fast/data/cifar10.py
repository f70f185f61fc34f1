"""CIFAR-10's training split, from the Hugging Face hub or from a local copy."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalelong_fast.data.images import ImageDataset
from scalelong_fast.data.optional import import_optional, track
from scalelong_fast.errors import UserError, invalid

_HUB_NAME = "uoft-cs/cifar10"
_SIDE = 32
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_cifar10(path: Path | None, img_size: int | None, progress: bool) -> ImageDataset:
    """CIFAR-10's training images as uint8 of shape (N, 3, 32, 32), labels 0..9.

    Args:
        path: ``None`` to download from the hub (or reuse its cache); otherwise a folder written by
            ``datasets.Dataset.save_to_disk``, or one that holds parquet files. Where a copy has several
            splits, the one called ``train`` is read. Columns: ``img`` or ``image``, and ``label``.
        img_size: ``None`` or 32.
        progress: show a progress bar while decoding.

    Raises:
        UserError: when the download fails, or the copy is not CIFAR-10 in one of these layouts.
    """
    if img_size not in (None, _SIDE):
        raise invalid(
            "--model.img-size",
            img_size,
            "32",
            "CIFAR-10 is native 32x32; use --model.img-size 32, or folder.",
        )
    datasets = import_optional("datasets")
    where = str(path) if path is not None else _HUB_NAME
    table = _download(datasets) if path is None else _read_local(datasets, path)
    column = _image_column(table, where)
    names = getattr(table.features["label"], "names", None) or _CLASSES
    if len(names) != len(_CLASSES):
        raise invalid("--data.path", where, f"CIFAR-10 with its 10 classes, not {len(names)} classes")

    images = np.empty((len(table), _SIDE, _SIDE, 3), np.uint8)
    labels = np.empty(len(table), np.int64)
    rows = track(_rows(datasets, table, column, where), len(table), "Decoding CIFAR-10", progress)
    for index, (image, label) in enumerate(rows):
        if image is None:
            raise invalid("--data.path", f"nothing in place of image {index} in {where}", "an image")
        if image.size != (_SIDE, _SIDE):
            got = f"image {index} of {image.width}x{image.height} pixels in {where}"
            raise invalid("--data.path", got, "CIFAR-10's 32x32", "Use --data.name folder for other images.")
        if type(label) is not int:
            raise invalid("--data.path", f"label {label!r} of image {index} in {where}", "a whole number 0..9")
        images[index] = np.asarray(image.convert("RGB"))
        labels[index] = label
    return ImageDataset(
        name="cifar10",
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(labels),
        num_classes=len(_CLASSES),
        class_names=tuple(names),
    )


def _download(datasets: Any) -> Any:
    try:
        return datasets.load_dataset(_HUB_NAME, split="train")
    except Exception as error:  # the hub's client raises many unrelated kinds when the network is down
        raise UserError(
            f"cifar10: downloading {_HUB_NAME} from the Hugging Face hub failed "
            f"({type(error).__name__}: {error}). Without a network, download its parquet files elsewhere and "
            "name their folder with --data.path; a folder written by Dataset.save_to_disk works too."
        ) from error


def _read_local(datasets: Any, path: Path) -> Any:
    is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    parquet = sorted(path.rglob("*.parquet"))
    if not is_saved and not parquet:
        raise invalid("--data.path", str(path), "a folder written by Dataset.save_to_disk or one of parquet files")
    try:
        return _read_saved(datasets, path) if is_saved else _read_parquet(datasets, parquet)
    except UserError:
        raise
    except Exception as error:  # pyarrow, json and datasets each raise their own kinds on damaged files
        raise UserError(
            f"--data.path: the copy of CIFAR-10 in {str(path)!r} cannot be read "
            f"({type(error).__name__}: {error}). Write or download it again."
        ) from error


def _read_saved(datasets: Any, path: Path) -> Any:
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if "train" not in saved:
        raise invalid("--data.path", str(path), f"a split called 'train' among {sorted(saved)}")
    return saved["train"]


def _read_parquet(datasets: Any, files: list[Path]) -> Any:
    # The hub's own layout keeps test files beside the training files.
    train = [file for file in files if file.name.startswith("train") or file.parent.name == "train"]
    # The table ends up in memory, so the copy that datasets makes on the way need not outlive the call.
    with tempfile.TemporaryDirectory() as scratch:
        names = [str(file) for file in train or files]
        return datasets.Dataset.from_parquet(names, cache_dir=scratch, keep_in_memory=True)


def _image_column(table: Any, where: str) -> str:
    found = [column for column in ("img", "image") if column in table.column_names]
    if not found or "label" not in table.column_names:
        raise invalid("--data.path", f"columns {table.column_names} in {where}", "'img' or 'image', and 'label'")
    return found[0]


def _rows(datasets: Any, table: Any, column: str, where: str) -> Iterator[tuple[Any, Any]]:
    try:
        # Parquet files not written by datasets lack the mark that says the column holds encoded images.
        decoded = table.with_format(None).cast_column(column, datasets.Image())
        for batch in decoded.iter(batch_size=1000):
            yield from zip(batch[column], batch["label"], strict=True)
    except Exception as error:
        raise UserError(
            f"--data.path: column {column!r} in {where} cannot be decoded as images "
            f"({type(error).__name__}: {error}). Write or download the copy again."
        ) from error

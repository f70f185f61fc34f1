"""A packed set as a training set: memory-mapped files, of which a sample is a slice."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scalelong_fast.data.packed.files import find_fault, list_faults
from scalelong_fast.data.packed.format import DTYPES, Field, FileRecord, read_manifest
from scalelong_fast.data.packed.readahead import announce
from scalelong_fast.data.training_set import HostBatch, caption_numbers, check_indices
from scalelong_fast.errors import UserError, invalid


class PackedSet:
    """The :class:`TrainingSet` of a folder that ``scalelong-fast prepare`` wrote.

    Opening reads the manifest, labels and caption counts, compares the size of every file, and maps them; samples are
    read when they are fetched. Several threads may fetch at the same time.

    Args:
        path: the folder.

    Raises:
        UserError: it is no packed set, or a file is missing or has the wrong size; the file is named.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise invalid(
                "--data.path", str(path), "the folder of a packed set", "Make one with scalelong-fast prepare."
            )
        self.manifest = read_manifest(self.path)
        faults = list_faults(self.path, self.manifest.files)
        if faults:
            record, fault = faults[0]
            raise _damaged(self.path / record.name, fault, len(faults) - 1)

        plan = self.manifest.plan
        self.name, self.latent_scale = plan.name, plan.latent_scale
        self.class_names, self.num_classes = plan.class_names, len(plan.class_names)
        self.latent = "moments" in plan.fields
        self.nbytes = sum(record.bytes for record in self.manifest.files)
        channels, height, width = plan.fields["moments" if self.latent else "images"].shape
        self.image_shape = (channels // 2 if self.latent else channels, height, width)
        self._shard_sizes = np.array([shard.count for shard in self.manifest.shards])
        self._starts = np.cumsum(self._shard_sizes) - self._shard_sizes
        self._rows = {
            name: [_map_rows(self.path, shard.files[name], field) for shard in self.manifest.shards]
            for name, field in plan.fields.items()
        }
        # Of the first row of each shard.
        self._addresses = {name: np.array([shard.data_ptr() for shard in rows]) for name, rows in self._rows.items()}
        self._labels = self._read_all("labels")
        if self._labels is not None:
            self._check_labels(self._labels)
        self.text_shape: tuple[int, int] | None = None
        self.null_text: Tensor | None = None
        self.num_captions = 0
        if "text" in plan.fields:
            self._open_text(plan.fields["text"])

    def _open_text(self, field: Field) -> None:
        length, dim = field.shape
        self.text_shape = (length, dim)
        assert self.manifest.null_text is not None
        self.null_text = _map_rows(self.path, self.manifest.null_text, field)[0].clone()
        counts = self._read_all("captions")
        assert counts is not None
        self._counts = counts.numpy()
        self.num_captions = int(self._counts.max())
        # Row of each image's first caption within its shard.
        before = np.cumsum(self._counts, dtype=np.int64) - self._counts
        self._first_caption = before - before[self._starts].repeat(self._shard_sizes)
        totals = np.add.reduceat(self._counts, self._starts)
        for shard, rows, total in zip(self.manifest.shards, self._rows["text"], totals, strict=True):
            if len(rows) != total or self._counts.min() < 1:
                raise _damaged(self.path / shard.files["captions"].name, "does not fit the text beside it")

    def __len__(self) -> int:
        """Number of samples."""
        return self.manifest.count

    def fingerprint(self) -> str:
        """Hash (16 hex digits) of the files' checksums; where the set lies and what it was packed from do not count."""
        plan = self.manifest.plan
        fields = sorted((name, field.dtype, field.shape) for name, field in plan.fields.items())
        digest = hashlib.blake2b(repr((fields, len(self), self.num_classes, plan.latent_scale)).encode(), digest_size=8)
        for record in self.manifest.files:
            digest.update(record.sha256.encode())
        return digest.hexdigest()

    def fetch(self, indices: Tensor, captions: np.ndarray | None = None) -> HostBatch:
        """Samples by index; see :meth:`TrainingSet.fetch`."""
        found = check_indices(indices, len(self))
        shards = np.searchsorted(self._starts, found, side="right") - 1
        name = "moments" if self.latent else "images"
        pixels = self._gather(name, shards, found - self._starts[shards])
        text = None
        if self.text_shape is not None:
            numbers = caption_numbers(captions, self._counts[found])
            text = self._gather("text", shards, self._first_caption[found] + numbers)
        labels = None if self._labels is None else self._labels[indices]
        return HostBatch(
            images=None if self.latent else pixels, moments=pixels if self.latent else None, labels=labels, text=text
        )

    def _gather(self, name: str, shards: np.ndarray, rows: np.ndarray) -> Tensor:
        """Rows of a field, copied: ``rows[i]`` of shard ``shards[i]``."""
        field, mapped = self.manifest.plan.fields[name], self._rows[name]
        for shard in np.unique(shards).tolist():
            self._check_size(self.manifest.shards[shard].files[name])
        views = [mapped[shard].select(0, row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
        if not views:
            return torch.empty((0, *field.shape), dtype=DTYPES[field.dtype][0])
        announce(self._addresses[name][shards] + rows * field.row_bytes, field.row_bytes)
        # One call for all of them, which lets go of the interpreter lock once: a reading thread that gave it up for
        # each row would wait for it as often, behind whatever the training thread does in Python.
        return torch.stack(views)

    def _check_size(self, record: FileRecord) -> None:
        """Raise if a mapped file was cut off: touching what is gone would kill the process with SIGBUS."""
        path = self.path / record.name
        try:
            if os.stat(path).st_size >= record.bytes:
                return
        except OSError:
            pass
        raise _damaged(path, find_fault(self.path, record, content=False) or "was changed while it was in use")

    def _check_labels(self, labels: Tensor) -> None:
        """Raise if an altered file has labels of no class: a GPU would only say so as a device-side assertion."""
        bad = torch.nonzero((labels < 0) | (labels >= self.num_classes))
        if len(bad):
            shard = self.manifest.shards[np.searchsorted(self._starts, int(bad[0]), side="right") - 1]
            raise _damaged(self.path / shard.files["labels"].name, f"holds labels outside 0 … {self.num_classes - 1}")

    def _read_all(self, name: str) -> Tensor | None:
        """A field of all samples in memory, for those with a few bytes a sample; None if the set lacks it."""
        if name not in self._rows:
            return None
        return torch.cat(self._rows[name])


def _map_rows(folder: Path, record: FileRecord, field: Field) -> Tensor:
    """The file's content ``(rows, *shape)``, read when it is touched; writing to it would not change the file."""
    path = folder / record.name
    dtype = DTYPES[field.dtype][0]
    try:
        # Unlike np.memmap it keeps no file open, of which large sets have more than a process may open.
        mapped = torch.from_file(str(path), shared=False, size=record.bytes // dtype.itemsize, dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    return mapped.view(-1, *field.shape)


def _damaged(path: Path, fault: str, others: int = 0) -> UserError:
    more = f", and {others} more files are damaged too" if others else ""
    return UserError(
        f"--data.path: {path} {fault}{more}. Run the same scalelong-fast prepare command with --verify again: it makes "
        "the shards again that are missing or damaged, and leaves the others as they are."
    )

"""The layout of a packed set: which files there are, what is in them, and the manifest as JSON.

A set is a folder of shards. Each field of a shard is one file of raw little-endian rows without a header, so that a
sample is a slice of it. ``text`` has a row for each caption, the captions of an image one after the other, and
``captions`` says how many these are; the other fields have a row for each sample.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalelong_fast.errors import UserError

FORMAT = "scalelong_fast packed set"
VERSION = 1
MANIFEST = "manifest.json"
NULL_TEXT = "null_text.bin"

#: Dtypes of fields: PyTorch's, and the one of equal size that NumPy knows.
DTYPES: dict[str, tuple[torch.dtype, type]] = {
    "uint8": (torch.uint8, np.uint8),
    "int32": (torch.int32, np.int32),
    "int64": (torch.int64, np.int64),
    "bfloat16": (torch.bfloat16, np.uint16),
}

#: Dtype of every field that a set may have.
FIELD_DTYPES = {"images": "uint8", "moments": "bfloat16", "labels": "int64", "captions": "int32", "text": "bfloat16"}


@dataclass(frozen=True)
class Field:
    """Shape of one row, and its dtype by name."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype][1]).itemsize


@dataclass(frozen=True)
class FileRecord:
    """A file of the set: its name, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """``count`` samples that follow each other, the file of each field, and the images that were left out.

    ``skipped`` names the images of this part of the source that cannot be read.
    """

    count: int
    files: dict[str, FileRecord]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All that is known before the first sample is packed, and that the bytes follow from.

    Attributes:
        name: of the data set.
        count: number of images of the source.
        shard_size: images of the source that go into each shard but the last.
        fields: by name; exactly one of images and moments.
        class_names: in label order; empty without labels.
        latent_scale: factor between moments and what a network trains on; 1 for images.
        source: what was packed: paths or names, revision, sizes, a fingerprint.
        preparation: how: crop rule, encoders, versions of the libraries.
    """

    name: str
    count: int
    shard_size: int
    fields: dict[str, Field]
    class_names: tuple[str, ...]
    latent_scale: float
    source: dict[str, Any]
    preparation: dict[str, Any]

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def samples(self, shard: int) -> range:
        """Indices of the source's images that go into a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def file_name(self, shard: int, field: str) -> str:
        """Name of a shard's file."""
        return f"shard-{shard:05d}.{field}.bin"


@dataclass(frozen=True)
class Manifest:
    """The plan and the shards that came of it. No date and no machine: packing the same again gives the same bytes."""

    plan: Plan
    shards: tuple[Shard, ...]
    null_text: FileRecord | None

    @property
    def count(self) -> int:
        """Number of samples: the images of the source without those that were left out."""
        return sum(shard.count for shard in self.shards)

    @property
    def skipped(self) -> list[str]:
        """Names of the images that were left out, since they cannot be read."""
        return [name for shard in self.shards for name in shard.skipped]

    @property
    def files(self) -> list[FileRecord]:
        """Every file of the set but the manifest and the journal."""
        files = [record for shard in self.shards for record in shard.files.values()]
        return files if self.null_text is None else [*files, self.null_text]


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """JSON-ready; :func:`plan_from_dict` undoes it."""
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def plan_from_dict(values: dict[str, Any]) -> Plan:
    """A plan from its dict; raises KeyError, TypeError or ValueError where it is not one."""
    fields = {
        name: Field(field["dtype"], tuple(int(length) for length in field["shape"]))
        for name, field in values["fields"].items()
    }
    for name, field in fields.items():
        if FIELD_DTYPES.get(name) != field.dtype:
            raise ValueError(f"field {name!r} of dtype {field.dtype!r}")
    if ("images" in fields) == ("moments" in fields) or ("text" in fields) != ("captions" in fields):
        raise ValueError(f"fields {sorted(fields)}")
    plan = Plan(
        name=str(values["name"]),
        count=int(values["count"]),
        shard_size=int(values["shard_size"]),
        fields=fields,
        class_names=tuple(str(name) for name in values["class_names"]),
        latent_scale=float(values["latent_scale"]),
        source=dict(values["source"]),
        preparation=dict(values["preparation"]),
    )
    if plan.count < 1 or plan.shard_size < 1 or ("labels" in fields) != bool(plan.class_names):
        raise ValueError("numbers that do not fit together")
    return plan


def shard_from_dict(values: dict[str, Any]) -> Shard:
    """A shard from its dict; raises KeyError or TypeError where it is not one."""
    files = {name: FileRecord(**record) for name, record in values["files"].items()}
    if any(Path(record.name).name != record.name for record in files.values()):
        raise ValueError("a file outside the folder")
    return Shard(int(values["count"]), files, tuple(map(str, values.get("skipped", ()))))


def manifest_to_dict(manifest: Manifest) -> dict[str, Any]:
    """What the manifest's file holds."""
    return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(manifest)}


def read_manifest(folder: Path, argument: str = "--data.path") -> Manifest:
    """The manifest of a packed set.

    Raises:
        UserError: there is none, it is damaged, of another format or of a newer version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{argument}: {str(folder)!r} has no {MANIFEST}, so it is no packed set, or one that is not finished. Run "
            "the same scalelong-fast prepare command again: it goes on where it stopped."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(
                f"{argument}: {file} is the manifest of something else, expected the format {FORMAT!r}. Give the "
                "folder that scalelong-fast prepare wrote."
            )
        if values.get("version") != VERSION:
            raise UserError(
                f"{argument}: {file} has version {values.get('version')!r}, this code reads {VERSION}. Update "
                "scalelong_fast, or prepare the set again with this version into another folder."
            )
        null_text = None if values["null_text"] is None else FileRecord(**values["null_text"])
        manifest = Manifest(
            plan_from_dict(values["plan"]), tuple(shard_from_dict(shard) for shard in values["shards"]), null_text
        )
        check_manifest(manifest)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{argument}: {file} is damaged ({type(error).__name__}: {error}). Delete this one file and run the same "
            "scalelong-fast prepare command again: it is written anew from the journal beside it."
        ) from error
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise ValueError unless the shards are those of the plan, with files of the sizes that their rows take."""
    plan = manifest.plan
    if len(manifest.shards) != plan.num_shards:
        raise ValueError(f"{len(manifest.shards)} shards of {plan.num_shards}")
    for index, shard in enumerate(manifest.shards):
        check_shard(plan, index, shard)
    if ("text" in plan.fields) != (manifest.null_text is not None):
        raise ValueError("null_text without text, or text without null_text")


def check_shard(plan: Plan, index: int, shard: Shard) -> None:
    """Raise ValueError unless a shard fits the plan."""
    whole = shard.count > 0 and shard.count + len(shard.skipped) == len(plan.samples(index))
    if not whole or set(shard.files) != set(plan.fields):
        raise ValueError(f"shard {index} does not fit the others")
    for name, field in plan.fields.items():
        size = shard.files[name].bytes
        if size % field.row_bytes or (name != "text" and size != shard.count * field.row_bytes):
            raise ValueError(f"size of {shard.files[name].name}")

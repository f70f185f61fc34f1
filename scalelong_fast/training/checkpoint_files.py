"""A checkpoint as files: tensors through torch.distributed.checkpoint, everything else and the checksums as JSON."""

import hashlib
import io
import json
import pathlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException

#: Layout of a checkpoint; 1 was a single file, ``step_<nine digits>.pt``.
FORMAT = 2
MANIFEST = "checksums.json"

#: Key under which a state's tree, stored as JSON, names the tensor that belongs there.
_TENSOR = "tensor:"
_ABSENT = object()

#: What DCP's own index of a checkpoint, a pickle, may be made of.
_NAMES = (
    *(
        (metadata, name)
        for name in (
            *("Metadata", "TensorStorageMetadata", "TensorProperties", "MetadataIndex", "_MEM_FORMAT_ENCODING"),
            *("ChunkStorageMetadata", "BytesStorageMetadata", "StorageMeta"),
        )
    ),
    (filesystem, "_StorageInfo"),
    (torch.serialization, "_get_layout"),
)
#: A name that some version lacks is not in its indices either; it must not keep everything else from being imported.
_HARMLESS = {
    *(found for module, name in _NAMES if (found := getattr(module, name, None)) is not None),
    torch.Size,
    pathlib.PosixPath,
    pathlib.WindowsPath,
}


class _Unpickler(pickle.Unpickler):
    """Reads DCP's index and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] in ("torch", "pathlib"):
            found = super().find_class(module, name)
            if found in _HARMLESS:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


class _Reader(dcp.FileSystemReader):
    """DCP's reader, with the index read by :class:`_Unpickler`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        index = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if getattr(index, "storage_meta", None) is None:
            index.storage_meta = metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _Writer(dcp.FileSystemWriter):
    """DCP's writer; says when this process's own file is complete."""

    def __init__(self, folder: Path, written: Callable[[], None]):
        # No copying ahead: for that DCP asks the first GPU for a stream, from a thread, and so makes a context on it.
        super().__init__(folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
        self._written = written

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        results = super().write_data(*args, **kwargs)
        self._written()
        return results


def flatten(state: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Part a nest of dicts, lists, tensors and JSON values into a tree of JSON values and the tensors by their path."""
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node
            return {_TENSOR: path}
        if isinstance(node, dict):
            return {str(key): visit(value, f"{path}/{key}" if path else str(key)) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [visit(value, f"{path}/{index}") for index, value in enumerate(node)]
        return node

    return visit(state, prefix), tensors


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The nest that :func:`flatten` took apart; tuples have become lists, tensors that are not given are missing."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors.get(tree[_TENSOR], _ABSENT)
        joined = {key: unflatten(value, tensors) for key, value in tree.items()}
        return {key: value for key, value in joined.items() if value is not _ABSENT}
    if isinstance(tree, list):
        return [value for item in tree if (value := unflatten(item, tensors)) is not _ABSENT]
    return tree


def write_tensors(
    folder: Path, tensors: dict[str, Tensor], group: "dist.ProcessGroup | None", written: Callable[[], None]
) -> None:
    """Write ``tensors`` into ``folder``; of several processes, each what it holds.

    Args:
        folder: where to.
        tensors: by name.
        group: the processes that write together; None in a run of one.
        written: called when this process's own file is complete.

    Raises:
        OSError: it could not be written; raised on every process, whichever failed.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        dcp.save(tensors, storage_writer=_Writer(folder, written), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise OSError(str(cause)) from error


def read_index(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in ``folder``.

    Raises:
        ValueError: the index is none.
    """
    try:
        stored = _Reader(folder).read_metadata().state_dict_metadata
        return {name: (entry.size, entry.properties.dtype) for name, entry in stored.items()}
    except Exception as error:  # a pickle that is none raises anything
        raise ValueError(f"its index is unreadable ({type(error).__name__}: {error})") from error


def read_tensors(folder: Path, tensors: dict[str, Tensor], group: "dist.ProcessGroup | None") -> None:
    """Fill ``tensors``, which may be cut up in another way than they were when written.

    Raises:
        ValueError: they cannot be read; raised on every process, whichever failed.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        dcp.load(tensors, storage_reader=_Reader(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"its tensors cannot be read ({type(cause).__name__}: {cause})") from error


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, write: Callable[[Path, Any], None], **content: Any) -> None:
    """Write what is no tensor, and checksums of all the rest, with ``write`` (path, JSON value)."""
    manifest = {"format": FORMAT, **content}
    write(folder / MANIFEST, {**manifest, "sha256": _digest(json.loads(json.dumps(manifest)))})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check what :func:`write_manifest` wrote.

    Raises:
        ValueError: missing, unreadable, altered.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        intact = manifest["sha256"] == _digest(manifest)
        known = isinstance(manifest["format"], int) and isinstance(manifest["version"], str)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is unreadable ({type(error).__name__})") from error
    if not intact or not known:
        raise ValueError(f"{MANIFEST} does not match its checksum")
    return manifest

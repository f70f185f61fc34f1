"""Files that are there completely or not at all, and their checksums."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from scalelong_fast.data.packed.format import FileRecord

_BLOCK = 1 << 22


def write_file(path: Path, data: np.ndarray | bytes) -> FileRecord:
    """Write bytes, or those of a contiguous array, to ``path``, which appears only once all of them are on disk."""
    view = _bytes_of(data)
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for start in range(0, len(view), _BLOCK):
                part = view[start : start + _BLOCK]
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return FileRecord(path.name, len(view), digest.hexdigest())


def record_of(name: str, data: np.ndarray | bytes) -> FileRecord:
    """What :func:`write_file` would give for a file called ``name``; nothing is written."""
    view = _bytes_of(data)
    return FileRecord(name, len(view), hashlib.sha256(view).hexdigest())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def _bytes_of(data: np.ndarray | bytes) -> memoryview:
    return memoryview(data).cast("B") if isinstance(data, bytes) else memoryview(data.reshape(-1).view(np.uint8))


def sync_folder(path: Path) -> None:
    """Make renames inside ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_BLOCK):
            digest.update(part)
    return digest.hexdigest()


def find_fault(folder: Path, record: FileRecord, content: bool) -> str | None:
    """What is wrong with a file of a set, as the rest of a sentence; None: nothing. ``content``: read it all."""
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"has {size} bytes instead of {record.bytes}"
        if content and sha256_of(path) != record.sha256:
            return "has another content than when it was written (SHA-256 differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def list_faults(folder: Path, records: Iterable[FileRecord]) -> list[tuple[FileRecord, str]]:
    """Files that are missing or of the wrong size, with what is wrong."""
    return [(record, fault) for record in records if (fault := find_fault(folder, record, content=False))]

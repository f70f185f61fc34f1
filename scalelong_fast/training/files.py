"""Files that are there complete or not at all."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fsync_directory(path: Path) -> None:
    """Make renames inside ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Call ``write`` with a binary file that takes the place of ``path`` only once it is complete and on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def fsync_file(path: Path) -> None:
    """Force what was written to ``path`` to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def hash_file(path: Path, tick: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of the content, in hexadecimal digits; ``tick`` is called after every block."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
            tick()
    return sha.hexdigest()

"""Pieces of long work whose results are kept, so that an interrupted analysis goes on where it stopped."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalelong_fast.analysis.finding import json_ready
from scalelong_fast.training.files import write_json
from scalelong_fast.version import __version__

#: When this process read its code, in seconds since 1970: what is changed in the files later does not act on it.
BEGUN = time.time()

#: What :meth:`Units.find` returns where nothing is kept; a result may be None.
MISSING = object()


class Units:
    """Results by what they depend on, one file each in a folder; nowhere, where there is none.

    Args:
        folder: created when the first result is kept; None: nothing is kept.

    Attributes:
        oldest: how old the code may be that computed the results so far, in seconds since 1970: :data:`BEGUN`, or that
            of the process which computed the oldest of the kept results that were used.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self.oldest = BEGUN

    def get(self, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """The result for ``key``: the kept one, or that of ``compute()``, which is then kept.

        Args:
            key: everything that the result depends on, JSON-ready. The version of the package is added.
            compute: its result must be JSON-ready.
        """
        value = self.find(key)
        if value is MISSING:
            value = compute()
            self.keep(key, value)
        return value

    def find(self, key: dict[str, Any]) -> Any:
        """The kept result for ``key``, or :data:`MISSING`."""
        if self.folder is None:
            return MISSING
        path, key = self._place(key)
        kept = self._read(path)
        if kept is None or kept.get("key") != key:
            return MISSING
        self.oldest = min(self.oldest, path.stat().st_mtime)
        return kept["value"]

    def keep(self, key: dict[str, Any], value: Any) -> None:
        """Keep a JSON-ready result for ``key``."""
        if self.folder is None:
            return
        path, key = self._place(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "value": value})
        os.utime(path, (BEGUN, BEGUN))

    def _place(self, key: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """The file of a result, and its key as the file has it."""
        assert self.folder is not None
        key = json_ready({**key, "version": __version__})
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{name}.json", key

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):  # not there, or damaged: it is computed anew
            return None
        return found if isinstance(found, dict) and "value" in found else None

"""Pieces of long work whose results are kept, so that an interrupted analysis goes on where it stopped."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalelong_fast.analysis.finding import json_ready
from scalelong_fast.training.files import write_json
from scalelong_fast.version import __version__

#: What :meth:`Units.find` returns where nothing is kept; a result may be None.
MISSING = object()


class Units:
    """Results by what they depend on, one file each in a folder; nowhere, where there is none.

    Args:
        folder: created when the first result is kept; None: nothing is kept.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder

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
        return kept["value"] if kept is not None and kept.get("key") == key else MISSING

    def keep(self, key: dict[str, Any], value: Any) -> None:
        """Keep a JSON-ready result for ``key``."""
        if self.folder is None:
            return
        path, key = self._place(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "value": value})

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

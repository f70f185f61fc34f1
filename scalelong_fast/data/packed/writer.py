"""Writing a packed set shard by shard, so that an interrupted preparation goes on where it stopped.

The journal holds one line of JSON for the plan and one for each finished shard. It stays beside the manifest, which can
be written anew from it. Where the source was mended meanwhile, or other settings were given before the first shard was
finished, another line has the plan that counts from there on.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scalelong_fast.data.packed.files import list_faults, record_of, sync_folder, write_file, write_json
from scalelong_fast.data.packed.format import (
    DTYPES,
    MANIFEST,
    NULL_TEXT,
    VERSION,
    Manifest,
    Plan,
    Shard,
    check_manifest,
    check_shard,
    manifest_to_dict,
    plan_to_dict,
    shard_from_dict,
)
from scalelong_fast.data.packed.verify import faults
from scalelong_fast.errors import UserError

JOURNAL = "journal.jsonl"

#: Entries of a plan that say where things lie and not what they are, which fingerprints do.
_PLACES = (".plan.source.path", ".plan.preparation.autoencoder.name", ".plan.preparation.text_encoder.name")

#: Entries that change where images of the source are mended or removed.
_IMAGES = {".plan.count", ".plan.source.images", ".plan.source.fingerprint"}


def begun_source(folder: Path) -> dict[str, Any]:
    """What the journal in ``folder`` says of the source that a preparation was begun with; empty: there is none."""
    try:
        with open(folder / JOURNAL, "rb") as journal:
            return dict(json.loads(journal.readline())["plan"]["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class PackedWriter:
    """The shards of a plan in a folder; a context manager that holds the folder for one process.

    Args:
        folder: made if needed.
        plan: what is packed.
        verify: read the shards back that are there already, and list the damaged ones in ``todo``, too.
        progress: show a progress bar while doing so.
        mark: a fingerprint of the images of these numbers, as the source has them. With it an unfinished preparation
            goes on after the source was mended, if no finished shard was made of what changed.

    Attributes:
        todo: shards that have still to be written, ascending.

    Raises:
        UserError: the folder holds files of something else, or another process is writing to it.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        verify: bool = False,
        progress: bool = False,
        mark: Callable[[range], str] | None = None,
    ):
        self.folder, self.plan, self._mark = folder, plan, mark
        self._begin()
        try:
            self._shards = self._read_journal()
            self.todo = self._missing(verify, progress)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "PackedWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._journal.close()

    def write_shard(self, index: int, arrays: dict[str, np.ndarray], skipped: Sequence[str] = ()) -> None:
        """Write one shard; it counts from the moment this returns.

        Args:
            index: of the shard.
            arrays: rows of each field, contiguous, of the dtypes in :data:`DTYPES` (bfloat16 as uint16).
            skipped: names of its images that have no row.

        Raises:
            UserError: the shard was there before and came out otherwise; nothing is written then.
            OSError: the disk is full; shards written before are untouched.
        """
        names = {field: self.plan.file_name(index, field) for field in self.plan.fields}
        for name, field in self.plan.fields.items():
            rows = arrays[name]
            if rows.dtype != DTYPES[field.dtype][1] or rows.shape[1:] != field.shape or not rows.flags.c_contiguous:
                raise ValueError(f"{name}: rows of {rows.dtype} {rows.shape[1:]} instead of {field}")
        count = len(self.plan.samples(index)) - len(skipped)
        old = self._shards.get(index)
        if old is not None:  # compared before anything is overwritten
            files = {field: record_of(name, arrays[field]) for field, name in names.items()}
            if Shard(count, files, tuple(skipped)) != old:
                changed = next((name for name in files if files[name] != old.files[name]), next(iter(files)))
                raise UserError(
                    f"OUT: {self.folder / names[changed]} would come out differently from the first time, so the "
                    "source has changed since or an encoder computes differently here; nothing was changed. Prepare "
                    "the set again into an empty folder."
                )
        files = {field: write_file(self.folder / name, arrays[field]) for field, name in names.items()}
        shard = Shard(count, files, tuple(skipped))
        check_shard(self.plan, index, shard)
        mark = {} if self._mark is None else {"source": self._mark(self.plan.samples(index))}
        self._append({"shard": index, **dataclasses.asdict(shard), **mark})
        self._shards[index] = shard
        self.todo.remove(index)

    def finish(self, null_text: np.ndarray | None = None) -> Manifest:
        """Write the manifest, once every shard is there; ``null_text``: uint16 (L, D), the bits of bfloat16."""
        assert not self.todo
        record = None if null_text is None else write_file(self.folder / NULL_TEXT, np.ascontiguousarray(null_text))
        shards = tuple(self._shards[index] for index in range(self.plan.num_shards))
        manifest = Manifest(self.plan, shards, record)
        check_manifest(manifest)
        write_json(self.folder / MANIFEST, manifest_to_dict(manifest))
        return manifest

    def _begin(self) -> None:
        """Make the folder and take hold of its journal."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"OUT: {str(self.folder)!r} is a file, expected a folder. Give another one.")
        journal = self.folder / JOURNAL
        if self.folder.is_dir() and not journal.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"OUT: {str(self.folder)!r} holds files that scalelong-fast prepare did not write; nothing was "
                "changed. Give an empty or a new folder."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = open(journal, "a+b")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise UserError(f"OUT: cannot write to {str(self.folder)!r} ({error}). Give another folder.") from error
        try:
            import fcntl

            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._journal.close()
            raise UserError(
                f"OUT: another process is preparing a set in {str(self.folder)!r}. Wait for it, or give another folder."
            ) from error
        except (ImportError, OSError):
            pass  # neither Windows nor every network file system has such locks

    def _read_journal(self) -> dict[int, Shard]:
        """Finished shards by index; starts the journal of an empty folder."""
        self._journal.seek(0)
        text = self._journal.read()
        complete = text[: text.rfind(b"\n") + 1]
        header, begun = {"version": VERSION, "plan": plan_to_dict(self.plan)}, {}
        shards: dict[int, Shard] = {}
        marks: dict[int, str | None] = {}
        try:
            for line in map(json.loads, complete.splitlines()):
                if "plan" in line or not begun:
                    begun = line
                    continue
                index = line.pop("shard")
                shards[index], marks[index] = shard_from_dict(line), line.get("source")
            as_begun = bool(complete) and self._is_the_same(begun, header, marks)
            for index, shard in shards.items():
                check_shard(self.plan, index, shard)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"OUT: the journal {self.folder / JOURNAL} is damaged ({type(error).__name__}: {error}). Prepare the "
                "set again into another folder."
            ) from error
        if len(complete) < len(text):  # the line that was being written when the process died
            self._journal.truncate(len(complete))
        if not as_begun:
            self._append(header)
        return shards

    def _is_the_same(self, old: dict[str, Any], new: dict[str, Any], marks: dict[int, str | None]) -> bool:
        """Whether the folder was begun with this plan; where the source and the encoders lie does not count.

        Args:
            old, new: what the journal has of the plan, and what it would have.
            marks: of the images of each finished shard.

        Returns:
            False where the plan is another one, and may be: nothing was packed yet, or the source was mended.

        Raises:
            UserError: it was begun with another one.
        """

        def flat(value: Any, name: str = "") -> dict[str, Any]:
            if not isinstance(value, dict) or not value:
                return {name: value}
            return {key: leaf for part, inner in value.items() for key, leaf in flat(inner, f"{name}.{part}").items()}

        was, now = flat(old), flat(new)
        changed = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name) and name not in _PLACES]
        if not changed:
            return True
        if not marks or (_IMAGES.issuperset(changed) and self._is_mended(marks)):
            return False
        changes = [
            f"{name.removeprefix('.plan.').lstrip('.')} was {was.get(name)!r}, now {now.get(name)!r}"
            for name in changed
        ]
        raise UserError(
            f"OUT: {str(self.folder)!r} was begun with other settings ({'; '.join(changes)[:600]}). Give the old "
            "ones again to go on with it, or another folder; nothing was changed."
        )

    def _is_mended(self, marks: dict[int, str | None]) -> bool:
        """Whether the set is unfinished, and each finished shard was made of images that are as they were."""
        mark = self._mark
        if mark is None or (self.folder / MANIFEST).exists():
            return False
        return all(mark(self.plan.samples(index)) == old for index, old in marks.items())

    def _missing(self, verify: bool, progress: bool) -> list[int]:
        records = {record.name: index for index, shard in self._shards.items() for record in shard.files.values()}
        listed = [record for shard in self._shards.values() for record in shard.files.values()]
        bad = faults(self.folder, listed, progress) if verify else [r.name for r, _ in list_faults(self.folder, listed)]
        damaged = {records[name] for name in bad}
        return [index for index in range(self.plan.num_shards) if index not in self._shards or index in damaged]

    def _append(self, value: dict[str, Any]) -> None:
        self._journal.write((json.dumps(value) + "\n").encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())
        sync_folder(self.folder)

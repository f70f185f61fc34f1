"""Checkpoints: written atomically by all processes together, checked when read, the last few kept."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from scalelong_fast.errors import UserError
from scalelong_fast.training.checkpoint_files import (
    FORMAT,
    flatten,
    read_index,
    read_manifest,
    read_tensors,
    unflatten,
    write_manifest,
    write_tensors,
)
from scalelong_fast.training.checkpoint_names import prepare, publish, remove, restore
from scalelong_fast.training.files import fsync_directory, hash_file, write_atomically, write_json
from scalelong_fast.training.ranks import Ranks
from scalelong_fast.training.writing import Pulse, Writing
from scalelong_fast.version import __version__

__all__ = ["CheckpointFolder", "fsync_directory", "write_atomically", "write_json"]

_NAME = re.compile(r"^step_(\d{9})$")


class CheckpointFolder:
    """The checkpoints of a run, folders ``step_<nine digits>`` in one folder.

    Args:
        path: the folder; created by the first save.
        keep: newest checkpoints kept.
        ranks: the processes that save and load together; this one alone by default.
        background: return from :meth:`save` once the state is copied, and write meanwhile.
    """

    def __init__(self, path: Path, keep: int = 2, ranks: Ranks | None = None, background: bool = False):
        self.path, self.keep, self.background = path, keep, background
        self.ranks = ranks or Ranks()
        self._writing: Writing | None = None

    def steps(self) -> list[int]:
        """Steps for which there is a checkpoint, ascending; its content is not looked at."""
        if not self.path.is_dir():
            return []
        return sorted(int(match[1]) for entry in self.path.iterdir() if (match := _NAME.match(entry.name)))

    def file(self, step: int) -> Path:
        """Where the checkpoint of ``step`` lies."""
        return self.path / f"step_{step:09d}"

    def restore_names(self) -> None:
        """Bring back a checkpoint that was hidden for another to take its place, which a crash then prevented."""
        restore(self.path)

    def save(self, step: int, state: dict[str, Any], then: Callable[[Pulse], None] | None = None) -> Path:
        """Write the checkpoint of ``step`` and drop the ones beyond ``keep``; every process must call it.

        A crash at any moment leaves either the old checkpoints or these and the complete new one. Waits for the save
        before this one, and with ``background`` not for this one: see :meth:`wait`.

        Args:
            step: number of finished steps.
            state: nest of dicts and lists; leaves are tensors and JSON values. Plain tensors are the same on all
                processes, DTensors lie on them in shares.
            then: what rank 0 is to write once the checkpoint is complete, in the same thread; what it touches must stay
                as it is until :meth:`wait` has returned.

        Raises:
            UserError: disk full or folder not writable, now or at the save before; earlier checkpoints are untouched.
            OSError: ``then`` raised it; raised on every process.
        """
        self.wait()
        tree, tensors = flatten(state)
        mine = self._my_part(tensors)
        tensors = {
            name: tensor.detach().to("cpu", copy=True) if self.background else tensor.detach()
            for name, tensor in mine.items()
        }
        self._writing = Writing(lambda pulse: self._write(step, tree, tensors, then, pulse), self.ranks)
        if not self.background:
            self.wait()
        return self.file(step)

    def wait(self) -> None:
        """Wait for the save under way, if there is one.

        Raises:
            UserError, OSError: what :meth:`save` raises, of that save.
        """
        if self._writing is not None:
            try:
                self._writing.wait()
            finally:
                if self._writing.done():  # else the wait was interrupted, and may be taken up again
                    self._writing = None

    def _my_part(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this process writes: its shares of DTensors, and of the tensors all have about as much as the others."""
        load = [0] * self.ranks.world
        mine = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                mine[name] = tensor
                continue
            writer = load.index(min(load))
            load[writer] += max(tensor.nbytes, 1)
            if writer == self.ranks.rank:
                mine[name] = tensor
        return mine

    def _write(
        self, step: int, tree: Any, tensors: dict[str, Tensor], then: Callable[[Pulse], None] | None, pulse: Pulse
    ) -> None:
        final = self.file(step)
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            self._together(lambda: prepare(self.path, temporary), main_only=True)
            pulse.passed(temporary)
            write_tensors(temporary, tensors, self.ranks.saving, lambda: pulse.passed(temporary))
            pulse.passed()
            own = self._together(lambda: self._hash_own(temporary, pulse))
            pulse.passed()
            hashes = {name: value for part in own for name, value in part.items()}
            facts = {"step": step, "version": __version__, "torch": torch.__version__, "world": self.ranks.world}

            def finish() -> None:
                write_manifest(temporary, write_json, **facts, files=hashes, state=tree)
                publish(temporary, final)
                for old in [s for s in self.steps() if s < step][: -self.keep + 1 or None]:
                    remove(self.file(old))

            self._together(finish, main_only=True)
        except OSError as error:
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            good = self.steps()
            kept = f"The checkpoint of step {good[-1]} is untouched" if good else "No checkpoint had been written yet"
            raise UserError(
                f"out: could not write {final} ({error}). {kept}. Free some space or make the folder writable, then "
                "run the same command again to go on."
            ) from error
        if then is not None:
            pulse.passed()
            self._together(lambda: then(pulse), main_only=True)

    def _hash_own(self, folder: Path, pulse: Pulse) -> dict[str, str]:
        """Checksums of the files that this process wrote."""
        names = [path.name for path in folder.glob(f"__{self.ranks.rank}_*")]
        names += [".metadata"] if self.ranks.is_main else []
        return {name: hash_file(folder / name, pulse.tick) for name in names}

    def _together(self, action: Callable[[], Any], main_only: bool = False) -> list[Any]:
        """Results of ``action`` on every process; an OSError of one is raised on all."""
        result, problem = None, None
        if self.ranks.is_main or not main_only:
            try:
                result = action()
            except OSError as error:
                problem = str(error)
        outcomes = self.ranks.gather((result, problem), group=self.ranks.saving)
        for _, told in outcomes:
            if told is not None:
                raise OSError(told)
        return [value for value, _ in outcomes]

    def load(self, step: int, template: dict[str, Any] | None = None) -> dict[str, Any]:
        """Read and verify one checkpoint; of several processes, every one must call it.

        Args:
            step: whose checkpoint.
            template: a state as :meth:`save` takes it, whose tensors are overwritten; they may be cut up in another
                way and on another number of processes than when saved. None: all tensors whole, on the CPU.

        Returns:
            The state. Parts of the template that were not saved are missing from it.

        Raises:
            ValueError: truncated or altered.
            UserError: written by another version, or of another model than the template's.
        """
        folder = self.file(step)
        manifest, index = self._verify(step, folder)
        if template is None:
            tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in index.items()}
            read_tensors(folder, tensors, None)
        else:
            _, wanted = flatten(template)
            self._check_fit(folder, manifest, index, wanted)
            tensors = {name: tensor.detach() for name, tensor in wanted.items() if name in index}
            read_tensors(folder, tensors, self.ranks.saving)
        return unflatten(manifest["state"], tensors)

    def _verify(self, step: int, folder: Path) -> tuple[dict[str, Any], dict[str, tuple[torch.Size, torch.dtype]]]:
        """Manifest and index, once every file has been compared with the manifest; each process reads some of them."""
        manifest, index, problem = None, {}, None
        try:
            manifest = read_manifest(folder)
            if manifest["format"] == FORMAT:
                if manifest["step"] != step:
                    raise ValueError(f"it is that of step {manifest['step']}")
                for number, (name, sha) in enumerate(sorted(manifest["files"].items())):
                    self.ranks.beat()
                    if number % self.ranks.world == self.ranks.rank and hash_file(folder / name) != sha:
                        raise ValueError(f"{name} does not match its checksum")
                index = read_index(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = str(error) if isinstance(error, (OSError, ValueError)) else type(error).__name__
        for told in self.ranks.gather(problem):
            if told is not None:
                raise ValueError(told)
        assert manifest is not None
        if manifest["format"] != FORMAT:
            raise self._foreign(folder, f"format {manifest['format']}", f"scalelong_fast {manifest['version']}")
        return manifest, index

    def _foreign(self, what: Path, found: str, writer: str) -> UserError:
        return UserError(
            f"out: {what} is of {found}, written by {writer}; this is scalelong_fast {__version__}, which reads format "
            f"{FORMAT}. Go on with the version that wrote it, or start a new run in another --out. Nothing was changed."
        )

    def _check_fit(self, folder: Path, manifest: dict, index: dict, wanted: dict[str, Tensor]) -> None:
        """Raise unless every tensor of the parts that were saved is there, in its shape."""
        saved = {_part(name) for name in index}
        wrong = [name for name in wanted if _part(name) in saved and name not in index]
        wrong += [name for name, tensor in wanted.items() if name in index and index[name][0] != tensor.shape]
        if wrong:
            raise UserError(
                f"out: {folder}, written by scalelong_fast {manifest['version']}, does not fit the model of this one "
                f"({__version__}): {len(wrong)} tensors are missing or of another shape, among them {wrong[0]}. Go on "
                "with the version that wrote it, or start a new run in another --out. Nothing was changed."
            )

    def check_readable(self) -> None:
        """Raise where there are checkpoints, but only of a format that is no longer read."""
        old = sorted(self.path.glob("step_*.pt")) if self.path.is_dir() else []
        if old and not self.steps():
            raise self._foreign(old[-1], "format 1", "an earlier scalelong_fast")

    def load_latest(
        self, report: Callable[[str], None], template: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """Read the newest good checkpoint; of several processes, every one must call it.

        Args:
            report: called with a line about each damaged checkpoint that is passed over.
            template: see :meth:`load`.

        Returns:
            (step, state), or None where there is no checkpoint at all.

        Raises:
            UserError: there are checkpoints, and every one is damaged; or what :meth:`load` raises.
        """
        self.check_readable()
        steps = self.ranks.broadcast(self.steps())
        for step in reversed(steps):
            try:
                return step, self.load(step, template)
            except ValueError as error:
                if isinstance(error, UserError):
                    raise
                report(f"Checkpoint {self.file(step)} is damaged: {error}. Trying the previous one.")
        if steps:
            raise UserError(
                f"out: all {len(steps)} checkpoints in {self.path} are damaged. Restore one from a backup, or move the "
                "folder away to start the run anew."
            )
        return None


def _part(name: str) -> str:
    """The part of the state that a tensor belongs to: the first two steps of its path."""
    return "/".join(name.split("/")[:2])

"""Checkpoints: written atomically, checked when read, the last few kept."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalelong_fast.errors import UserError

FORMAT = 1
_NAME = re.compile(r"^step_(\d{9})\.pt$")


def digest(tree: Any) -> str:
    """SHA-256 over a nest of dicts, lists, tensors and plain values; equal for equal content."""
    sha = hashlib.sha256()

    def feed(node: Any) -> None:
        # Lengths and separators: [1, 23], [12, 3] and [123] must not read the same.
        if isinstance(node, dict):
            sha.update(f"dict {len(node)};".encode())
            for key in sorted(node, key=str):
                sha.update(f"{key!r}:".encode())
                feed(node[key])
        elif isinstance(node, (list, tuple)):
            sha.update(f"list {len(node)};".encode())
            for item in node:
                feed(item)
        elif isinstance(node, Tensor):
            tensor = node.detach().cpu().contiguous()
            sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
        else:
            sha.update(f"{node!r};".encode())

    feed(tree)
    return sha.hexdigest()


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


class CheckpointFolder:
    """The checkpoints of a run, ``step_<nine digits>.pt`` in one folder.

    Args:
        path: the folder; created by the first save.
        keep: newest checkpoints kept.
    """

    def __init__(self, path: Path, keep: int = 2):
        self.path, self.keep = path, keep

    def steps(self) -> list[int]:
        """Steps for which there is a file, ascending; its content is not looked at."""
        if not self.path.is_dir():
            return []
        return sorted(int(match[1]) for entry in self.path.iterdir() if (match := _NAME.match(entry.name)))

    def file(self, step: int) -> Path:
        """Where the checkpoint of ``step`` lies."""
        return self.path / f"step_{step:09d}.pt"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of ``step`` and drop the ones beyond ``keep``.

        A crash at any moment leaves either the old files or the old files and the complete new one.

        Raises:
            UserError: disk full or folder not writable; earlier checkpoints are untouched.
        """
        content = {"format": FORMAT, "step": step, "state": state}
        content["sha256"] = digest(content)
        path = self.file(step)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob(".step_*.tmp"):
                leftover.unlink()
            write_atomically(path, lambda file: torch.save(content, file))
            for old in [s for s in self.steps() if s < step][: -self.keep + 1 or None]:
                self.file(old).unlink()
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            good = self.steps()
            kept = f"The checkpoint of step {good[-1]} is untouched" if good else "No checkpoint had been written yet"
            raise UserError(
                f"out: could not write {path} ({error}). {kept}. Free some space or make the folder writable, then run "
                "the same command again to go on."
            ) from error
        return path

    def load(self, step: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Read and verify one checkpoint.

        Raises:
            ValueError: truncated, altered, or of another format.
        """
        try:
            content = torch.load(self.file(step), map_location="cpu", weights_only=True)
            stored = content.pop("sha256")
            intact = stored == digest(content) and content["step"] == step
        except Exception as error:  # a torn file raises anything from EOFError to UnpicklingError
            raise ValueError(f"unreadable ({type(error).__name__})") from error
        if not intact:
            raise ValueError("its content does not match its checksum")
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        return content["state"]

    def load_latest(self, report: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
        """Read the newest good checkpoint.

        Args:
            report: called with a line about each damaged checkpoint that is passed over.

        Returns:
            (step, state), or None where there is no checkpoint at all.

        Raises:
            UserError: there are checkpoints, and every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return step, self.load(step)
            except ValueError as error:
                report(f"Checkpoint {self.file(step)} is damaged: {error}. Trying the previous one.")
        if steps:
            raise UserError(
                f"out: all {len(steps)} checkpoints in {self.path} are damaged. Restore one from a backup, or move the "
                "folder away to start the run anew."
            )
        return None

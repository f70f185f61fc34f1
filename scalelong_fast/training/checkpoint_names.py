"""The names of checkpoints on their way: hidden until complete, hidden again before they are taken away."""

import contextlib
import os
import shutil
from pathlib import Path

from scalelong_fast.training.files import fsync_directory


def restore(path: Path) -> None:
    """Give checkpoints in ``path`` their names back where a crash came between the two renames of :func:`publish`."""
    for leftover in path.glob(".step_*.old"):
        replaced = path / leftover.name.removeprefix(".").removesuffix(".old")
        if not replaced.exists():
            os.rename(leftover, replaced)


def prepare(path: Path, temporary: Path) -> None:
    """Make the folder ``temporary`` to write into, and clear away what a crash left in ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    restore(path)
    for leftover in path.glob(".step_*"):
        # What somebody still holds open may stay (NFS); nothing of it is ever read.
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    temporary.mkdir(exist_ok=True)


def publish(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name, in the place of one that has it already."""
    fsync_directory(temporary)
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    fsync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Take a checkpoint away; first its name, so that no half of it is ever found under it.

    What cannot be removed stays, hidden, for the next :func:`prepare`: that is no reason to end a run.
    """
    doomed = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)

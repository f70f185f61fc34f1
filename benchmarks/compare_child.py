"""Two versions of the package in two processes: files of a commit, and the process that times them."""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from scalelong_fast.errors import UserError, invalid

WORKER = Path(__file__).with_name("compare_worker.py")


class ChildError(RuntimeError):
    """A side's process ended by itself."""


def git(root: Path, *args: str) -> str:
    """Output of a git command in ``root``.

    Raises:
        UserError: git is missing or the command fails.
    """
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("git is not installed, and comparing commits needs it. Install git.") from error
    if done.returncode:
        raise UserError(f"git {' '.join(args[:2])} failed in {root}: {done.stderr.strip()}")
    return done.stdout


def commit_of(root: Path, argument: str, name: str) -> str:
    """The hash of a commit, by any name that git knows it by.

    Raises:
        UserError: there is no such commit.
    """
    git(root, "rev-parse", "--git-dir")
    try:
        return git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").strip()
    except UserError:
        raise invalid(argument, name, "a commit of this repository", "git log --oneline lists them.") from None


def extract(root: Path, commit: str, folder: Path) -> Path:
    """Write the files of a commit into ``folder``; index, branches and working tree of ``root`` stay as they are."""
    folder.mkdir(parents=True)
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        git(root, "archive", "--format=tar", "-o", archive.name, commit)
        with tarfile.open(archive.name) as files:
            files.extractall(folder, filter="data")
    return folder


class Child:
    """A process with one version of the package; a context manager that ends it.

    Args:
        side: its name in messages.
        root: the folder that ``scalelong_fast`` is imported from.
        device: where it computes.
        folder: an empty folder for it, away from every repository.
    """

    def __init__(self, side: str, root: Path, device: str, folder: Path):
        self.side = side
        folder.mkdir(parents=True)
        script = folder / "worker.py"  # beside no module that it could import by mistake
        script.write_text(WORKER.read_text(encoding="utf-8"), encoding="utf-8")
        self._log = folder / "log.txt"
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environment.get("PYTHONPATH"))))
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script), device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=environment,
                encoding="utf-8",
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Have the process do something, and wait for its answer.

        Raises:
            ChildError: the process is gone.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ChildError(f"the process of {self.side} ended with code {code}: {' | '.join(lines[-3:])}")
        return json.loads(line)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

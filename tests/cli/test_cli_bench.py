"""``scalelong-fast bench`` finds the benchmarks beside the package, and says where they are where it does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import scalelong_fast
from benchmarks.__main__ import COMMANDS
from scalelong_fast import cli
from scalelong_fast.cli import bench
from scalelong_fast.errors import UserError

ROOT = Path(scalelong_fast.__file__).resolve().parents[1]


def test_it_lists_the_commands_of_the_benchmarks(capsys):
    assert cli.main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_an_error_is_that_of_the_benchmarks(capsys):
    assert cli.main(["bench", "setp"]) == 2
    assert "Did you mean 'step'" in capsys.readouterr().err


def test_an_installed_package_says_how_to_get_them(tmp_path):
    with pytest.raises(UserError, match="Clone it"):
        bench.main(["ops"], root=tmp_path)


def test_another_projects_benchmarks_are_not_taken(tmp_path):
    other = tmp_path / "benchmarks"
    other.mkdir()
    (other / "__init__.py").write_text("raise AssertionError('not ours')\n")
    run = "from scalelong_fast.cli import main; raise SystemExit(main(['bench', '--help']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m benchmarks COMMAND" in done.stdout

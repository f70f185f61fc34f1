"""The screen of the benchmarks, with rich and without."""

import os
import subprocess
import sys

import pytest

from benchmarks.environment import ROOT
from benchmarks.screen import Screen, quiet


def test_what_is_written_to_stderr_meanwhile_is_lost_and_later_is_not(capfd):
    with quiet():
        os.write(2, b"note of a C++ library")
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_stderr_is_back_after_an_error(capfd):
    with pytest.raises(RuntimeError), quiet():
        raise RuntimeError
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_a_table_is_plain_text_where_rich_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.screen.Console", None)
    screen = Screen()
    screen.table("Title", ("name", "ms"), [["a", "1.5"]])
    screen.print("done")
    out = capsys.readouterr().out
    assert "Title" in out
    assert "1.5" in out
    assert "│" not in out
    assert out.endswith("done\n")


COMMANDS = ["loader", "scaling", "uvit", "inference", "curves", "attention"]

WITHOUT_RICH = """
import importlib, sys
sys.modules["rich"] = sys.modules["rich.console"] = None
for command in sys.argv[1:]:
    try:
        importlib.import_module(f"benchmarks.{command}").main(["--help"])
    except SystemExit as end:
        assert end.code == 0, command
"""


def test_commands_need_no_rich():
    code = [sys.executable, "-c", WITHOUT_RICH, *COMMANDS]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    usages = [line.split()[4] for line in done.stdout.splitlines() if line.startswith("usage: python -m benchmarks ")]
    assert usages == COMMANDS

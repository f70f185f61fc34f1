"""docs/analysis.md: its code runs, and its commands and options exist."""

import re
from pathlib import Path

import pytest

from scalelong_fast.cli.analyze import ANALYSES

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text()


def test_the_code_runs(page, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "digits, 6 long skips: κ from" in capsys.readouterr().out
    assert (tmp_path / "runs" / "analysis" / "suggest-kappa.svg").is_file()


def test_every_analysis_is_on_the_page_and_no_other(page):
    assert set(re.findall(r"scalelong-fast analyze ([a-z-]+)", page)) == {*ANALYSES, "all"}

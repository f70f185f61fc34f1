"""docs/your-unet.md: its code runs, and what it says is printed is what is printed."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-unet.md"


def test_the_page_runs_and_prints_what_it_says(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace, printed, compared = {"__name__": "page"}, "", 0
    for kind, text in re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M):
        if kind == "python":
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream):
                exec(compile(text, PAGE.name, "exec"), namespace)
            printed = stream.getvalue()
        else:
            assert [line.rstrip() for line in text.splitlines()] == [line.rstrip() for line in printed.splitlines()]
            compared += 1
    assert compared == 3

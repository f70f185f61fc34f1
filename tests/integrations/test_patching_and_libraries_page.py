"""docs/patching-and-libraries.md: its code runs."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "patching-and-libraries.md"


def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), PAGE.name, "exec"), {"__name__": "page"})

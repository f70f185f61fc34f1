"""docs/patching.md: its code runs."""

import re
from pathlib import Path

import pytest
import torch

from scalelong_fast.integrations.patching.adapters import registry

PAGE = Path(__file__).resolve().parents[2] / "docs" / "patching.md"


def test_the_page_runs(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) == 2
    for text in blocks:
        exec(compile(text, PAGE.name, "exec"), namespace)

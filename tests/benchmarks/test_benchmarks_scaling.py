"""``python -m benchmarks scaling``: the teams take the same steps, and the table shows what sharing them costs."""

import functools
import json

import pytest

from benchmarks import report, scaling
from benchmarks.__main__ import main
from scalelong_fast.models import UViTConfig

TOY = UViTConfig(img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=11, scaling="ls")


@pytest.fixture
def toy(monkeypatch):
    measured = scaling.environment.ceilings
    monkeypatch.setattr(scaling.environment, "ceilings", lambda device: measured(device, seconds=0.01))
    monkeypatch.setattr(scaling, "MODELS", {"toy": (TOY, 8)})
    # DDP has as many processes as FSDP and differs in a word of the configuration.
    monkeypatch.setattr(scaling, "measure", functools.partial(scaling.measure, kinds=("one process", "FSDP")))


def test_the_command_writes_a_record_for_each_team_and_report_takes_it(toy, tmp_path, capsys):
    out = tmp_path / "results" / "machine" / "scaling.json"
    args = ["--rounds", "2", "--steps", "2", "--models", "toy", "--out", str(out)]
    assert main(["scaling", *args]) == 0
    assert "FSDP, 2 processes of 1 thread" in capsys.readouterr().out.replace("\n", " ")
    result = json.loads(out.read_text())
    assert [record["variant"] for record in result["records"]] == ["one process", "FSDP"]
    assert [(r["processes"], r["threads_each"]) for r in result["records"]] == [(1, 2), (2, 1)]
    assert result["records"][0]["ratio_to_one"] == 1
    for record in result["records"]:
        assert record["images_per_second"] == pytest.approx(8 / record["median_us"] * 1e6, rel=1e-3)
        assert record["source_sha256"] == scaling.environment.source_hash(record["sources"])
    text = report.render("scaling", tmp_path / "results")
    assert "| toy, batch 8: one process, 2 threads | " in text


def test_threads_are_shared_equally(capsys):
    assert main(["scaling", "--threads", "3"]) == 2
    assert "--threads: got 3, expected a multiple of --processes (2)" in capsys.readouterr().err


def test_teams_take_the_same_batch_together():
    one, *others = (scaling.team_of(TOY, 8, kind, world=2, threads=4) for kind in ("one process", "DDP", "FSDP"))
    assert (one.world, one.threads) == (1, 4)
    assert [several.config.train.parallel for several in others] == ["ddp", "fsdp"]
    for several in others:
        assert (several.world, several.threads) == (2, 2)
        assert one.config.train.batch_size == several.config.train.batch_size == 8
        assert one.config.model == several.config.model

"""``python -m benchmarks uvit`` on a tiny model."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import environment, model_steps, report, uvit
from benchmarks.__main__ import main
from benchmarks.screen import Screen
from scalelong_fast.models import UViT, UViTConfig

TINY = UViTConfig(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=4, reduction=4, attention="math")
LABELLED = dataclasses.replace(TINY, num_classes=5)
OURS = ("none_cat", "ls_cat", "none_fused", "ls_fused")


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    measured = environment.ceilings
    monkeypatch.setattr(environment, "ceilings", lambda device: measured(device, seconds=0.005))


def run(out, models, *args, **kwargs):
    args = ("--device", "cpu", "--rounds", "2", "--batch-size", "2", "--out", str(out), *args)
    return uvit.main(args, models=models, **kwargs)


def test_the_file_has_every_recipe_and_report_takes_it(tmp_path, capsys):
    out = tmp_path / "results" / "machine" / "uvit.json"
    assert run(out, {"tiny": TINY}) == 0
    assert run(out, {"labelled": LABELLED}) == 0
    records = json.loads(out.read_text())["records"]
    found = {model: [r for r in records if r["model"] == model] for model in ("tiny", "labelled")}
    assert [r["variant"] for r in found["tiny"]] == list(uvit.RECIPES), "the first model's records are kept"
    assert [r["variant"] for r in found["labelled"]] == list(OURS), "the authors' recipe here is unconditional"
    for record in records:
        assert record["direction"] == "step"
        assert record["shape"] == [2, 3, 8, 8]
        assert record["rel_error"] < model_steps.TOLERANCE
        assert record["p20_us"] <= record["median_us"] <= record["p80_us"]
        assert record["source_sha256"] == environment.source_hash(record["sources"])
        assert 0 < record["mfu"] < 1
    by_name = {record["variant"]: record for record in found["tiny"]}
    assert by_name["ls_fused"]["fused"] is True
    assert by_name["none_cat"]["time_over_none_cat"] == 1
    assert by_name["authors"]["time_over_none_fused"] > 0
    assert found["labelled"][0]["time_over_authors"] is None
    assert "kernels/dual_gemm.py" in by_name["ls_fused"]["sources"]

    assert "ls_fused" in capsys.readouterr().out
    table = report.render("uvit", tmp_path / "results")
    assert "| tiny | ls_fused |" in table
    assert "tiny: LS, fused, takes " in table
    assert "**No GPU measurement yet.**" in table


def test_all_recipes_start_from_equal_weights():
    bench = uvit.Bench(TINY, torch.device("cpu"), batch_size=2, compiled=False)
    with torch.no_grad():
        losses = {name: float(bench.build(recipe)[1]()) for name, recipe in uvit.RECIPES.items()}
    assert losses["ls_cat"] == pytest.approx(losses["ls_fused"], rel=2e-2)
    assert losses["ls_cat"] == pytest.approx(losses["authors"], rel=2e-2)
    assert losses["none_cat"] == pytest.approx(losses["none_fused"], rel=2e-2)


def test_the_fused_option_reaches_the_model():
    bench = uvit.Bench(LABELLED, torch.device("cpu"), batch_size=2, compiled=False)
    assert bench._model("ls", fused=True).config.fused is True
    assert bench._model("none", fused=False).config.fused is False


def test_a_recipe_with_another_loss_stops_the_benchmark(tmp_path, monkeypatch, capsys):
    build = uvit.Bench.build

    def wrong(self, recipe):
        take, probe = build(self, recipe)
        return take, (lambda: 1.05 * probe()) if recipe.fused else probe

    monkeypatch.setattr(uvit.Bench, "build", wrong)
    out = tmp_path / "uvit.json"
    assert run(out, {"tiny": TINY}, names=("none_cat", "none_fused")) == 1
    assert "none_fused: with equal weights" in capsys.readouterr().out
    assert not out.exists()


def test_other_settings_begin_a_new_file(tmp_path):
    out = tmp_path / "uvit.json"
    run(out, {"a": TINY}, names=("none_cat",))
    run(out, {"b": TINY}, "--steps", "2", names=("none_cat",))
    assert {record["model"] for record in json.loads(out.read_text())["records"]} == {"b"}


@pytest.mark.parametrize("config", [TINY, LABELLED, dataclasses.replace(TINY, depth=4, embed_dim=64)])
def test_flop_are_those_that_pytorch_counts(config):
    config = dataclasses.replace(config, scaling="none", fused=False, conv=False)
    model = UViT(config)
    labels = torch.zeros(2, dtype=torch.int64) if config.num_classes > 0 else None
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 8, 8, requires_grad=True), torch.rand(2), labels).sum().backward()
    assert 2 * uvit.training_flop(config) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "U-ViT-S2"], "Did you mean 'U-ViT-S/2"),
        (["--model", "U-ViT-L/4"], "on this device"),
        (["--rounds", "0"], "--rounds"),
        (["--device", "cdua"], "expected auto"),
    ],
)
def test_bad_values_are_refused(args, message, capsys):
    assert main(["uvit", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_is_given_the_published_models():
    models = uvit._models(torch.device("cuda"))
    sizes = {label: (c.num_tokens, c.embed_dim, c.num_skips) for label, c in models.items()}
    assert sizes == {"U-ViT-S/2": (257, 512, 6), "U-ViT-M/4": (258, 768, 8), "U-ViT-L/4": (258, 1024, 10)}
    assert Screen().width > 0

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
WORDED = dataclasses.replace(TINY, clip_dim=6, num_clip_token=3)
#: Nothing is compiled on a CPU unless it is asked for.
EAGER = [f"{kind}_{scaling}" for scaling in ("ls", "none", "cs") for kind in ("authors", "eager", "ours")]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    measured = environment.ceilings
    monkeypatch.setattr(environment, "ceilings", lambda device: measured(device, seconds=0.005))
    monkeypatch.setattr(model_steps, "WARM_UP_STEPS", 1)


def run(out, models, *args, **kwargs):
    args = ("--device", "cpu", "--rounds", "2", "--batch-size", "2", "--out", str(out), *args)
    return uvit.main(args, models=models, **kwargs)


def test_the_file_has_every_recipe_and_report_takes_it(tmp_path, capsys):
    out = tmp_path / "results" / "machine" / "uvit.json"
    assert run(out, {"tiny": TINY}) == 0
    assert run(out, {"labelled": LABELLED}, names=("authors_cs", "ours_cs")) == 0
    records = json.loads(out.read_text())["records"]
    found = {model: [r for r in records if r["model"] == model] for model in ("tiny", "labelled")}
    assert [(r["direction"], r["variant"]) for r in found["tiny"]] == [
        (direction, name) for direction in model_steps.DIRECTIONS for name in EAGER
    ], "the first model's records are kept"
    assert [r["variant"] for r in found["labelled"]] == 3 * ["authors_cs", "ours_cs"]
    for record in records:
        assert record["shape"] == [2, 3, 8, 8]
        assert record["rel_error"] < model_steps.TOLERANCE
        assert record["peak_mib"] > 0
        assert record["host_us"] is None, "a CPU computes while the host waits"
        assert record["p20_us"] <= record["median_us"] <= record["p80_us"]
        assert record["source_sha256"] == environment.source_hash(record["sources"])
        assert 0 < record["mfu"] < 1
    by_name = {record["variant"]: record for record in found["tiny"] if record["direction"] == "step"}
    forward = next(r for r in found["tiny"] if (r["direction"], r["variant"]) == ("fwd", "ours_ls"))
    assert 3 * forward["flop"] == by_name["ours_ls"]["flop"]
    assert by_name["ours_ls"]["fused"] is True
    assert by_name["eager_none"]["time_over_eager"] == by_name["eager_none"]["time_over_no_scaling"] == 1
    assert by_name["authors_ls"]["time_over_eager"] > 0
    assert by_name["authors_ls"]["time_over_compile"] is None
    assert "kernels/dual_gemm.py" in by_name["ours_ls"]["sources"]

    assert "ours_ls" in capsys.readouterr().out
    table = report.render("uvit", tmp_path / "results")
    assert "| tiny | ours_ls |" in table
    assert "| MFU |" in table
    assert "**No GPU measurement yet.**" in table


def test_all_recipes_start_from_equal_weights():
    bench = uvit.Bench(TINY, torch.device("cpu"), batch_size=2, compiled=False)
    with torch.no_grad():
        losses = {name: float(bench.build(uvit.RECIPES[name]).loss()) for name in EAGER}
    for scaling in ("ls", "none", "cs"):
        plain = losses[f"eager_{scaling}"]
        assert losses[f"ours_{scaling}"] == pytest.approx(plain, rel=2e-2)
        assert losses[f"authors_{scaling}"] == pytest.approx(plain, rel=2e-2)


def test_every_published_model_has_the_authors_recipe():
    """On a GPU; text is what their networks for images do not know."""
    cuda = torch.device("cuda")
    assert all(c.clip_dim == 0 and not c.mlp_time_embed for c in uvit._models(cuda).values())
    bench = uvit.Bench(WORDED, torch.device("cpu"), batch_size=2, compiled=True)
    able = [name for name, recipe in uvit.RECIPES.items() if uvit.SUITE.able(bench, recipe)]
    assert not any(name.startswith("authors") for name in able)
    assert len(able) == 12


def test_gradients_are_forgotten_and_steps_are_taken():
    bench = uvit.Bench(TINY, torch.device("cpu"), batch_size=2, compiled=False)
    built = bench.build(uvit.RECIPES["ours_ls"])
    calls = model_steps.calls_of(built, ("fwd", "fwd_bwd", "step"))
    before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    for direction in ("fwd", "fwd_bwd"):
        calls[direction]()
        assert all(p.grad is None for p in built.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in built.model.named_parameters())
    for _ in range(3):
        calls["step"]()
    assert any(not torch.equal(p, before[name]) for name, p in built.model.named_parameters())


def test_the_fused_option_reaches_the_model():
    bench = uvit.Bench(LABELLED, torch.device("cpu"), batch_size=2, compiled=False)
    assert bench._model("ls", fused=True).config.fused is True
    assert bench._model("none", fused=False).config.fused is False


def test_a_recipe_with_another_loss_stops_the_benchmark(tmp_path, monkeypatch, capsys):
    build = uvit.Bench.build

    def wrong(self, recipe):
        built = build(self, recipe)
        return built._replace(loss=lambda: 1.05 * built.loss()) if recipe.fused else built

    monkeypatch.setattr(uvit.Bench, "build", wrong)
    out = tmp_path / "uvit.json"
    assert run(out, {"tiny": TINY}, names=("eager_none", "ours_none")) == 1
    assert "ours_none: with equal weights" in capsys.readouterr().out
    assert not out.exists()


def test_other_settings_begin_a_new_file(tmp_path):
    out = tmp_path / "uvit.json"
    run(out, {"a": TINY}, "--direction", "step", names=("eager_none",))
    run(out, {"b": TINY}, "--direction", "step", "--steps", "2", names=("eager_none",))
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
        (["--seconds", "-1"], "--seconds"),
        (["--direction", "fwdbwd"], "Did you mean 'fwd_bwd'"),
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

"""``python -m benchmarks uvit`` on a tiny model."""

import dataclasses
import functools
import json
import types
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import environment, model_check, model_steps, report, step_calls, uvit
from benchmarks.__main__ import main
from benchmarks.screen import Screen
from scalelong_fast.errors import UserError
from scalelong_fast.models import UViT, UViTConfig

TINY = UViTConfig(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=4, reduction=4, attention="math")
LABELLED = dataclasses.replace(TINY, num_classes=5)
WORDED = dataclasses.replace(TINY, clip_dim=6, num_clip_token=3)
#: Nothing is compiled on a CPU unless it is asked for.
EAGER = [f"{kind}_{scaling}" for scaling in ("none", "ls", "cs") for kind in ("eager", "ours", "authors")]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    measured = environment.ceilings
    monkeypatch.setattr(environment, "ceilings", lambda device: measured(device, seconds=0.005))
    monkeypatch.setattr(step_calls, "WARM_UP_STEPS", 1)


def run(out, models, *args, **kwargs):
    args = ("--device", "cpu", "--rounds", "2", "--batch-size", "2", "--out", str(out), *args)
    return uvit.main(args, models=models, **kwargs)


def test_the_file_has_every_recipe_and_report_takes_it(tmp_path, capsys):
    out = tmp_path / "results" / "machine" / "uvit.json"
    assert run(out, {"tiny": TINY}) == 0
    assert run(out, {"labelled": LABELLED}, names=("ours_cs", "authors_cs")) == 0
    records = json.loads(out.read_text())["records"]
    found = {model: [r for r in records if r["model"] == model] for model in ("tiny", "labelled")}
    assert [(r["direction"], r["variant"]) for r in found["tiny"]] == [
        (direction, name) for direction in step_calls.DIRECTIONS for name in EAGER
    ], "the first model's records are kept"
    assert [r["variant"] for r in found["labelled"]] == 3 * ["ours_cs", "authors_cs"]
    for record in records:
        assert record["shape"] == [2, 3, 8, 8]
        assert record["rel_error"] < 0.05, "bf16, if anything"
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
    calls = step_calls.calls_of(built, ("fwd", "fwd_bwd", "step"))
    before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    for direction in ("fwd", "fwd_bwd"):
        calls[direction]()
        assert all(p.grad is None for p in built.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in built.model.named_parameters())
    for _ in range(3):
        calls["step"]()
    assert any(not torch.equal(p, before[name]) for name, p in built.model.named_parameters())


def test_the_gradients_that_the_authors_leave_are_gone_after_another_direction():
    bench = uvit.Bench(TINY, torch.device("cpu"), batch_size=2, compiled=False)
    built = bench.build(uvit.RECIPES["authors_ls"])
    calls = step_calls.calls_of(built, ("fwd_bwd", "step"))
    calls["step"]()
    assert any(p.grad is not None for p in built.model.parameters())
    calls["fwd_bwd"]()
    assert all(p.grad is None for p in built.model.parameters())


def test_the_fused_option_reaches_the_model():
    bench = uvit.Bench(LABELLED, torch.device("cpu"), batch_size=2, compiled=False)
    assert bench._model("ls", fused=True).config.fused is True
    assert bench._model("none", fused=False).config.fused is False


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("kind", "taken"), [("ours", "cs"), ("ours", "none"), ("authors", "cs")])
def test_a_recipe_of_another_scaling_is_refused(kind, taken, precision):
    class Bench(uvit.Bench):
        def _train(self, compiled):
            return dataclasses.replace(super()._train(compiled), precision=precision)

    bench = Bench(dataclasses.replace(TINY, depth=4), torch.device("cpu"), 2, False)
    name = f"{kind}_ls"
    recipe = uvit.RECIPES[name]
    errors = bench.check(name, recipe, bench.build(recipe))
    assert max(errors) < (1e-5 if precision == "fp32" else 0.03)
    wrong = bench.build(uvit.RECIPES[f"{kind}_{taken}"])
    with pytest.raises(model_check.LossMismatchError, match=f"{name}: .* of its prediction"):
        bench.check(name, recipe, wrong)
    right = bench.build(recipe)
    with pytest.raises(model_check.LossMismatchError, match=f"{name}: .* of its gradients"):
        bench.check(name, recipe, wrong._replace(predict=right.predict))


def test_both_steps_draw_times_and_noise_themselves():
    bench = uvit.Bench(TINY, torch.device("cpu"), batch_size=2, compiled=False)

    def first_loss(name, seed):
        built = bench.build(uvit.RECIPES[name])
        torch.manual_seed(seed)
        return float(built.take())

    for name in ("authors_ls", "ours_ls", "eager_ls"):
        assert first_loss(name, 1) == first_loss(name, 1) != first_loss(name, 2), name


def test_memory_is_read_without_gradients_left_from_the_last_call(monkeypatch):
    bench = uvit.Bench(TINY, torch.device("cpu"), batch_size=2, compiled=False)
    built = bench.build(uvit.RECIPES["authors_ls"])
    monkeypatch.setattr(bench, "build", lambda recipe: built)
    held = []

    def look(call, device):
        held.extend(p.grad for p in built.model.parameters() if p.grad is not None)
        return 0

    monkeypatch.setattr(step_calls, "peak_bytes", look)
    step_calls.prepare(bench, "authors_ls", uvit.RECIPES["authors_ls"])
    assert held == []
    assert all(p.grad is None for p in built.model.parameters())


def test_models_after_the_first_are_compiled_too(tmp_path, monkeypatch):
    """Forms of one function are limited in number, and an exceeded limit is an error or, worse, silently eager."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    out = tmp_path / "uvit.json"
    names = ["compile_none"]
    models = {"a": TINY, "b": dataclasses.replace(TINY, embed_dim=64)}
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        assert run(out, models, "--compile", "--rounds", "1", "--direction", "fwd", names=names) == 0
    records = json.loads(out.read_text())["records"]
    assert [(r["model"], r["variant"]) for r in records] == [(label, name) for label in models for name in names]
    assert all(record["compiled"] for record in records)


def test_a_compilation_that_would_end_too_late_is_not_begun(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(model_steps, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def prepare(bench, name, recipe, directions):
        now[0] += 40.0 * recipe.compiled
        return step_calls.Ready({"step": lambda: sum(range(1000))}, model_check.Errors(0.0, 0.0), {"step": 0}, {})

    monkeypatch.setattr(model_steps, "prepare", prepare)
    options = {"batch_size": 2, "rounds": 1, "steps": 1, "compiled": True, "seconds": 100.0, "screen": Screen()}
    names = ("eager_none", "compile_none", "ours_compile_none")
    done = model_steps.measure(uvit.SUITE, "tiny", TINY, torch.device("cpu"), names=names, **options)
    assert [record["variant"] for record in done.records] == ["eager_none", "compile_none"]


def measured(names, **changes):
    options = {"batch_size": 2, "rounds": 1, "steps": 1, "compiled": False, "screen": Screen(width=200), **changes}
    return model_steps.measure(uvit.SUITE, "tiny", TINY, torch.device("cpu"), names=names, **options)


def test_a_recipe_that_fails_while_it_is_timed_is_dropped(monkeypatch):
    prepare, gone = model_steps.prepare, None

    def fail():
        raise torch.OutOfMemoryError("no room\nsecond line")

    def prepared(bench, name, *args):
        nonlocal gone
        ready = prepare(bench, name, *args)
        if name == "ours_none":
            ready.calls["fwd_bwd"] = fail
            gone = weakref.ref(ready)
        return ready

    monkeypatch.setattr(model_steps, "prepare", prepared)
    done = measured(("eager_none", "ours_none"), directions=("fwd", "fwd_bwd", "step"))
    assert done.faults == ["tiny, ours_none, fwd_bwd: OutOfMemoryError: no room"]
    assert [(r["direction"], r["variant"]) for r in done.records] == [
        ("fwd", "eager_none"),
        ("fwd_bwd", "eager_none"),
        ("step", "eager_none"),
    ]
    assert gone() is None, "its memory is the others'"


def test_what_is_done_before_preparing_counts_as_time(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(model_steps, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def bench(*args):
        now[0] += 70.0
        return uvit.Bench(*args)

    suite = dataclasses.replace(uvit.SUITE, bench=bench)
    options = {"batch_size": 2, "rounds": 1, "steps": 1, "compiled": False, "seconds": 100.0, "screen": Screen()}
    done = model_steps.measure(suite, "tiny", TINY, torch.device("cpu"), names=("eager_none", "eager_ls"), **options)
    assert [record["variant"] for record in done.records] == ["eager_none"], "one is always measured"
    assert "Time is up; not measured: tiny, eager_ls." in capsys.readouterr().out


def test_no_recipe_is_prepared_that_would_not_fit(monkeypatch, capsys):
    left = [100.0]

    def prepare(bench, name, recipe, directions):
        left[0] -= 30.0
        return step_calls.Ready({"step": lambda: sum(range(1000))}, model_check.Errors(0.0, 0.0), {"step": 20}, {})

    monkeypatch.setattr(model_steps, "prepare", prepare)
    monkeypatch.setattr(model_steps, "free_bytes", lambda device: left[0])
    done = measured(("eager_none", "eager_ls", "ours_none", "ours_ls"))
    assert [record["variant"] for record in done.records] == ["eager_none", "eager_ls"], "70 is enough, 40 is not"
    assert "Memory is short; not measured: tiny, ours_none." in capsys.readouterr().out
    assert done.faults == []


def test_a_recipe_with_another_loss_stops_the_benchmark(tmp_path, monkeypatch, capsys):
    build = uvit.Bench.build

    def wrong(self, recipe):
        built = build(self, recipe)
        return built._replace(loss=lambda: 1.2 * built.loss()) if recipe.fused else built

    monkeypatch.setattr(uvit.Bench, "build", wrong)
    out = tmp_path / "uvit.json"
    assert run(out, {"tiny": TINY}, names=("eager_none", "ours_none")) == 1
    assert "ours_none: with equal weights" in capsys.readouterr().out
    assert not out.exists()


def test_other_settings_are_those_of_their_records(tmp_path):
    out = tmp_path / "uvit.json"
    run(out, {"a": TINY}, "--direction", "step", names=("eager_none",))
    run(out, {"b": TINY}, "--direction", "step", "--steps", "2", names=("eager_none",))
    result = json.loads(out.read_text())
    assert result["settings"]["steps_per_round"] == 2
    assert [(r["model"], r.get("steps_per_round")) for r in result["records"]] == [("a", 1), ("b", None)]


def test_a_smaller_run_replaces_nothing_that_is_better(tmp_path, capsys):
    out = tmp_path / "uvit.json"
    run(out, {"tiny": TINY}, "--direction", "fwd", "--direction", "step", names=("eager_none", "ours_none"))
    before = json.loads(out.read_text())
    capsys.readouterr()
    assert run(out, {"tiny": TINY}, "--recipe", "ours_none") == 0
    printed = capsys.readouterr().out
    assert "Not written: tiny, (2, 3, 8, 8), step: the file has eager_none too" in printed
    assert "Written to" in printed, "fwd_bwd was not there"
    after = json.loads(out.read_text())
    assert after["records"][:4] == before["records"]
    assert [(r["direction"], r["variant"]) for r in after["records"][4:]] == [("fwd_bwd", "ours_none")]
    assert run(out, {"tiny": TINY}, "--direction", "fwd", "--recipe", "ours_none") == 0
    assert "Written to" not in capsys.readouterr().out
    assert json.loads(out.read_text()) == after


def test_in_fp32_all_recipes_are_rows_of_their_own(tmp_path):
    out = tmp_path / "uvit.json"
    names = ("authors_none", "eager_none", "ours_none")
    for precision in ("auto", "fp32"):
        assert run(out, {"tiny": TINY}, "--direction", "step", "--precision", precision, names=names) == 0
    records = json.loads(out.read_text())["records"]
    assert {r["variant"] for r in records if r["model"] == "tiny, fp32"} == set(names)
    assert {r["dtype"] for r in records if r["model"] == "tiny, fp32"} == {"fp32"}
    assert sum(r["model"] == "tiny" for r in records) == 3


def test_a_run_that_measures_nothing_is_no_success(tmp_path):
    out = tmp_path / "uvit.json"
    with pytest.raises(UserError, match=r"ours_compile_ls.*need --compile here"):
        run(out, {"tiny": TINY}, "--recipe", "ours_compile_ls")
    assert not out.exists()


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

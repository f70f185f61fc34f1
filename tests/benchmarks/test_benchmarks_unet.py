"""``python -m benchmarks unet`` on a tiny model."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import environment, report, step_calls, unet
from benchmarks.__main__ import main
from benchmarks.timing import MIN_ROUNDS
from benchmarks.variants import COMMON_SOURCES
from scalelong_fast.models import UNet, UNetConfig

TINY = UNetConfig(
    img_size=8,
    model_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_groups=4,
    use_scale_shift_norm=True,
    num_classes=5,
    dropout=0.1,
    attention="math",
)
CPU = torch.device("cpu")
KINDS = ("eager", "ours", "channels_last", "authors")


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    measured = environment.ceilings
    monkeypatch.setattr(environment, "ceilings", lambda device: measured(device, seconds=0.005))
    monkeypatch.setattr(step_calls, "WARM_UP_STEPS", 1)


def run(out, *args, **kwargs):
    args = ("--device", "cpu", "--rounds", "2", "--batch-size", "2", "--out", str(out), *args)
    return unet.main(args, models={"tiny": TINY}, **kwargs)


def test_the_file_has_every_recipe_and_report_takes_it(tmp_path, capsys):
    out = tmp_path / "results" / "machine" / "unet.json"
    assert run(out, "--rounds", "1", "--direction", "step") == 0
    records = {record["variant"]: record for record in json.loads(out.read_text())["records"]}
    # Nothing is compiled on a CPU: those that would be are the same as others.
    assert list(records) == [f"{kind}_{scaling}" for scaling in ("none", "ls", "cs") for kind in KINDS]
    for name, record in records.items():
        kind, scaling = name.rsplit("_", 1)
        assert record["scaling"] == scaling
        assert record["fused"] is (kind == "ours")
        assert record["memory_format"] == ("contiguous" if kind in ("eager", "authors") else "channels_last")
        assert not record["compiled"]
        assert record["rel_error"] < 0.15, "bf16, if anything"
        assert record["p20_us"] <= record["median_us"] <= record["p80_us"]
        assert record["source_sha256"] == environment.source_hash(record["sources"])
        assert 0 < record["mfu"] < 1
    assert records["eager_ls"]["time_over_eager"] == records["eager_none"]["time_over_no_scaling"] == 1
    assert records["ours_none"]["time_over_no_scaling"] == 1
    assert records["ours_ls"]["time_over_compile_none"] is None
    assert "kernels/group_norm.py" in records["ours_ls"]["sources"]
    assert not any(path.startswith("kernels/") for path in records["eager_ls"]["sources"])

    assert "ours_ls" in capsys.readouterr().out
    table = report.render("unet", tmp_path / "results")
    assert "| tiny | ours_cs |" in table
    assert table.endswith("**No GPU measurement yet.** What the kernels gain on a GPU is predicted, not measured.")


def test_forward_and_backward_are_timed_apart(tmp_path):
    out = tmp_path / "unet.json"
    assert run(out, "--rounds", "1", names=("eager_ls", "authors_ls")) == 0
    records = json.loads(out.read_text())["records"]
    assert [(r["direction"], r["variant"]) for r in records] == [
        (direction, name) for direction in step_calls.DIRECTIONS for name in ("eager_ls", "authors_ls")
    ]
    flop = {record["direction"]: record["flop"] for record in records}
    assert 0 < flop["fwd"] < flop["fwd_bwd"] == flop["step"]


def test_some_recipes_alone(tmp_path, capsys):
    out = tmp_path / "unet.json"
    assert run(out, "--direction", "step", "--recipe", "ours_ls", "--recipe", "eager_none") == 0
    records = {record["variant"]: record for record in json.loads(out.read_text())["records"]}
    assert list(records) == ["eager_none", "ours_ls"], "in the order of interest"
    assert records["ours_ls"]["time_over_eager"] is None
    assert main(["unet", "--recipe", "ours_sl"]) == 2
    assert "Did you mean 'ours_ls'" in capsys.readouterr().err


def test_all_recipes_start_from_equal_weights_and_compute_the_same():
    bench = unet.Bench(TINY, CPU, batch_size=2, compiled=False)
    losses, gradients = {}, {}
    for name in ("eager_ls", "channels_last_ls", "ours_ls", "eager_none", "ours_none", "eager_cs", "ours_cs"):
        model = bench.model(unet.RECIPES[name])
        out = model(bench.draws[0].noise, torch.tensor([3.0, 700.0]), torch.tensor([1, 2]))
        out.square().sum().backward()
        losses[name] = out.detach()
        gradients[name] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for kind, scaling in (("channels_last", "ls"), ("ours", "ls"), ("ours", "none"), ("ours", "cs")):
        name, plain = f"{kind}_{scaling}", f"eager_{scaling}"
        torch.testing.assert_close(losses[name], losses[plain], rtol=1e-3, atol=1e-4)
        assert gradients[name].keys() == gradients[plain].keys()
        for key, gradient in gradients[name].items():
            assert (gradient - gradients[plain][key]).norm() <= 1e-3 * gradients[plain][key].norm() + 1e-5, key
    assert (losses["eager_ls"] - losses["eager_none"]).norm() > 1e-3 * losses["eager_none"].norm()


def test_every_weight_matters():
    """A fresh UNet's output is zero: its loss would be right whatever the network computed."""
    config = dataclasses.replace(TINY, dropout=0.0)
    model = UNet(config)
    x, times, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 2])
    assert not model(x, times, labels).any()
    out = unet.waken(model)(x, times, labels)
    assert out.std() > 0.05
    out.square().sum().backward()
    # A gate of so few units may be silent by chance: a ReLU that is never passed.
    named = [(name, p.grad) for name, p in model.named_parameters() if not name.startswith("scaling.")]
    assert [name for name, gradient in named if gradient is None or not gradient.any()] == []


def test_formats_and_options_reach_the_model():
    bench = unet.Bench(TINY, CPU, batch_size=2, compiled=False)
    seen = []

    def look(module, args):
        seen.append(args[0].is_contiguous() and not args[0].is_contiguous(memory_format=torch.channels_last))

    for name, contiguous in (
        ("eager_ls", True),
        ("channels_last_ls", False),
        ("compile_ls", False),
        ("ours_ls", False),
    ):
        model = bench.model(unet.RECIPES[name])
        assert model.config.dropout == 0
        assert model.config.fused is name.startswith("ours")
        (inner,) = (m for m in model.middle_block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
                    and m is model.middle_block[0].in_layers[-1])  # fmt: skip
        inner.register_forward_pre_hook(look)
        model(torch.randn(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
        assert seen.pop() is contiguous
        weight = inner.weight
        assert weight.is_contiguous() is contiguous


def test_a_recipe_with_another_loss_stops_the_benchmark(tmp_path, monkeypatch, capsys):
    build = unet.Bench.build

    def wrong(self, recipe):
        built = build(self, recipe)
        return built._replace(loss=lambda: 1.2 * built.loss()) if recipe.fused else built

    monkeypatch.setattr(unet.Bench, "build", wrong)
    out = tmp_path / "unet.json"
    assert run(out, names=("eager_none", "ours_none")) == 1
    assert "ours_none: with equal weights" in capsys.readouterr().out
    assert not out.exists()


def test_a_recipe_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    build = unet.Bench.build

    def broken(self, recipe):
        if recipe.fused:
            raise torch.OutOfMemoryError("no room\nsecond line")
        return build(self, recipe)

    monkeypatch.setattr(unet.Bench, "build", broken)
    out = tmp_path / "unet.json"
    assert run(out, "--direction", "step", names=("ours_none", "eager_none", "channels_last_none")) == 1
    assert "tiny, ours_none: OutOfMemoryError: no room" in capsys.readouterr().out
    assert [r["variant"] for r in json.loads(out.read_text())["records"]] == ["eager_none", "channels_last_none"]


def test_no_recipe_is_prepared_after_the_time_is_up_and_rounds_are_few(tmp_path, capsys):
    out = tmp_path / "unet.json"
    args = ("--seconds", "0", "--rounds", "9", "--direction", "step")
    assert run(out, *args, names=("eager_none", "channels_last_none")) == 0
    assert "not measured: tiny, channels_last_none" in capsys.readouterr().out
    records = json.loads(out.read_text())["records"]
    assert [(record["variant"], record["rounds"]) for record in records] == [("eager_none", MIN_ROUNDS)]


def test_flop_are_those_of_a_real_model():
    config = dataclasses.replace(TINY, scaling="none", fused=False, dropout=0.0)
    model = unet.waken(UNet(config))
    with FlopCounterMode(display=False) as counter:
        out = model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64))
        assert 2 * unet.flop(TINY, "fwd") == pytest.approx(counter.get_total_flops(), rel=1e-9)
        out.sum().backward()
    assert 2 * unet.training_flop(TINY) == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_sources_are_files():
    for recipe in unet.RECIPES.values():
        sources = unet.recipe_sources(recipe)
        assert environment.source_hash(sources) is not None
        assert set(COMMON_SOURCES) < set(sources)


def test_a_gpu_is_given_the_presets():
    models = unet._models(torch.device("cuda"))
    assert {name: config.model_channels for name, config in models.items()} == {
        "unet_imagenet64": 160,
        "unet_cifar10": 128,
    }
    assert unet.SUITE.batch_size("unet_imagenet64", torch.device("cuda")) == 64
    assert unet.SUITE.batch_size("unet_cifar10", torch.device("cuda")) == 128


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "unet_imagenet"], "Did you mean"),
        (["--model", "unet_cifar10"], "on this device"),
        (["--rounds", "0"], "--rounds"),
        (["--batch-size", "0"], "--batch-size"),
        (["--device", "cdua"], "expected auto"),
    ],
)
def test_bad_values_are_refused(args, message, capsys):
    assert main(["unet", *args]) == 2
    assert message in capsys.readouterr().err

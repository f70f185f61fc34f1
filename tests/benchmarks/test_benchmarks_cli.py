"""The commands, on a tiny model."""

import dataclasses
import json

import pytest
import torch

from benchmarks import models, report, step, stream
from benchmarks.__main__ import main
from benchmarks.timing import MIN_ROUNDS
from benchmarks.variants import VARIANTS, Workbench
from scalelong_fast.data import ImageDataset, load_images
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import UserError
from scalelong_fast.models import UViT, UViTConfig

TINY = UViTConfig(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=4, reduction=4)
EAGER = ("authors_fp32", "authors_bf16", "ours_eager")


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    measured = step.environment.ceilings
    monkeypatch.setattr(step.environment, "ceilings", lambda device: measured(device, seconds=0.01))


def test_without_a_command_it_explains_itself(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in ("step", "stream", "report"))


def test_an_unknown_command_is_refused_with_a_suggestion(capsys):
    assert main(["setp"]) == 2
    assert "Did you mean 'step'" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--device", "cdua"], ["--rounds", "0"], ["--steps", "-1"], ["--seconds", "nan"]])
def test_bad_values_are_refused(args, capsys):
    assert main(["step", *args]) == 2
    assert "expected" in capsys.readouterr().err


def test_train_is_another_name_for_step(monkeypatch):
    told = []
    monkeypatch.setattr(step, "main", lambda args: told.append(args) or 0)
    assert main(["train", "--rounds", "3"]) == 0
    assert told == [["--rounds", "3"]]


def test_models_are_the_two_suites_with_the_time_shared_between_them(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(models, "run", lambda suite, args: told.append((suite.command, args)) or len(told) - 1)
    assert main(["models", "--rounds", "2", "--seconds", "60"]) == 1, "the larger of the two exit codes"
    assert [(command, args[:4]) for command, args in told] == [
        (command, ["--rounds", "2", "--seconds", "60"]) for command in ("uvit", "unet")
    ]
    first, second = (float(args[-1]) for _, args in told)
    assert first == pytest.approx(30, abs=1)
    assert second == pytest.approx(60, abs=1), "what the first spared"
    with pytest.raises(SystemExit):
        main(["models", "--model", "U-ViT-S/2"])
    assert "unrecognized arguments: --model" in capsys.readouterr().err


def test_step_keeps_to_its_time(tmp_path, capsys):
    out = tmp_path / "step.json"
    args = ["--device", "cpu", "--seconds", "0", "--rounds", "9", "--steps", "1", "--out", str(out)]
    args += ["--variant", "ours_eager", "--variant", "authors_fp32"]
    assert step.main(args, model=TINY, batch_size=2) == 0
    assert "not measured: authors_fp32" in capsys.readouterr().out
    (record,) = json.loads(out.read_text())["records"]
    assert (record["variant"], record["rounds"]) == ("ours_eager", MIN_ROUNDS)
    assert 0 < record["mfu"] < 1


def test_unknown_variants_are_refused():
    with pytest.raises(UserError, match="Did you mean 'ours'"):
        step.measure(torch.device("cpu"), names=["our"])


def test_step_measures_the_variants_and_report_takes_its_file(tmp_path, capsys):
    out = tmp_path / "results" / "machine" / "step.json"
    args = ["--rounds", "2", "--steps", "1", "--device", "cpu", "--out", str(out)]
    assert step.main(args, model=TINY, batch_size=2, names=EAGER) == 0
    assert "ours_eager" in capsys.readouterr().out

    result = json.loads(out.read_text())
    assert [record["variant"] for record in result["records"]] == list(EAGER)
    authors, mixed, ours = result["records"]
    assert (authors["dtype"], mixed["dtype"]) == ("fp32", "bf16")
    assert authors["shape"] == [2, 3, 8, 8]
    assert authors["rel_error"] == 0
    assert 0 < mixed["rel_error"] < 2e-2
    assert authors["ratio_to_authors_fp32"] == 1 == mixed["round_ratio_to_authors_bf16"]
    assert ours["ratio_to_authors_fp32"] == pytest.approx(authors["median_us"] / ours["median_us"], rel=1e-2)
    assert ours["ratio_to_ours_none"] is None
    for record in result["records"]:
        assert record["p20_us"] <= record["median_us"] <= record["p80_us"]
        assert record["images_per_second"] == pytest.approx(2e6 / record["median_us"], rel=1e-2)
        assert record["source_sha256"] == step.environment.source_hash(record["sources"])
    assert "| scalelong_fast, eager | " in report.render("step", tmp_path / "results")


def test_a_variant_with_another_loss_stops_the_benchmark(tmp_path, monkeypatch, capsys):
    def wrong(bench):
        variant = bench.ours(compiled=False)
        right = variant.loss
        variant.loss = lambda x0, t, noise: 1.05 * right(x0, t, noise)
        return variant

    monkeypatch.setitem(VARIANTS, "ours_eager", wrong)
    out = tmp_path / "step.json"
    assert step.main(["--device", "cpu", "--out", str(out)], model=TINY, batch_size=2, names=["ours_eager"]) == 1
    assert "ours_eager: with equal weights" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize("scaling", ["ls", "none"])
def test_our_variant_takes_real_steps(scaling):
    bench = Workbench(torch.device("cpu"), TINY, 4)
    variant = bench.ours(scaling, compiled=False)
    first = bench.probe(variant)
    assert first == pytest.approx(bench.reference_loss(scaling), rel=step.TOLERANCE[variant.dtype])
    for _ in range(5):
        assert variant.step().isfinite()
    assert bench.probe(variant) != first


def test_stream_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    out = tmp_path / "residual_dtype.json"
    args = ["stream", "--steps", "30", "--device", "cpu", "--out", str(out)]
    digits = load_images("digits")
    few = dataclasses.replace(digits, images=digits.images[:64].contiguous(), labels=digits.labels[:64])
    monkeypatch.setattr(stream, "load_images", lambda name: few)
    trained = []
    train = stream.train

    def counted(config, *rest):
        trained.append((config.train.seed, config.model.residual_dtype))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(config, *rest)

    monkeypatch.setattr(stream, "train", counted)
    assert main([*args, "--seeds", "1"]) == 130
    assert [record["dtype"] for record in json.loads(out.read_text())["records"]] == ["fp32"]
    first = json.loads(out.read_text())["records"][0]

    assert main([*args, "--seeds", "1"]) == 0
    assert trained == [(0, "fp32"), (0, "bf16"), (0, "bf16")]
    records = json.loads(out.read_text())["records"]
    assert records[0] == first
    assert [record["dtype"] for record in records] == ["fp32", "bf16"]
    assert records[0]["loss"] != records[1]["loss"]  # the option reaches the network
    assert "│ bf16            │ 1 " in capsys.readouterr().out

    assert main(["stream", "--steps", "3", "--device", "cpu", "--out", str(out), "--seeds", "1"]) == 0
    assert [record["steps"] for record in json.loads(out.read_text())["records"]] == [3, 3], "other settings, anew"


def test_the_evaluation_is_a_fixed_number_for_a_network():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=generator)
    dataset = ImageDataset("random", images, None, 0, ())
    torch.manual_seed(0)
    model, schedule = UViT(TINY).eval(), create_schedule("vpsde")
    first = stream.evaluation_loss(model, schedule, dataset, passes=2)
    torch.manual_seed(1)
    assert stream.evaluation_loss(model, schedule, dataset, passes=2) == first
    assert stream.evaluation_loss(Constant(0.0), schedule, dataset, passes=40) == pytest.approx(1.0, abs=0.05)


class Constant(torch.nn.Module):
    """Predicts a constant; for 0 the loss is the noise's variance, 1."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x, timesteps, y=None):
        return self.value.expand_as(x)

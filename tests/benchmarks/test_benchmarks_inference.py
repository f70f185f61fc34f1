"""Sampling timed, on tiny networks."""

import json

import pytest
import torch

from benchmarks import inference, report
from benchmarks.__main__ import main
from benchmarks.model_check import LossMismatchError
from scalelong_fast.models import UNetConfig, UViTConfig

CPU = torch.device("cpu")
TINY = {
    "tiny U-ViT": UViTConfig(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=4, reduction=4),
    "tiny UNet": UNetConfig(
        img_size=8, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(8,), num_classes=3
    ),
}


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    measured = inference.environment.ceilings
    monkeypatch.setattr(inference.environment, "ceilings", lambda device: measured(device, seconds=0.01))


def run(out, *args):
    return inference.main(["--device", "cpu", "--steps", "2", "--rounds", "2", "--out", str(out), *args], chosen=TINY)


def test_samplings_are_timed_and_the_report_takes_the_file(tmp_path, capsys):
    out = tmp_path / "results" / "machine" / "inference.json"
    assert run(out, "--batch-size", "1", "--batch-size", "2") == 0
    assert "tiny UNet" in capsys.readouterr().out
    records = json.loads(out.read_text())["records"]
    combinations = {(r["model"], r["sampler"], r["shape"][0], r["variant"]) for r in records}
    assert len(combinations) == len(records) == 2 * 2 * 2 * 4  # models, samplers, batches; eager and ours, none and LS
    for record in records:
        assert record["p20_us"] <= record["median_us"] <= record["p80_us"]
        assert record["images_per_second"] == pytest.approx(record["shape"][0] * 1e6 / record["median_us"], rel=1e-2)
        assert record["rel_error"] < 1e-4
        assert record["rounds"] == 2
        image = 4 * record["shape"][0] * 3 * 8 * 8
        assert image / 2**20 <= record["peak_mib"] < 5
        assert record["source_sha256"] == inference.environment.source_hash(record["sources"])
        assert record["source_sha256"] is not None
        if record["variant"] == "eager_none":
            assert record["time_over_eager"] == 1 == record["time_over_no_scaling"]
    table = report.render("inference", tmp_path / "results")
    assert "| tiny U-ViT | ours_ls | ddim, 2 steps | 2 |" in table
    assert "(stale)" not in table


def test_a_part_is_measured_anew_and_the_rest_kept(tmp_path):
    out = tmp_path / "inference.json"
    few = ("--batch-size", "1", "--model", "tiny U-ViT")
    assert run(out, *few, "--sampler", "ddim") == 0
    first = json.loads(out.read_text())["records"]
    assert run(out, *few, "--sampler", "dpm-solver++") == 0
    records = json.loads(out.read_text())["records"]
    assert records[: len(first)] == first
    assert {record["sampler"] for record in records[len(first) :]} == {"dpm-solver++"}


def test_with_little_time_rounds_are_fewer_and_what_is_left_is_named(tmp_path, capsys):
    out = tmp_path / "inference.json"
    few = ("--batch-size", "1", "--model", "tiny U-ViT")
    assert run(out, *few, "--rounds", "9", "--seconds", "0.05") == 0
    assert {record["rounds"] for record in json.loads(out.read_text())["records"]} == {3}
    assert "Time is up; not measured: tiny U-ViT, ddim, batch 1." in capsys.readouterr().out


def test_what_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    build = inference.build
    built = []

    def broken(config, kind, scaling, device):
        built.append((kind, scaling))
        if (kind, scaling) == ("ours", "none"):
            raise torch.OutOfMemoryError("no room\nsecond line")
        network = build(config, kind, scaling, device)
        if (kind, scaling) == ("ours", "ls"):
            with torch.no_grad():
                next(iter(network.parameters())).mul_(2)
        return network

    monkeypatch.setattr(inference, "build", broken)
    out = tmp_path / "results" / "machine" / "inference.json"
    assert run(out, "--batch-size", "1", "--model", "tiny U-ViT") == 1
    printed = capsys.readouterr().out
    assert "tiny U-ViT, batch 1, ours_none: OutOfMemoryError: no room" in printed
    assert "tiny U-ViT, batch 1, ours_ls: LossMismatchError" in printed
    assert len(built) == 4, "both samplers have the same networks"
    records = json.loads(out.read_text())["records"]
    assert {(r["sampler"], r["variant"]) for r in records} == {
        (sampler, f"eager_{scaling}") for sampler in ("dpm-solver++", "ddim") for scaling in ("none", "ls")
    }
    assert "| tiny U-ViT | eager_ls | ddim, 2 steps | 1 |" in report.render("inference", tmp_path / "results")


def test_a_network_that_fails_while_it_is_timed_is_dropped(tmp_path, monkeypatch, capsys):
    sample, failing = inference.sample, []

    def fails_once_it_is_timed(model, *args, **options):
        if model.config.fused and model.config.scaling == "none":
            failing.append(model)
            if len(failing) == 3:
                raise torch.OutOfMemoryError("no room")
        return sample(model, *args, **options)

    monkeypatch.setattr(inference, "sample", fails_once_it_is_timed)
    out = tmp_path / "inference.json"
    assert run(out, "--batch-size", "1", "--model", "tiny U-ViT", "--sampler", "ddim") == 1
    assert "tiny U-ViT, ddim, batch 1, ours_none: OutOfMemoryError: no room" in capsys.readouterr().out
    variants = [record["variant"] for record in json.loads(out.read_text())["records"]]
    assert variants == ["eager_none", "eager_ls", "ours_ls"]


def test_a_reference_that_fails_leaves_ratios_out(tmp_path):
    config = TINY["tiny U-ViT"]
    options = {"batch_size": 1, "screen": inference.Screen(), "autocast": None}
    ready = inference.prepare("tiny", config, CPU, kinds=("ours",), **options)
    records = inference.measure("tiny", config, CPU, ready, sampler="ddim", steps=1, rounds=1, **options)
    assert [(r["variant"], r["time_over_eager"]) for r in records] == [("ours_none", None), ("ours_ls", None)]
    _, (row, _) = inference.inference_rows(records)
    assert "–" in row


def test_past_its_share_of_the_time_nothing_is_compiled(capsys):
    config, options = TINY["tiny U-ViT"], {"batch_size": 1, "screen": inference.Screen(), "autocast": None}
    ready = inference.prepare("tiny", config, CPU, kinds=("compile", "eager"), deadline=0.0, **options)
    assert list(ready.networks) == ["eager_none", "eager_ls"]
    assert "Time is up; not measured: tiny, batch 1, compile_ls." in capsys.readouterr().out


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_a_network_that_predicts_other_noise_is_not_timed(config):
    plain = inference.build(config, "eager", "ls", CPU)
    ours = inference.build(config, "ours", "ls", CPU)
    labels = torch.tensor([0, 2]) if config.num_classes > 0 else None
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 900.0]), labels
    assert inference.noise_error("ours", ours, plain, inputs, None) < 1e-4
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    with pytest.raises(LossMismatchError, match="ours: with equal weights"):
        inference.noise_error("ours", ours, plain, inputs, None)


def test_a_compiled_kind_is_compiled():
    compiled = inference.build(TINY["tiny U-ViT"], "ours_compile", "none", CPU)
    assert isinstance(compiled, torch._dynamo.OptimizedModule)
    assert not isinstance(inference.build(TINY["tiny U-ViT"], "ours", "none", CPU), torch._dynamo.OptimizedModule)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sampler", "dim"], "Did you mean 'ddim'"),
        (["--steps", "0"], "--steps"),
        (["--model", "x"], "--model"),
        (["--seconds", "-1"], "--seconds"),
    ],
)
def test_bad_values_are_refused(args, message, capsys):
    assert main(["inference", *args, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err

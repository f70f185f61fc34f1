"""``python -m benchmarks convergence`` and its part of the report."""

import dataclasses
import json

import pytest
import torch

from benchmarks import convergence, convergence_settings, environment, report_plots
from benchmarks.convergence import LEVEL, complete, loss_gap, recipes
from benchmarks.convergence_settings import Settings, chosen_settings, default_settings
from benchmarks.model_check import LossMismatchError
from benchmarks.model_steps import Measured
from benchmarks.report import TABLES
from scalelong_fast.analysis import Training
from scalelong_fast.analysis.convergence import SCALES
from scalelong_fast.analysis.convergence_levels import compare_levels
from scalelong_fast.errors import UserError
from scalelong_fast.training.hardware import resolve_device


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    measured = environment.ceilings
    monkeypatch.setattr(environment, "ceilings", lambda device: measured(device, seconds=0.005))


@pytest.fixture
def settings():
    """Networks of one long skip, trained for four steps."""
    training = Training(depth=2, steps=4, batch_size=4, seeds=(0, 1), scalings=("none", "uniform"))
    return Settings(training, every=1, sample_every=1, probe=8, extractor="none")


def test_result_has_every_scaling_and_way_and_the_product_of_the_factors(settings, tmp_path, capsys):
    out = tmp_path / "results" / "here" / "convergence.json"
    args = ["--device", "cpu", "--rounds", "2", "--no-compile", "--workers", "1", "--out", str(out)]
    assert convergence.main(args, settings=settings) == 0
    assert "Written to" in capsys.readouterr().out
    result = json.loads(out.read_text())
    records = {record["variant"]: record for record in result["records"]}
    assert set(records) == {"authors_none", "eager_none", "ours_none", "eager_uniform", "ours_uniform"}
    fields = {"sources", "source_sha256", "median_us", "p20_us", "p80_us", "flop", "peak_mib"}
    assert fields <= records["ours_uniform"].keys()
    assert records["eager_none"]["factor_throughput"] == 1
    assert records["eager_none"]["factor"] == 1
    for record in records.values():
        if record["variant"].startswith("authors"):
            assert record["loss_gap"] is record["steps_to_level"] is record["factor"] is None, "not trained by it"
            assert record["factor_throughput"] > 0
        else:
            assert record["loss_gap"] < 1e-4
        if record["factor"] is not None:
            expected = records["eager_none"]["median_us"] / record["median_us"] * record["factor_steps"]
            assert record["factor"] == pytest.approx(expected, rel=1e-3)
    assert list(result["curves"]) == ["none", "uniform"]
    assert [len(curve["losses"]) for curve in result["curves"]["uniform"]] == [5, 5]
    text = "\n".join(TABLES["convergence"](result, tmp_path))
    assert "| uniform | ours (stale) |" in text
    assert "about 1.5" in text
    drawn = report_plots.pictures(tmp_path / "results")
    assert [path.split("/")[-1].startswith("convergence-") for path in drawn] == [True]
    picture = tmp_path / "convergence.png"
    next(iter(drawn.values()))(picture)
    assert picture.stat().st_size > 10_000


def test_a_scaling_that_does_not_get_there_has_no_factor():
    falling, flat = ([0, 10], [2.0, 1.0]), ([0, 10], [2.0, 1.9])
    reached = compare_levels(LEVEL, {"none": [falling, falling], "cs": [falling, flat]}, {})
    timed = [
        {"variant": f"eager_{s}", "scaling": s, "median_us": 100.0, "sources": [], "source_sha256": ""}
        for s in ("none", "cs")
    ]
    none, cs = complete(Measured(timed, {}, []), reached, {"none": 0.0, "cs": 0.0})
    assert none["steps_to_level"] == pytest.approx(9)
    assert none["seconds_to_level"] == pytest.approx(0.001)
    assert none["factor"] == 1
    assert cs["steps_to_level"] is cs["seconds_to_level"] is cs["factor_steps"] is cs["factor"] is None
    assert cs["factor_throughput"] == 1


def test_losses_that_differ_are_a_fault(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convergence, "loss_gap", lambda settings, scaling: 0.5)
    monkeypatch.setattr(convergence, "measure", lambda *args, **options: Measured([], {}, []))
    out = tmp_path / "convergence.json"
    assert convergence.main(["--device", "cpu", "--workers", "1", "--out", str(out)], settings=settings) == 1
    assert "plain and fused losses differ by 0.5" in capsys.readouterr().out


def test_trainings_are_kept_where_a_recipe_computes_another_loss(settings, tmp_path, monkeypatch, capsys):
    def mismatch(*args, **options):
        raise LossMismatchError("ours_ls: another loss")

    curve = {"steps": [0, 4], "losses": [1.0, 0.5]}
    monkeypatch.setattr(convergence, "train_all", lambda settings, *_, **__: {"none": [curve], "uniform": [curve]})
    monkeypatch.setattr(convergence, "loss_gap", lambda settings, scaling: 0.0)
    monkeypatch.setattr(convergence, "measure", mismatch)
    out = tmp_path / "results" / "here" / "convergence.json"
    args = ["--device", "cpu", "--workers", "1", "--out", str(out)]
    assert convergence.main(args, settings=settings) == 1
    printed = capsys.readouterr().out
    assert "error: ours_ls: another loss" in printed
    assert "Written to" in printed
    result = json.loads(out.read_text())
    assert result["records"] == []
    assert [len(curves) for curves in result["curves"].values()] == [2, 2], "a seed each"
    assert "their steps not timed" in "\n".join(TABLES["convergence"](result, tmp_path))
    picture = tmp_path / "convergence.png"
    next(iter(report_plots.pictures(tmp_path / "results").values()))(picture)
    assert picture.stat().st_size > 10_000
    # What has been timed already is not given up for it.
    timed = {**result, "records": [{"variant": "eager_none", "sources": [], "source_sha256": ""}]}
    out.write_text(json.dumps(timed))
    assert convergence.main(args, settings=settings) == 1
    assert "Written to" not in capsys.readouterr().out
    assert json.loads(out.read_text()) == timed


def test_other_trainings_are_replaced_only_if_that_is_asked_for(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(convergence.environment, "RESULTS", tmp_path)
    monkeypatch.setattr(convergence, "run", lambda *args, **options: ({"settings": {}, "records": []}, []))
    where = convergence.environment.describe(torch.device("cpu"))
    path = tmp_path / where["machine"] / "convergence.json"
    path.parent.mkdir()
    own = convergence.trained_settings(settings)
    path.write_text(json.dumps({"settings": own}))
    assert convergence.main(["--device", "cpu"], settings=settings) == 0, "the same trainings again"
    others = json.dumps({"settings": {**own, "steps": 300}})
    path.write_text(others)
    with pytest.raises(UserError, match=r"--out: .*other trainings \(steps 300, not 4\)"):
        convergence.main(["--device", "cpu"], settings=settings)
    assert path.read_text() == others
    assert convergence.main(["--device", "cpu", "--out", str(path)], settings=settings) == 0
    assert path.read_text() != others


def test_gap_is_zero_of_equal_trainings_and_seen_otherwise(settings, monkeypatch):
    curves = iter([{"losses": [1.0, 0.5]}, {"losses": [1.0, 0.52]}])
    monkeypatch.setattr(convergence, "learning_curve", lambda config, every, probe_size: next(curves))
    assert loss_gap(settings, "none") == pytest.approx(0.04)


def test_a_further_seed_is_trained_only_if_there_is_time(settings, monkeypatch):
    trained = []

    def train_all(settings, units, workers):
        trained.append(settings.training.seeds)
        return {scaling: [{"steps": [0], "losses": [1.0]}] for scaling in settings.training.scalings}

    monkeypatch.setattr(convergence, "train_all", train_all)
    screen = convergence.Screen()
    found = convergence.train_by_seed(settings, convergence.Units(), None, float("inf"), screen)
    assert trained == [(0,), (1,)]
    assert len(found["uniform"]) == 2
    trained.clear()
    assert len(convergence.train_by_seed(settings, convergence.Units(), None, 0.0, screen)["uniform"]) == 1
    assert trained == [(0,)]


def test_sizes_of_a_gpu_are_those_of_the_published_model_on_made_up_images():
    found = default_settings(torch.device("cuda"))
    config = found.config("ls", 0)
    assert config.data.name == "synthetic"
    assert config.model.embed_dim == 512
    assert config.model.depth == 12
    assert not config.model.fused
    assert default_settings(torch.device("cpu")).config("cs", 0).data.name == "digits"
    assert set(recipes(("none",))) == {"authors_none", "eager_none", "ours_none", "ours_compile_none"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--path", "somewhere"], "--path: got 'somewhere', expected none without --data"),
        (["--preset", "digits-unet"], "--preset: got 'digits-unet', expected a preset of a U-ViT"),
        (["--rounds", "0"], "--rounds: got 0"),
    ],
)
def test_bad_options_of_convergence_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        convergence.main(["--device", "cpu", *args])


def test_settings_replace_those_of_the_analysis_and_keep_its_checks(settings):
    with pytest.raises(UserError, match="--sample-every"):
        dataclasses.replace(settings, every=2)


@pytest.mark.parametrize(
    ("name", "auto", "same"), [("cpu", "cpu", True), ("cuda:0", "cuda", True), ("cuda:1", "cuda", False)]
)
def test_a_device_that_is_what_auto_is_has_the_trainings_of_auto(monkeypatch, name, auto, same):
    devices = {"auto": torch.device(auto), name: torch.device(name)}
    monkeypatch.setattr(convergence_settings, "resolve_device", lambda name, *_: devices[name])
    assert convergence_settings._is_auto(name) is same


@pytest.mark.parametrize("args", [[], ["--device", str(resolve_device("auto"))]], ids=["auto", "named"])
def test_trainings_of_the_analysis_are_taken_over(args):
    options = convergence._parser().parse_args(["--scale", "digits", *args])
    found = chosen_settings(options, default_settings(torch.device("cpu")))
    for scaling in ("none", "ls"):
        assert found.config(scaling, 1) == SCALES["digits"].config(scaling, 1)
    assert (found.every, found.sample_every, found.extractor) == (25, 100, "auto")

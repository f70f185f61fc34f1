"""Growth of time and memory, on tiny networks and made-up curves."""

import dataclasses
import json
import re

import pytest
import torch

from benchmarks import curves, environment, report, report_curves, report_plots, unet, uvit
from benchmarks.__main__ import main
from benchmarks.report_curves import SWEEPS, growth
from scalelong_fast.models import UNetConfig, UViTConfig, build_model

CPU = torch.device("cpu")
UVIT = UViTConfig(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, reduction=4)
UNET = UNetConfig(
    img_size=8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_heads=2
)
VALUES = {"batch": (8, 1), "tokens": (16,), "width": (64, 96), "skips": (3, 2)}
TINY = {
    "tiny U-ViT": curves.Curves(uvit.SUITE, UVIT, 2, VALUES, curves.vary_uvit),
    "tiny UNet": curves.Curves(unet.SUITE, UNET, 2, VALUES, curves.vary_unet),
}


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    measured = environment.ceilings
    monkeypatch.setattr(environment, "ceilings", lambda device: measured(device, seconds=0.005))


def run(out, *args):
    return curves.main(["--device", "cpu", "--rounds", "1", "--out", str(out), *args], chosen=TINY)


def test_the_file_has_the_curves_and_report_takes_it(tmp_path, capsys):
    out = tmp_path / "results" / "machine" / "curves.json"
    assert run(out, "--model", "tiny U-ViT", "--sweep", "batch", "--sweep", "skips") == 0
    assert "Growth" in capsys.readouterr().out
    records = json.loads(out.read_text())["records"]
    recipes = ["eager_none", "eager_ls", "ours_none", "ours_ls"]
    assert {r["variant"] for r in records} == set(recipes)
    assert len(records) == 5 * len(recipes)  # the base point and two more of each sweep
    for variant in recipes:
        batches = report_curves.curve(records, "batch", variant, "peak_mib")
        assert [x for x, _ in batches] == [1, 2, 8]
        assert [x for x, _ in report_curves.curve(records, "skips", variant, "median_us")] == [1, 2, 3]
        assert batches[0][1] < batches[2][1] < 8.5 * batches[0][1], "more images need more memory, but not of weights"
    for record in records:
        assert record["direction"] == "step"
        assert record["p20_us"] <= record["median_us"] <= record["p80_us"]
        assert record["source_sha256"] == environment.source_hash(record["sources"])
        if record["variant"].endswith("_none"):
            assert record["time_over_no_scaling"] == 1
    base = [record for record in records if record["sweeps"] == list(SWEEPS)]
    assert {tuple(record[sweep] for sweep in SWEEPS) for record in base} == {(2, 17, 32, 1)}

    table = report.render("curves", tmp_path / "results")
    assert "| tiny U-ViT | batch | ours | 1 – 8 |" in table
    assert "| width |" not in table
    assert "tiny U-ViT: batch 2, tokens 17, width 32, skips 1" in table
    assert "(stale)" not in table

    assert run(out, "--model", "tiny U-ViT", "--sweep", "width") == 0
    again = json.loads(out.read_text())["records"]
    assert len(again) == len(records) + 2 * len(recipes), "other points are kept, the base point is measured anew"


def test_a_unet_is_measured_too(tmp_path):
    out = tmp_path / "curves.json"
    assert run(out, "--model", "tiny UNet", "--sweep", "tokens") == 0
    records = json.loads(out.read_text())["records"]
    points = report_curves.curve(records, "tokens", "ours_ls", "peak_mib")
    assert [x for x, _ in points] == [64, 256]
    assert points[0][1] < points[1][1]


def test_without_time_no_point_is_measured(tmp_path, capsys):
    out = tmp_path / "curves.json"
    assert run(out, "--model", "tiny U-ViT", "--seconds", "0") == 0
    assert not out.exists()
    assert capsys.readouterr().out.count("Time is up; not measured") == 8


@pytest.mark.parametrize("name", TINY)
def test_one_thing_is_varied_at_a_time(name):
    todo = curves.points(TINY[name])
    base, *others = todo
    assert base.sweeps == tuple(SWEEPS)
    assert [point.sweeps[0] for point in others[:4]] == list(SWEEPS), "each sweep in turn, should time run out"
    for point in others:
        (sweep,) = point.sweeps
        assert {other for other in SWEEPS if point.axes[other] != base.axes[other]} == {sweep}
    weights = curves.shares(TINY[name], todo)
    assert sum(weights) == pytest.approx(1)
    # A point's share grows with its FLOP, but a small one has time for what costs the same in all.
    batches = {point.axes["batch"]: weight for point, weight in zip(todo, weights, strict=True)}
    assert batches[1] < batches[2] < batches[8] < 8 * batches[1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_point_of_a_device_can_be_built(device):
    for model in curves.curves(torch.device(device)).values():
        for point in curves.points(model):
            with torch.device("meta"):
                built = build_model(dataclasses.replace(point.config, scaling="ls"))
            assert built.config.num_skips == point.axes["skips"]
        along = {sweep: {point.axes[sweep] for point in curves.points(model)} for sweep in SWEEPS}
        assert all(len(found) >= 4 for found in along.values()), "three points fit nearly any power"


def test_blocks_are_compiled_one_by_one():
    bench = curves.by_block(uvit.SUITE).bench(UVIT, CPU, 2, True)
    assert bench.execution(True).mode == "block"
    assert bench.execution(False).mode == "off"
    assert curves.by_block(uvit.SUITE).bench(UVIT, CPU, 2, False).execution(True).mode == "off"


def test_growth_is_the_exponent_of_a_power():
    exponent, fit = growth([(x, 3.0 * x**1.5) for x in (1, 2, 5, 9)])
    assert exponent == pytest.approx(1.5)
    assert fit == pytest.approx(1)
    assert growth([(1, 2.0), (2, 2.0), (4, 2.0)]) == (pytest.approx(0), 1.0)
    assert growth([(1, 1.0), (2, 9.0), (4, 2.0)])[1] < 0.5
    assert growth([(1, 1.0), (2, 2.0)]) is None
    assert growth([(2, 1.0), (2, 2.0), (2, 3.0)]) is None


def made_up(variant, batch, time, memory, **changes):
    return {
        "model": "Model/1",
        "batch": batch,
        "tokens": 10,
        "width": 8,
        "skips": 3,
        "sweeps": list(SWEEPS) if batch == 2 else ["batch"],
        "variant": variant,
        "median_us": time,
        "peak_mib": memory,
        "time_over_no_scaling": 1.0 if variant.endswith("none") else 1.0 + batch / 100,
        "sources": ["code.py"],
        "source_sha256": environment.source_hash(["code.py"]),
        **changes,
    }


def write(results, records):
    result = {
        "environment": {**environment.describe(CPU), "machine": "test"},
        "settings": {"rounds": 1},
        "ceilings": {"copy_gb_s": 1.0, "matmul_tflop_s": {"fp32": 1.0}},
        "records": records,
    }
    path = results / "test" / "curves.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    return result


def test_rows_have_exponents_and_the_ls_tax():
    records = [made_up("ours_none", b, 10.0 * b, 5.0 * b**2) for b in (1, 2, 4)]
    records += [made_up("ours_ls", b, 11.0 * b, 6.0 * b**2) for b in (1, 2, 4)]
    _, (row,) = report_curves.curves_rows(records)
    assert row[:4] == ["Model/1", "batch", "ours", "1 – 4"]
    assert row[4:] == ["1.00", "1.00", "1.000", "2.00", "2.00", "1.000", "1.010 – 1.040", "1.200 – 1.200"]
    without = [record | {"peak_mib": None} for record in records if record["variant"] == "ours_none"]
    _, (row,) = report_curves.curves_rows(without)
    assert row[4:] == ["1.00", "–", "1.000", "–", "–", "–", "–", "–"]


def test_pictures_are_drawn_and_the_table_shows_them(tmp_path):
    (tmp_path / "code.py").write_text("x = 1\n")
    stale = {"source_sha256": "0"}
    records = [made_up(v, b, b, b, **stale) for v in ("ours_none", "ours_ls") for b in (1, 2, 4)]
    write(tmp_path / "results", records)
    assert report_plots.draw_plots(tmp_path / "results", tmp_path) == []
    picture = tmp_path / "docs" / "images" / "curves-model-1-test.png"
    assert re.match(rb"\x89PNG", picture.read_bytes())
    table = report.render("curves", tmp_path / "results", tmp_path)
    assert "![Time and memory of Model/1](docs/images/curves-model-1-test.png)" in table
    assert "| ours (stale) |" in table


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sweep", "batches"], "Did you mean 'batch'"),
        (["--model", "x"], "--model"),
        (["--rounds", "0"], "--rounds"),
        (["--seconds", "-1"], "--seconds"),
    ],
)
def test_bad_values_are_refused(args, message, capsys):
    assert main(["curves", "--device", "cpu", *args]) == 2
    assert message in capsys.readouterr().err

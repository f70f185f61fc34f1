"""The tables of training steps, of the U-ViTs and of the UNets alike."""

import json

import pytest
import torch

from benchmarks import environment, report
from benchmarks.report_models import losses, not_compared, references


def record(variant, direction="step", median_us=50000.0, **changes):
    kind, scaling = variant.rsplit("_", 1)
    over = {name: changes.pop(name, None) for name in references(variant)}
    return {
        "model": "unet",
        "shape": [64, 3, 64, 64],
        "direction": direction,
        "variant": variant,
        "scaling": scaling,
        "compiled": "compile" in kind,
        "rounds": 8,
        "median_us": median_us,
        "p20_us": 49000.0,
        "p80_us": 51000.0,
        "images_per_second": 1280.0,
        "mfu": 0.5,
        "peak_mib": 4000.0,
        "host_us": 1500.0,
        "rel_error": 1e-4,
        **{f"time_over_{name}": value for name, value in over.items()},
        "sources": [],
        "source_sha256": environment.source_hash([]),
        **changes,
    }


def render(root, records):
    folder = root / "results" / "cpu-test"
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"copy_gb_s": 4300.0, "matmul_tflop_s": {"bf16": 790.0}}
    where = environment.describe(torch.device("cpu"))
    settings = {"rounds": 8, "steps_per_round": 5}
    result = {"environment": where, "settings": settings, "ceilings": limits, "records": records}
    (folder / "unet.json").write_text(json.dumps(result))
    return report.render("unet", root / "results", root)


def test_a_row_has_all_directions_and_the_ratios_of_the_step(tmp_path):
    records = [
        record("ours_compile_ls", "fwd", 11000.0),
        record("ours_compile_ls", "fwd_bwd", 33000.0),
        record("ours_compile_ls", eager=0.4, compile=0.8, authors=0.25, no_scaling=1.01, compile_none=0.9),
        record("eager_ls", peak_mib=None, host_us=None, eager=1.0),
    ]
    table = render(tmp_path, records)
    figures = "| 11 | 33 | 50 | 49 – 51 | 1280 | 50.0% | 4000 | 1.5 | 4.00 | 2.50 | 1.25 | 1.010 | 0.900 | 1.0e-04 |"
    assert f"| unet | ours_compile_ls (compiled) {figures}" in table
    plain = "| – | – | 50 | 49 – 51 | 1280 | 50.0% | – | – | – | 1.00 | – | – | – | 1.0e-04 |"
    assert f"| unet | eager_ls {plain}" in table
    assert "8 interleaved rounds of 5 steps, batch 64 (unet)." in table


def test_fewer_rounds_and_stale_code_are_said(tmp_path):
    table = render(tmp_path, [record("ours_ls", rounds=3, source_sha256="0" * 12), record("eager_ls")])
    assert "| unet | ours_ls (stale) |" in table
    assert "3 to 8 interleaved rounds of 5 steps" in table
    assert "8 interleaved rounds of 1 to 5 steps" in render(
        tmp_path, [record("ours_ls", steps_per_round=1), record("eager_ls")]
    )


def test_where_we_lose(tmp_path):
    plain = record("eager_ls", p20_us=39000.0, median_us=40000.0, p80_us=41000.0)
    slow = record("ours_ls", eager=1.25, compile=0.8)
    assert losses([plain, slow]) == ["unet, batch 64, ours_ls: 0.80 × eager_ls"]
    assert "**Where we lose** (how many times faster, beyond the spread): unet, batch 64, ours_ls: 0.80" in render(
        tmp_path, [plain, slow]
    )
    within = record("eager_ls", p20_us=39000.0, median_us=49900.0, p80_us=50500.0)
    assert losses([within, slow]) == []
    assert losses([plain, record("authors_ls", eager=1.25)]) == [], "of ours alone"
    other = {"shape": [8, 3, 64, 64]}
    fast = [record("eager_ls", **other), record("ours_ls", eager=0.5, **other)]
    assert losses([plain, slow, *fast]) == losses([plain, slow]), "another batch hides nothing"


def test_nowhere_is_said_only_of_what_was_compared(tmp_path):
    plain = record("eager_ls")
    ours = record("ours_ls", authors=0.5, eager=0.5, compile=0.5)
    table = render(tmp_path, [plain, ours])
    assert "**Where we lose**: nowhere, beyond the spread." in table
    assert "Not compared" not in table
    table = render(tmp_path, [plain, record("ours_ls", eager=0.5)])
    assert "nowhere that was compared" in table
    assert "Not compared with: unet, batch 64: authors_ls, compile_ls." in table
    other = record("eager_ls", shape=[8, 3, 64, 64])
    assert not_compared([plain, ours, other]) == ["unet, batch 8: no step of ours was timed"]


@pytest.mark.parametrize(
    ("name", "no_scaling", "authors"),
    [("ours_compile_cs", "ours_compile_none", "authors_cs"), ("eager_none", "eager_none", "authors_none")],
)
def test_what_a_recipe_is_compared_with(name, no_scaling, authors):
    found = references(name)
    assert found["no_scaling"] == no_scaling
    assert found["authors"] == authors
    assert found["compile_none"] == "compile_none"

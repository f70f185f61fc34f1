"""The tables and bars that are made of ``ops.json``."""

import json

import pytest

from benchmarks import environment, report, report_ops

CPU = {**environment.describe(environment.torch.device("cpu")), "machine": "cpu-test", "cpu_model": "Test CPU"}
GPU = {**CPU, "machine": "nvidia-test", "device": "NVIDIA Test", "cuda": "13.0"}


def record(variant, median, *, direction="fwd_bwd", op="ls_skip_linear", eager=100.0, plan=None, **changes):
    timed = median is not None
    return {
        "op": op,
        "shape": [128, 257, 512],
        "dtype": "bfloat16",
        "layout": "rows",
        "direction": direction,
        "variant": variant,
        "plan": plan or (None if variant in ("eager", "compile") else variant),
        "dispatch": "pointer_cublas",
        "note": None if timed else "plan 'tma' of ls_skip_linear not supported: reason",
        "failed": False,
        "median_us": median,
        "p20_us": timed and median * 0.99,
        "p80_us": timed and median * 1.01,
        "speed_up_over_eager": eager / median if timed else None,
        "speed_up_over_compile": 60.0 / median if timed else None,
        "fraction_of_floor": 30.0 / median if timed else None,
        "peak_mib": 64.0 if timed else None,
        "host_us": 50.0 if timed else None,
        "launches": 5 if timed else None,
        "sources": [],
        "source_sha256": environment.source_hash([]),
        **changes,
    }


FAST = [
    record("eager", 100.0),
    record("compile", 60.0),
    record("dispatch", 42.0, plan="pointer_cublas"),
    record("pointer_cublas", 41.0),
    record("two_gemm", 120.0),
    record("tma", None),
]


def write(root, records, where):
    folder = root / "results" / where["machine"]
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"copy_gb_s": 4300.0, "matmul_tflop_s": {"bf16": 790.0}, "products": []}
    settings = {"rounds": 20, "visit_ms": 5.0}
    result = {"environment": where, "settings": settings, "ceilings": limits, "records": records}
    (folder / "ops.json").write_text(json.dumps(result))
    return result


def test_a_row_sets_dispatch_in_relation(tmp_path):
    write(tmp_path, FAST, GPU)
    table = report.render("ops", tmp_path / "results", tmp_path)
    row = "| ls_skip_linear 128×257×512 bf16 | 100 | 60 | pointer_cublas 42 | 2.38 | 1.43 | 71% "
    assert row + "| pointer_cublas 41 | 5 | 64 (64) | 50 (50) |" in table
    assert "No GPU measurement" not in table
    assert "(stale)" not in table
    assert "4.3e+03 GB/s" in table


def test_missing_gpu_evidence_is_said_plainly(tmp_path):
    write(tmp_path, FAST, CPU)
    assert report.render("ops", tmp_path / "results", tmp_path).endswith(report_ops.NO_GPU)
    write(tmp_path, FAST, GPU)
    assert report_ops.NO_GPU not in report.render("ops", tmp_path / "results", tmp_path)


def test_a_stale_source_and_a_fault_are_shown(tmp_path):
    records = [*FAST, record("tma", None, failed=True, note="wrong result: nan")]
    records[0] = {**records[0], "source_sha256": "0" * 12}
    write(tmp_path, records, GPU)
    table = report.render("ops", tmp_path / "results", tmp_path)
    assert "| ls_skip_linear 128×257×512 bf16 (stale) |" in table
    assert "**Faults**: ls_skip_linear 128×257×512 bf16: tma: wrong result: nan." in table


def test_where_we_lose_names_what_dispatch_does_there(tmp_path):
    write(tmp_path, FAST, GPU)
    table = report.render("where_we_lose", tmp_path / "results", tmp_path)
    spread = "within the spread"
    assert (
        f"| ls_skip_linear 128×257×512 bf16 | fwd + bwd | two_gemm 0.83 | pointer_cublas | {spread} | {spread} |"
        in table
    )
    slow = [*FAST, *(record(v, m, direction="fwd") for v, m in (("eager", 100.0), ("dispatch", 125.0)))]
    assert report_ops.losses(slow)[1] == ["ls_skip_linear 128×257×512 bf16", "fwd", "–", "dispatch", "0.80", "–"]


def test_where_we_lose_to_the_compiler_is_said_too():
    slower = [record("eager", 100.0), record("compile", 40.0), record("dispatch", 80.0, plan="pointer")]
    expected = ["ls_skip_linear 128×257×512 bf16", "fwd + bwd", "–", "pointer", "within the spread", "0.75"]
    assert report_ops.losses(slower) == [expected]
    assert report_ops.losses([{**r, "direction": "fwd"} for r in slower]) == []


@pytest.mark.parametrize("median", [99.0, 101.0])
def test_a_difference_inside_the_spread_is_no_loss(median, tmp_path):
    write(tmp_path, [record("eager", 100.0), record("dispatch", median), record("two_gemm", median)], GPU)
    assert "no plan is slower" in report.render("where_we_lose", tmp_path / "results", tmp_path)


def test_report_draws_the_bars_and_shows_them(tmp_path, capsys):
    write(tmp_path, [*FAST, record("eager", 10.0, op="se_gate"), record("dispatch", 8.0, op="se_gate")], GPU)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:ops -->\n<!-- /benchmark:ops -->\n")
    keywords = {"pages": [readme], "results": tmp_path / "results", "root": tmp_path}
    assert report.main([], **keywords) == 0
    picture = tmp_path / "docs" / "images" / "ops-nvidia-test.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(docs/images/ops-nvidia-test.png)" in readme.read_text()
    assert report.main(["--check"], **keywords) == 0

    before = picture.read_bytes()
    assert report.main([], **keywords) == 0
    assert picture.read_bytes() == before, "the same numbers make the same picture"


def test_without_matplotlib_the_tables_are_made_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_ops, "draw", lambda result, path: False)
    write(tmp_path, FAST, CPU)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:ops -->\n<!-- /benchmark:ops -->\n")
    assert report.main([], pages=[readme], results=tmp_path / "results", root=tmp_path) == 0
    assert "was not drawn" in capsys.readouterr().out
    assert "docs/images" not in readme.read_text()

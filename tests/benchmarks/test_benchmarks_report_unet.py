"""The decoders of ``ops.json`` added up, and their model."""

import json

import pytest
import torch

from benchmarks import environment, report, report_unet
from benchmarks.decoder_model import modelled_bytes
from benchmarks.floors import total_bytes
from benchmarks.op_cases import Case, cases, decoder_cases
from benchmarks.unet_skips import UNET_BATCH, decoder_skips, unet_config

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HERE = environment.describe(CPU)
MICROSECONDS = {"eager": 100.0, "compile": 40.0, "dispatch": 20.0, "triton": 19.0}


def record(case, variant, direction="fwd_bwd", **changes):
    return {
        "op": case.name,
        "shape": list(case.shape),
        "dtype": case.dtype_name,
        "layout": case.layout,
        "direction": direction,
        "variant": variant,
        "median_us": MICROSECONDS[variant],
        "floor_us": 18.0,
        "sources": [],
        "source_sha256": environment.source_hash([]),
        **changes,
    }


def write(root, records, name="ops", **where):
    folder = root / "results" / where.get("machine", "cpu-test")
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"copy_gb_s": 4300.0, "matmul_tflop_s": {"bf16": 790.0}}
    settings = {"rounds": 8, "steps_per_round": 5, "visit_ms": 5.0}
    result = {"environment": {**HERE, **where}, "settings": settings, "ceilings": limits, "records": records}
    (folder / f"{name}.json").write_text(json.dumps(result))


def all_records(device, reduced=False):
    (group,) = list(decoder_cases(device, reduced).values())[:1]
    return group, [record(case, variant) for case in group for variant in MICROSECONDS]


def test_the_cases_are_the_decoders_of_the_presets():
    found = decoder_cases(CUDA)
    assert list(found) == ["unet_imagenet64, B 64", "unet_cifar10, B 128"]
    for (preset, batch), group in zip(UNET_BATCH.items(), found.values(), strict=True):
        config = unet_config(preset)
        assert sum(group.values()) == config.num_skips == 12
        assert group.total() == 12
        assert all(case.layout == "pixels" and case.pooled and case.raw for case in group)
        assert {case.shape for case in group} == {skip.shape(batch) for skip in decoder_skips(config)}
    assert found["unet_cifar10, B 128"][Case("scale_concat_group_norm", (128, 256, 256, 4, 4), torch.bfloat16, "pixels",
                                             pooled=True, raw=True)] == 3  # fmt: skip
    timed = cases(CUDA)
    assert all(case in timed for group in found.values() for case in group)
    assert all(case in cases(CPU) for group in decoder_cases(CPU).values() for case in group)


@pytest.mark.parametrize(("device", "reduced"), [(CPU, False), (CUDA, True), (CUDA, False)])
def test_a_decoder_is_the_sum_over_its_skips(device, reduced):
    group, records = all_records(device, reduced)
    (row,) = report_unet.decoder_sums(records)
    assert row["model"] in decoder_cases(device, reduced)
    count = sum(group.values())
    assert row["eager"] == pytest.approx(100 * count)
    assert row["compile"] == pytest.approx(40 * count)
    assert row["dispatch"] == pytest.approx(20 * count)
    assert row["floor"] == pytest.approx(18 * count)


def test_half_a_decoder_is_no_decoder():
    group, records = all_records(CPU)
    first = next(iter(group))
    assert report_unet.decoder_sums([r for r in records if tuple(r["shape"]) != first.shape]) == []
    records = [r for r in records if r["variant"] != "compile" or tuple(r["shape"]) != first.shape]
    (row,) = report_unet.decoder_sums(records)
    assert row["compile"] is None
    assert row["dispatch"] > 0


def test_the_table_has_what_was_measured_and_the_model(tmp_path):
    _, records = all_records(CPU)
    write(tmp_path, records)
    table = report.render("decoder", tmp_path / "results", tmp_path)
    assert "| UNet, reduced, B 8 | fwd + bwd | 0.4 | 0.16 | 0.08 | 5.00 | 2.00 | 90% |" in table
    assert "| unet_imagenet64, B 64 | fwd + bwd |" in table
    assert "**Model, not measured**" in table
    assert table.endswith("**No GPU measurement yet.** What the kernels gain on a GPU is predicted, not measured.")
    records[0]["source_sha256"] = "0" * 12
    write(tmp_path, records)
    assert "| UNet, reduced, B 8 (stale) |" in report.render("decoder", tmp_path / "results", tmp_path)


def test_the_model_is_shown_where_nothing_was_measured(tmp_path):
    table = report.render("decoder", tmp_path / "results", tmp_path)
    assert table.startswith("| decoder concat + norm, all skips |")
    assert "| unet_cifar10, B 128 | bwd |" in table
    assert report.render("unet", tmp_path / "results", tmp_path) == report.NOT_MEASURED


def test_a_gpus_decoders_replace_the_words_about_missing_ones(tmp_path):
    _, records = all_records(CUDA)
    write(tmp_path, records, machine="nvidia-test", device="NVIDIA Test", cuda="13.0")
    table = report.render("decoder", tmp_path / "results", tmp_path)
    assert "| unet_imagenet64, B 64 | fwd + bwd | 1.2 | 0.48 | 0.24 | 5.00 | 2.00 | 90% |" in table
    assert "No GPU measurement" not in table
    assert "**Model, not measured**" in table


def test_bytes_by_hand():
    case = Case("scale_concat_group_norm", (2, 64, 32, 8, 8), torch.bfloat16, "pixels", pooled=True, raw=True)
    pixels = 2 * 8 * 8
    assert modelled_bytes(case, "eager", "fwd") == pixels * (36 * 96 + 6 * 32)
    assert modelled_bytes(case, "eager", "bwd") == pixels * (50 * 96 + 20 * 32)
    assert modelled_bytes(case, "compile", "fwd_bwd") == pixels * (26 * 96 + 10 * 32)
    assert modelled_bytes(case, "fused", "bwd") == total_bytes(case, "bwd")

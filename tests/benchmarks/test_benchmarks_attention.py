"""Attention timed, at tiny shapes."""

import json
import sys
import types

import pytest
import torch

from benchmarks import attention, attention_cases, environment, report
from benchmarks.__main__ import main
from benchmarks.attention_cases import AttentionCase, attention_shapes, cases, total_bytes, total_flop
from scalelong_fast.models import UNet, UViT, unet_attention
from scalelong_fast.models import attention as model_attention
from scalelong_fast.models.registry import PRESETS

CPU = torch.device("cpu")
SHAPE = (3, 17, 2, 16)
TINY = [AttentionCase("uvit_digits", SHAPE, dtype) for dtype in (torch.bfloat16, torch.float32)]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    measured = environment.ceilings
    monkeypatch.setattr(environment, "ceilings", lambda device: measured(device, seconds=0.005))


def run(out, *args, selected=TINY):
    args = ["--device", "cpu", "--rounds", "2", "--out", str(out), *args]
    return attention.main(args, selected=selected, visit_seconds=1e-4)


def test_every_backend_is_timed_and_the_report_takes_the_file(tmp_path, capsys):
    out = tmp_path / "results" / "machine" / "attention.json"
    assert run(out) == 0
    assert "cpu_op" in capsys.readouterr().out
    records = json.loads(out.read_text())["records"]
    assert len(records) == 2 * 3 * 6  # dtypes, directions, backends
    for record in records:
        assert record["source_sha256"] == environment.source_hash(record["sources"])
        assert record["failed"] is False
        if record["note"]:
            assert record["median_us"] is record["rel_error"] is None
            continue
        assert record["p20_us"] <= record["median_us"] <= record["p80_us"]
        assert record["rel_error"] < (2e-2 if record["dtype"] == "bfloat16" else 2e-6)
        assert record["peak_mib"] > 0
        assert record["tflop_s"] == pytest.approx(record["flop"] / record["median_us"] / 1e6, rel=1e-3)
        assert record["time_over_sdpa"] > 0
    timed = {(record["variant"], record["dtype"]) for record in records if not record["note"]}
    backends = {"math", "authors_fp32", "sdpa", "cpu_op", "cpu_kept"}
    assert timed == {(b, d) for b in backends for d in ("bfloat16", "float32")} - {("authors_fp32", "float32")}
    table = report.render("attention", tmp_path / "results")
    assert "| uvit_digits | 3 × 17 × 2 × 16 | bf16 | cpu_op |" in table
    assert "xformers: not installed" in table or "xformers: takes no tensors on a CPU" in table
    assert "authors_fp32: the same as sdpa in float32 (3 × 17 × 2 × 16 float32)" in table


def test_a_part_is_measured_anew_and_the_rest_kept(tmp_path):
    out = tmp_path / "attention.json"
    assert run(out, selected=TINY[:1]) == 0
    first = json.loads(out.read_text())["records"]
    assert run(out, selected=TINY[1:]) == 0
    records = json.loads(out.read_text())["records"]
    assert records[: len(first)] == first
    assert {record["dtype"] for record in records[len(first) :]} == {"float32"}


def test_a_backend_that_computes_something_else_is_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention_cases, "recomputed_attention", lambda qkv, scale: 1.1 * qkv[:, :, 2].flatten(2))
    out = tmp_path / "attention.json"
    assert run(out, selected=TINY[1:]) == 1
    assert "cpu_op: wrong result" in capsys.readouterr().out
    records = [record for record in json.loads(out.read_text())["records"] if record["variant"] == "cpu_op"]
    assert all(record["failed"] and record["median_us"] is None for record in records)


def test_without_time_nothing_is_timed(tmp_path, capsys):
    assert run(tmp_path / "attention.json", "--seconds", "0") == 0
    assert "Time is up; not measured: attention 3 × 17 × 2 × 16 bfloat16, attention" in capsys.readouterr().out


def test_xformers_is_called_where_it_can_be(monkeypatch):
    calls = []

    def memory_efficient_attention(q, k, v, scale):
        calls.append(q.shape)
        if q.dtype == torch.float32:
            raise NotImplementedError("No operator found\nfor this")
        out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale)
        return out.transpose(1, 2)

    fake = types.ModuleType("xformers.ops")
    fake.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    obstacle = {v.name: v.obstacle for v in attention_cases.variants(TINY[0], CPU, TINY[0].example(CPU))}
    assert obstacle["xformers"] == "takes no tensors on a CPU"
    assert calls == []

    def on_gpu(q, k, v, scale, backend):  # the model refuses tensors on a CPU
        return memory_efficient_attention(q, k, v, scale).flatten(2)

    monkeypatch.setattr(attention_cases, "attend", on_gpu)
    for case, expected in zip(TINY, [None, "not supported: No operator found"], strict=True):
        example = case.example(CPU)
        assert attention_cases._xformers_obstacle(case, torch.device("cuda"), example) == expected
        assert example.args[0].grad is None
    assert len(calls) == 2


def seen_shapes(config, monkeypatch):
    """(L, H, d) of every self-attention that a network makes, in one pass over tensors without storage."""
    found = []

    def watched(original, joint):
        def note(first, *rest):
            if joint or first.shape == rest[0].shape:  # else it is attention to the text
                found.append((first.shape[1], *first.shape[-2:]))
            return original(first, *rest)

        return note

    for module in (model_attention, unet_attention):
        for name in ("attend", "attend_jointly"):
            monkeypatch.setattr(module, name, watched(getattr(module, name), name == "attend_jointly"))
    with torch.device("meta"):
        network = (UNet if hasattr(config, "channel_mult") else UViT)(config)
        labels = torch.zeros(1, dtype=torch.int64) if config.num_classes > 0 else None
        if config.clip_dim > 0:
            labels = torch.empty(1, config.num_clip_token, config.clip_dim)
        network(torch.empty(1, *network.input_shape), torch.empty(1), labels)
    return set(found)


@pytest.mark.parametrize("name", ["uvit_m4", "uvit_t2i_s2", "unet_cifar10", "unet_imagenet64_large", "unet_coco"])
def test_shapes_are_those_of_the_network(name, monkeypatch):
    assert set(attention_shapes(PRESETS[name])) == seen_shapes(PRESETS[name], monkeypatch)


def test_a_gpu_is_given_all_presets_and_a_cpu_some():
    gpu, cpu = cases(torch.device("cuda")), cases(CPU)
    assert {case.shape[1:] for case in cpu} < {case.shape[1:] for case in gpu}
    assert len({(case.shape, case.dtype) for case in gpu}) == len(gpu)
    assert all(case.shape[2] * case.shape[1] ** 2 * case.shape[0] <= 1 << 28 for case in gpu)
    assert {case.dtype for case in gpu} > {case.dtype for case in cpu}


def test_flop_and_bytes_are_those_of_the_products_and_the_tensors():
    assert total_flop((1, 2, 3, 4), "fwd") == 2 * (2 * 3 * 2 * 2 * 4)
    assert total_flop((1, 2, 3, 4), "fwd_bwd") == 3 * total_flop((1, 2, 3, 4), "fwd")
    case = TINY[0]
    qkv = case.example(CPU).args[0]
    assert total_bytes(case, "fwd") == qkv.nbytes + qkv.nbytes // 3
    assert total_bytes(case, "fwd_bwd") == total_bytes(case, "fwd") + total_bytes(case, "bwd")


@pytest.mark.parametrize(("args", "message"), [(["--rounds", "0"], "--rounds"), (["--model", "uvit_s3"], "uvit_s2")])
def test_bad_values_are_refused(args, message, capsys):
    assert main(["attention", "--device", "cpu", *args]) == 2
    assert message in capsys.readouterr().err

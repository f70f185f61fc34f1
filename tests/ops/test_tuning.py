"""Tuning: the fastest plan is taken from then on, here and in later processes, and nothing can go badly wrong."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.ops import explain_plan, layer_norm_gap, se_gate, tune, tuning
from scalelong_fast.ops.examples import example_arguments
from scalelong_fast.ops.layer_norm_gap import _problem
from scalelong_fast.ops.tables import RULES
from scalelong_fast.ops.tuned import cache_file, exact_rule, load_tuned, put_in_front

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A folder for the cache, no interpreter, and the rules as they were afterwards."""
    monkeypatch.setenv("SCALELONG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("SCALELONG_PLAN", raising=False)
    before = dict(RULES)
    yield tmp_path / "cache"
    RULES.clear()
    RULES.update(before)


@pytest.fixture
def clock(monkeypatch):
    """``clock(native=2.0, eager=1.0)``: what the plans of an op will be said to take, in milliseconds."""

    def set_times(**times):
        monkeypatch.setattr(tuning, "_interleaved", lambda steps, *_: {name: times[name] for name in steps})

    return set_times


def call(rows=6, width=8, device="cpu"):
    return example_arguments("layer_norm_gap", (1, rows, width), torch.float32, device).args


def entries(op="layer_norm_gap"):
    return json.loads(cache_file(CPU).read_text())["plans"][op]


def test_the_fastest_plan_is_taken_from_then_on(clock):
    assert explain_plan("layer_norm_gap", *call()).plan == "native"
    clock(native=2.0, eager=1.0)
    result = tune(layer_norm_gap, *call())
    assert (result.plan, result.times_ms) == ("eager", {"eager": 1.0, "native": 2.0})
    assert "Triton" in result.skipped["triton"]
    assert str(result) == "layer_norm_gap: plan 'eager' (eager 1 ms, native 2 ms)"
    choice = explain_plan("layer_norm_gap", *call())
    assert choice.plan == "eager"
    assert choice.reason.startswith("tuned on ")


def test_only_calls_of_exactly_that_kind_follow(clock):
    clock(native=2.0, eager=1.0)
    tune("layer_norm_gap", *call(6, 8))
    for other in (call(7, 8), call(6, 9), [t.detach().bfloat16() for t in call(6, 8)]):
        assert explain_plan("layer_norm_gap", *other).plan == "native"


def test_a_difference_within_the_noise_changes_nothing(clock):
    clock(native=1.01, eager=1.0)
    assert tune("layer_norm_gap", *call()).plan == "native"


def test_tuning_again_replaces_what_was_found(clock):
    clock(native=2.0, eager=1.0)
    tune("layer_norm_gap", *call())
    clock(native=1.0, eager=2.0)
    assert tune("layer_norm_gap", *call()).plan == "native"
    assert [entry["plan"] for entry in entries()] == ["native"]
    tune("layer_norm_gap", *call(9))
    assert len(entries()) == 2
    assert len([rule for rule in RULES["layer_norm_gap", "cpu"] if "tuned" in rule.reason]) == 2


def test_real_times(cache):
    result = tuning.tune_call("layer_norm_gap", call(40, 32), {}, rounds=3, seconds=1e-3)
    assert set(result.times_ms) == {"native", "eager"}
    assert all(ms > 0 for ms in result.times_ms.values())
    assert result.times_ms[result.plan] <= min(result.times_ms.values()) * (1 + tuning.MARGIN)
    assert result.path == cache_file(CPU)
    assert result.path.parent == cache / "plans"


def test_calls_without_gradients_are_timed_forward_only():
    args = [t.detach() for t in call()]
    assert tuning.tune_call("layer_norm_gap", args, {}, rounds=1, seconds=0.0).times_ms


def test_where_there_is_no_choice_nothing_is_stored(cache):
    args = example_arguments("se_gate", (3, 20), torch.float32, "cpu").args
    result = tuning.tune_call(se_gate, args, {}, rounds=1, seconds=0.0)
    assert (result.plan, result.path) == ("eager", None)
    assert not cache.exists()


def test_the_file_names_device_and_versions():
    name = cache_file(CPU).name
    assert f"-torch{torch.__version__}-triton" in name
    assert name.endswith(".json")


def test_another_process_reads_it_on_first_use_and_not_on_import(clock):
    clock(native=2.0, eager=1.0)
    tune("layer_norm_gap", *call())
    program = """
import pathlib
read = pathlib.Path.read_text
pathlib.Path.read_text = lambda path, *a, **k: print("read", path.name) or read(path, *a, **k)
import scalelong_fast.ops as ops, torch
print("imported")
x, w = torch.ones(1, 6, 8), torch.ones(8)
print(ops.explain_plan("layer_norm_gap", x, w, w).plan, ops.explain_plan("layer_norm_gap", x[:, :5], w, w).plan)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ}
    )
    before, after = done.stdout.split("imported\n")
    assert cache_file(CPU).name not in before
    assert after.count(f"read {cache_file(CPU).name}") == 1
    assert after.splitlines()[-1] == "eager native"
    assert done.stderr == ""


GOOD = {
    "plan": "eager", "dtypes": ["float32"], "layouts": ["rows"], "rows": [6, 6], "batch": [1, 1], "hidden": [0, 0],
    "widths": [8], "aligned": True, "date": "2026-01-01",
}  # fmt: skip


def file_with(**changes):
    return json.dumps({"device": "a device", "plans": {"layer_norm_gap": [{**GOOD, **changes}]}})


def write(text):
    path = cache_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_sound_file_is_read():
    write(file_with())
    load_tuned(CPU, "cpu")
    choice = explain_plan("layer_norm_gap", *call())
    assert (choice.plan, choice.reason) == ("eager", "tuned on a device, 2026-01-01")


CORRUPT = [
    "", "{", "[]", "null", "{}", '{"plans": 3}', '{"device": "x", "plans": {"layer_norm_gap": [3]}}', b"\xff\xfe\x00",
    file_with(rows="many"), file_with(rows=[1]), file_with(rows=["1", "2"]), file_with(widths=[None]),
    file_with(plan=3), file_with(plan=None), file_with()[:-30],
]  # fmt: skip


@pytest.mark.parametrize("text", CORRUPT)
def test_a_corrupt_file_is_ignored_with_a_warning_and_mended_by_tuning(text, clock):
    path = write(text)
    rules = dict(RULES)
    with pytest.warns(UserWarning, match="does not hold tuned plans") as seen:
        load_tuned(CPU, "cpu")
    assert str(path) in str(seen[0].message)
    assert rules == RULES
    clock(native=2.0, eager=1.0)
    with pytest.warns(UserWarning, match="does not hold tuned plans"):
        tune("layer_norm_gap", *call())
    assert [entry["plan"] for entry in entries()] == ["eager"]
    load_tuned(CPU, "cpu")


def test_a_plan_that_is_no_more_is_passed_over():
    write(file_with(plan="forgotten"))
    load_tuned(CPU, "cpu")
    assert explain_plan("layer_norm_gap", *call()).plan == "native"


def test_without_a_file_nothing_happens(recwarn):
    load_tuned(CPU, "cpu")
    assert not recwarn


def test_a_broken_write_leaves_the_old_file(clock, monkeypatch):
    clock(native=2.0, eager=1.0)
    path = tune("layer_norm_gap", *call()).path
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        tune("layer_norm_gap", *call(9))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_a_warning_only(clock, monkeypatch):
    monkeypatch.setenv("SCALELONG_CACHE", os.devnull)
    clock(native=2.0, eager=1.0)
    with pytest.warns(UserWarning, match="SCALELONG_CACHE"):
        result = tune("layer_norm_gap", *call())
    assert result.path is None
    assert explain_plan("layer_norm_gap", *call()).plan == "eager"


def native_that(monkeypatch, behaviour):
    monkeypatch.setattr(importlib.import_module("scalelong_fast.ops.layer_norm_gap"), "native_forward", behaviour)


def test_a_plan_with_wrong_results_is_never_taken(clock, monkeypatch):
    def wrong(x, weight, bias, eps, out_dtype):
        return torch.zeros_like(x), x.mean(-1), x.mean(-1)

    native_that(monkeypatch, wrong)
    clock(native=1.0, eager=100.0)
    result = tune("layer_norm_gap", *call())
    assert (result.plan, result.skipped["native"]) == ("eager", "its results differ from eager's")


def test_a_plan_that_fails_is_passed_over(clock, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of registers\nand more")

    native_that(monkeypatch, fails)
    clock(native=1.0, eager=100.0)
    result = tune("layer_norm_gap", *call())
    assert (result.plan, result.skipped["native"]) == ("eager", "RuntimeError: out of registers")


def test_a_compiled_caller_notices():
    """torch.compile guards on the rules it read."""
    args = call()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(layer_norm_gap, fullgraph=True, backend=backend)
    compiled(*args)
    compiled(*args)
    assert len(graphs) == 1
    put_in_front("layer_norm_gap", "cpu", [exact_rule("eager", _problem(*args), "said so")])
    compiled(*args)
    assert len(graphs) == 2


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match="op: got 'layer_norm'"):
        tune("layer_norm", *call())
    with pytest.raises(UserError, match="weight: got"):
        x, weight, bias = call()
        tune(layer_norm_gap, x, weight[1:], bias)


def test_the_interpreters_times_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        tune("layer_norm_gap", *call())


def test_it_is_refused_during_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        tune("layer_norm_gap", *call())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    args = call(64, 64, "cuda")
    result = tuning.tune_call("layer_norm_gap", args, {}, rounds=3, seconds=1e-3)
    assert set(result.times_ms) == {"triton", "eager"}
    assert result.path == cache_file(torch.device("cuda"))
    assert explain_plan("layer_norm_gap", *args).reason.startswith("tuned on ")

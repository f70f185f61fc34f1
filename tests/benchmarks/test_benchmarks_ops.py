"""``python -m benchmarks ops`` on tiny cases."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import environment, floors, op_timing, op_variants, ops, report
from benchmarks.__main__ import main
from benchmarks.op_cases import GPU_IMAGES, GPU_ROWS, GPU_UNET_IMAGES, OPS, Case, cases
from benchmarks.op_timing import Accuracy, Error, WrongResultError, check_accuracy
from benchmarks.op_variants import no_interpreter, variants
from scalelong_fast.ops import list_plans
from scalelong_fast.ops.problem import interpreting

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
ROWS, IMAGES, IMAGE = (2, 19, 16), (2, 8, 12, 3, 5), (2, 12, 3, 5)

TINY = [
    Case("ls_skip_linear", ROWS, FP32),
    Case("ls_skip_linear", ROWS, BF16, pooled=True),
    Case("ls_skip_linear", ROWS, BF16, stream=FP32),
    Case("ls_scale_concat", ROWS, BF16),
    Case("ls_scale_concat", IMAGES, FP32, "pixels"),
    Case("add_layer_norm_gap", ROWS, BF16, stream=FP32),
    Case("scale_concat_linear", ROWS, FP32),
    Case("scale_concat", ROWS, FP32),
    Case("scale_concat", IMAGES, BF16, "planes"),
    Case("scale_concat_group_norm", IMAGES, BF16, "pixels", pooled=True, raw=True),
    Case("scale_concat_conv1x1", IMAGES, BF16, "pixels"),
    Case("group_norm_gap", IMAGE, BF16, "pixels"),
    Case("channel_stats", IMAGE, FP32, "planes"),
    Case("layer_norm_gap", ROWS, FP32),
    Case("se_gate", ROWS[:2], FP32),
]

#: Of gpu-checklist's schema, and what the tables need besides.
FIELDS = {
    *("op", "shape", "dtype", "direction", "variant", "median_us", "p20_us", "p80_us", "bytes", "flop", "peak_mib"),
    *("rel_error", "sources", "source_sha256", "layout", "plan", "dispatch", "note", "failed", "timer", "gb_s"),
    *("fraction_of_floor", "floor_us", "host_us", "launches", "speed_up_over_eager", "speed_up_over_compile", "run"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short measurements; torch.compile stops before Inductor, which takes seconds."""
    measured = floors.environment.ceilings
    monkeypatch.setattr(floors.environment, "ceilings", lambda device, seconds: measured(device, seconds=0.005))
    monkeypatch.setattr(floors.environment, "fastest", lambda call, device, seconds: 1e-3)
    monkeypatch.setattr(op_variants.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(ops, "host_seconds", functools.partial(op_timing.host_seconds, samples=3))


def run(out, selected, *args, **kwargs):
    return ops.main(["--device", "cpu", "--rounds", "2", "--out", str(out), *args], selected=selected,
                    visit_seconds=1e-4, **kwargs)  # fmt: skip


def test_the_file_has_every_variant_and_direction_of_every_case(tmp_path, capsys):
    out = tmp_path / "results" / "machine" / "ops.json"
    assert run(out, TINY) == 0
    result = json.loads(out.read_text())
    assert set(result) == {"environment", "settings", "ceilings", "records"}
    assert {"copy_gb_s", "matmul_tflop_s", "products"} == set(result["ceilings"])
    assert result["environment"]["machine"].startswith("cpu-")

    found = {}
    for record in result["records"]:
        assert set(record) == FIELDS
        assert record["source_sha256"] == environment.source_hash(record["sources"])
        assert not record["failed"]
        found.setdefault(ops._identity(record), set()).add((record["variant"], record["direction"]))
        if record["median_us"] is None:
            assert "not supported: " in record["note"]
            continue
        assert record["p20_us"] <= record["median_us"] <= record["p80_us"]
        assert record["gb_s"] == pytest.approx(record["bytes"] / record["median_us"] / 1e3, abs=0.006)
        assert record["peak_mib"] > 0
        assert record["rel_error"] < (2e-2 if "bfloat16" in record["dtype"] else 1e-5)
        assert record["launches"] is None, "a CPU launches nothing"
        assert (record["host_us"] is None) == (record["variant"] == "compile")
    assert set(found) == {case.key for case in TINY}
    for case in TINY:
        names = {"eager", "compile", "dispatch", *list_plans(case.op)}
        assert found[case.key] == {(name, direction) for name in names for direction in ("fwd", "bwd", "fwd_bwd")}

    screen = capsys.readouterr().out
    assert "Summary" in screen
    assert "ls_skip_linear_pooled 2×19×16 bf16" in screen
    table = report.render("ops", tmp_path / "results")
    assert "| ls_skip_linear 2×19×16 fp32→bf16 |" in table
    assert "**No GPU measurement yet.**" in table
    assert report.render("where_we_lose", tmp_path / "results")


def test_triton_is_not_timed_in_the_interpreter(tmp_path):
    assert interpreting(), "the tests run with the interpreter on"
    out = tmp_path / "ops.json"
    assert run(out, TINY[-1:], without=["compile"]) == 0
    assert interpreting(), "and it is on again"
    (note,) = {r["note"] for r in json.loads(out.read_text())["records"] if r["variant"] == "triton"}
    assert "the tensors are on the CPU" in note
    with pytest.raises(RuntimeError, match="no_interpreter"):
        variants(TINY[-1], CPU)


def test_cases_that_were_not_selected_keep_their_records(tmp_path):
    out = tmp_path / "ops.json"
    run(out, TINY[-2:], without=["compile"])
    first = json.loads(out.read_text())["records"]
    run(out, TINY[-1:], without=["compile"])
    second = json.loads(out.read_text())["records"]
    norm = [record for record in second if record["op"] == "layer_norm_gap"]
    assert norm == [record for record in first if record["op"] == "layer_norm_gap"]
    assert len(second) == len(first)

    assert run(out, TINY[-2:], "--missing", without=["compile"]) == 0
    assert json.loads(out.read_text())["records"] == second, "nothing was missing"


def test_stale_or_foreign_records_are_not_kept(tmp_path):
    out = tmp_path / "ops.json"
    run(out, TINY[-2:], without=["compile"])
    content = json.loads(out.read_text())
    where = content["environment"]
    assert len(ops.kept_records(out, where)) == len(content["records"])
    assert ops.kept_records(out, {**where, "date": "another"}) == content["records"]
    assert ops.kept_records(out, {**where, "torch": "another"}) == []
    content["records"][0]["source_sha256"] = "0" * 12  # one stale record: its whole case is to be measured again
    out.write_text(json.dumps(content))
    assert {record["op"] for record in ops.kept_records(out, where)} == {"se_gate"}
    out.write_text("{")
    assert ops.kept_records(out, where) == []


def test_no_case_is_begun_after_the_time_is_up(tmp_path, capsys):
    result, _, faults = ops.measure(CPU, TINY[-1:], rounds=1, out=tmp_path / "ops.json", seconds=0.0)
    assert result["records"] == faults == []
    assert "not measured: se_gate 2 × 19" in capsys.readouterr().out


def test_a_variant_that_computes_something_else_fails_loudly(tmp_path, monkeypatch, capsys):
    case = TINY[-1]
    right = case.reference()

    def wrong(self):
        return lambda *args: right(*args) * 1.001

    monkeypatch.setattr(Case, "public", wrong)
    out = tmp_path / "ops.json"
    assert run(out, [case], without=["compile"]) == 1
    assert "wrong result" in capsys.readouterr().out
    records = json.loads(out.read_text())["records"]
    assert {r["variant"] for r in records if r["failed"]} == {"dispatch"}
    assert all(r["median_us"] is None for r in records if r["failed"])
    assert all(r["median_us"] is not None for r in records if r["variant"] == "eager"), "the others are still timed"


def test_a_variant_that_raises_fails_loudly(tmp_path, monkeypatch):
    def broken(self):
        def function(*args):
            raise RuntimeError("no such kernel\nsecond line")

        return function

    monkeypatch.setattr(Case, "public", broken)
    out = tmp_path / "ops.json"
    assert run(out, TINY[-1:], without=["compile"]) == 1
    notes = {r["note"] for r in json.loads(out.read_text())["records"] if r["failed"]}
    assert notes == {"failed: RuntimeError: no such kernel"}


def errors(*values, elements=1000):
    return tuple(Error(value, elements) for value in values)


@pytest.mark.parametrize("error", [4.1e-3, math.nan, math.inf])
def test_an_error_beyond_four_times_pytorchs_is_refused(error):
    eager = Accuracy(errors(1e-3), errors(1e-3, 1e-3))
    check_accuracy(TINY[0], "plan", Accuracy(errors(3.9e-3), errors(0.0, 3.9e-3)), eager)
    wrong = Accuracy(errors(1e-3), errors(1e-3, error))
    with pytest.raises(WrongResultError, match="plan: gradient 1"):
        check_accuracy(TINY[0], "plan", wrong, eager)
    assert wrong.worst("fwd") == 1e-3
    assert wrong.worst("fwd_bwd") == pytest.approx(error, nan_ok=True)


def test_a_few_numbers_that_pytorch_got_right_by_chance_are_no_yardstick():
    eager = Accuracy(errors(1e-7), errors(2e-6) + errors(1e-8, elements=1))
    check_accuracy(TINY[0], "plan", Accuracy(errors(1e-7), errors(1e-6) + errors(5e-6, elements=1)), eager)
    with pytest.raises(WrongResultError, match="gradient 1"):
        check_accuracy(TINY[0], "plan", Accuracy(errors(1e-7), errors(1e-6) + errors(9e-6, elements=1)), eager)


def test_peak_memory_is_counted():
    x = torch.randn(1 << 16)
    assert op_timing.peak_bytes(lambda: torch.cat([x * 2, x * 3]), CPU) == pytest.approx(4 * x.nbytes, abs=64)
    assert op_timing.peak_bytes(lambda: x.mul(2).mul(3), CPU) == pytest.approx(2 * x.nbytes, abs=64)


def test_a_call_does_not_find_its_own_arguments_in_the_cache():
    case = Case("scale_concat", (32, 257, 256), FP32)
    sets = op_timing.argument_sets(case, CPU)
    assert len(sets) == 2
    addresses = [t.data_ptr() for example in sets for t in example.tensors()]
    assert len(set(addresses)) == len(addresses)
    pixels = op_timing.argument_sets(Case("scale_concat", IMAGES, FP32, "pixels"), CPU)
    assert all(e.args[0].is_contiguous(memory_format=torch.channels_last) for e in pixels)
    assert all((t != 0).any() for example in pixels for t in example.tensors())


@pytest.mark.parametrize("direction", floors.DIRECTIONS)
def test_eager_is_timed_on_contiguous_images_and_the_others_on_the_cases_own(direction):
    case = Case("scale_concat_group_norm", (2, 8, 12, 4, 4), FP32, "pixels", pooled=True, raw=True)
    with no_interpreter():
        found = {variant.name: variant for variant in variants(case, CPU)}
        example = case.example(CPU)
        seen = {}

        def watched(variant):
            def function(*args, **kwargs):
                seen[variant.name] = args[0], variant.function(*args, **kwargs)
                return seen[variant.name][1]

            return dataclasses.replace(variant, function=function)

        for name in ("eager", "dispatch"):
            (call,) = op_timing.make_calls(case, watched(found[name]), [example], direction)
            call()
    for name, last in (("eager", False), ("dispatch", True)):
        x, outputs = seen[name]
        assert x.requires_grad
        assert x.is_contiguous(memory_format=torch.channels_last) is last
        gradients = case.cotangents(outputs)
        assert all(g.is_contiguous(memory_format=torch.channels_last) is last for g in gradients)
    torch.testing.assert_close(seen["eager"][1], seen["dispatch"][1])


def test_a_baseline_is_what_a_user_writes_and_not_the_definition():
    """The definitions compute in float32 from end to end: as baselines they would flatter what is compared to them."""
    case = Case("scale_concat_group_norm", IMAGES, BF16, "pixels")
    assert case.baseline() is not case.reference()
    with no_interpreter():
        eager, compiled = variants(case, CPU)[:2]
    assert eager.function is case.baseline()
    assert eager.sources == compiled.sources == ("benchmarks/unet_baselines.py",)
    linear = Case("scale_concat_linear", ROWS, FP32)
    assert linear.baseline() is linear.reference()


def test_a_baseline_may_lack_an_output_but_none_of_ours_may():
    case = Case("group_norm_gap", IMAGE, FP32, "pixels")
    example = case.example(CPU)
    definition = op_variants.Variant("definition", case.reference())
    cotangents = case.cotangents(definition(case, example))
    exact = op_timing.exact_results(case, example, cotangents)
    baseline = op_variants.Variant("eager", case.baseline(), planes=True)
    assert len(op_timing.accuracy(case, baseline, example, cotangents, exact).forward) == 2
    ours = op_variants.Variant("eager", case.baseline(), plan="eager")
    with pytest.raises(ValueError, match="argument 2 is longer"):
        op_timing.accuracy(case, ours, example, cotangents, exact)


def test_sources_follow_the_imports():
    files = op_variants.op_files("ls_skip_linear")
    assert {"scalelong_fast/ops/ls_skip_linear.py", "scalelong_fast/ops/se_gate.py", "kernels/se.py"} <= set(files)
    assert "scalelong_fast/ops/plans.py" not in files
    with no_interpreter():
        on_cpu = next(v for v in variants(TINY[0], CPU) if v.name == "dispatch").sources
    assert on_cpu
    assert not any(path.startswith("kernels/") for path in on_cpu), "no kernel of ours runs on a CPU"


def test_the_gpu_is_given_the_published_shapes():
    gpu = cases(torch.device("cuda"))
    for shape in GPU_ROWS:
        assert Case("ls_skip_linear", shape, BF16) in gpu
    assert GPU_ROWS == ((128, 257, 512), (128, 258, 768), (128, 258, 1024), (256, 334, 512))
    assert Case("scale_concat", GPU_IMAGES[0], BF16, "pixels") in gpu
    assert {case.op for case in gpu} == {case.op for case in cases(CPU)} == set(OPS)
    assert Case("scale_concat_group_norm", GPU_UNET_IMAGES[-1], BF16, "planes", pooled=True, raw=True) in gpu
    assert Case("channel_stats", (64, 160, 64, 64), BF16, "pixels") in gpu
    assert max(math.prod(case.shape) for case in cases(torch.device("cuda"), reduced=True)) < 1e8
    assert len({case.key for case in gpu}) == len(gpu)


def test_a_case_whose_reference_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def example(self, device, batch=None):
        if self.op == "layer_norm_gap":
            raise torch.OutOfMemoryError("no room\nsecond line")
        return original(self, device, batch)

    original = Case.example
    monkeypatch.setattr(Case, "example", example)
    out = tmp_path / "ops.json"
    assert run(out, TINY[-2:], without=["compile"]) == 1
    assert "layer_norm_gap 2 × 19 × 16 float32: OutOfMemoryError: no room" in capsys.readouterr().out
    assert {record["op"] for record in json.loads(out.read_text())["records"]} == {"se_gate"}


def test_a_variant_that_fails_while_it_is_prepared_has_no_times(tmp_path, monkeypatch):
    make_visit = ops.make_visit

    def failing(case, variant, examples, direction, device):
        if variant.name == "dispatch" and direction == "fwd_bwd":
            raise RuntimeError("out of resources")
        return make_visit(case, variant, examples, direction, device)

    monkeypatch.setattr(ops, "make_visit", failing)
    out = tmp_path / "ops.json"
    assert run(out, TINY[-1:], without=["compile"]) == 1
    records = json.loads(out.read_text())["records"]
    assert all((r["median_us"] is None) == (r["variant"] != "eager") for r in records)


@pytest.mark.gpu
def test_a_gpu_replays_graphs_and_counts_launches(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    out = tmp_path / "ops.json"
    selected = [Case("ls_scale_concat", (16, 257, 64), BF16), Case("add_layer_norm_gap", (16, 257, 64), BF16)]
    args = ["--device", "cuda", "--rounds", "2", "--out", str(out)]
    assert ops.main(args, selected=selected, visit_seconds=1e-3) == 0
    for record in json.loads(out.read_text())["records"]:
        if record["median_us"] is not None:
            assert record["timer"] == "cuda_graph"
            assert record["launches"] > 0
            assert record["peak_mib"] > 0
            assert record["host_us"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--op", "scale_conct"], "Did you mean 'scale_concat'"),
        (["--rounds", "0"], "--rounds: got 0"),
        (["--device", "cdua"], "expected auto"),
    ],
)
def test_bad_values_are_refused(args, message, tmp_path, capsys):
    assert main(["ops", "--out", str(tmp_path / "ops.json"), *args]) == 2
    assert message in capsys.readouterr().err


def test_pytest_benchmark_has_the_same_cases():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-k", "se_gate and dispatch"]
    # without pytest-xdist's marks of a worker, in which pytest-benchmark times nothing
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET" and "XDIST" not in key}
    done = subprocess.run(command, cwd=environment.ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for direction in ("fwd", "bwd", "fwd_bwd"):
        assert f"benchmark 'se_gate 16 × 257 float32 {direction}': 1 tests" in done.stdout


def test_it_works_without_rich(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.screen.Console", None)
    assert run(tmp_path / "ops.json", TINY[-1:], without=["compile"]) == 0
    out = capsys.readouterr().out
    assert "\nvariant           direction " in out or "\nvariant " in out
    assert "│" not in out

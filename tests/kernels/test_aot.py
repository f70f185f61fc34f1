"""Compiled code of every kernel, for GPUs that need not be there (``python -m benchmarks aot``)."""

import ast
import json
import os
import subprocess
import sys

import pytest

from benchmarks import environment
from benchmarks.aot_cases import covered
from benchmarks.environment import ROOT
from benchmarks.gpu_code import TARGETS
from benchmarks.report import is_stale

triton = pytest.importorskip("triton")

#: Tensor memory accelerators, which kernels with _tma in their names need, came with sm_90.
WITHOUT_TMA = {"sm_80", "gfx942"}


def run(*command, **changes):
    """A command in a process that compiles: this one interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env={**env, **changes}, capture_output=True, text=True, timeout=1150)


def jitted_functions():
    """Bodies of all functions of kernels/ with @triton.jit, by name."""
    functions = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list):
                assert node.name not in functions, f"two kernels are called {node.name}"
                functions[node.name] = node
    return functions


def launched_kernels():
    """Those that no other one calls."""
    functions = jitted_functions()
    called = {
        call.func.id
        for node in functions.values()
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    return set(functions) - called


def targets_of(kernel):
    return set(TARGETS) - WITHOUT_TMA if "_tma" in kernel else set(TARGETS)


@pytest.fixture(scope="module")
def planned():
    """What would be compiled, for all targets in one process."""
    process = run("-m", "benchmarks", "aot", "--list")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_a_case_is_there_for_every_kernel():
    assert {WHOLE, *SAMPLED} == set(TARGETS)
    expected = {kernel: targets_of(kernel) for kernel in launched_kernels()}
    assert covered() == expected, "benchmarks/aot_cases.py: a kernel has no case, not for every target, or is gone"


def test_the_calls_launch_every_kernel(planned):
    launched = {(launch["kernel"], launch["target"]) for launch in planned["launches"]}
    assert launched == {(kernel, target) for kernel in launched_kernels() for target in targets_of(kernel)}


def test_the_cases_lead_to_every_launch_configuration(planned):
    assert planned["unused_lines"] == [], "add a shape to benchmarks/aot_cases.py that leads there, or drop the line"


#: Compiled whole here. Of each other target, one launch of every kernel and dtype: the one with most registers in the
#: results, which have all of them.
WHOLE, *SAMPLED = "sm_90", "gfx942", "sm_100", "sm_80"

SAMPLE = """
import json, sys
from benchmarks import aot_units, environment

plans, records = {}, []
for target in sys.argv[1:]:
    units, _ = aot_units.plan([target])
    plans[target] = [unit.launch.key for unit in units]
    known = json.loads((environment.RESULTS / "aot" / f"{target}.json").read_text(encoding="utf-8"))["records"]
    registers, groups = {record["launch"]: record["registers"] for record in known}, {}
    for unit in units:
        groups.setdefault((unit.launch.kernel, unit.call.dtype), []).append(unit)
    for group in groups.values():
        unit = max(group, key=lambda unit: registers.get(unit.launch.key, 0))
        records.append(aot_units.record_of(unit, aot_units.compile_unit(unit)))
print(json.dumps({"plans": plans, "records": records}))
"""


@pytest.fixture(scope="module")
def sampled():
    """The last targets' launches, planned in the opposite order, and the records of some of them."""
    process = run("-c", SAMPLE, *SAMPLED)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def faults_of(records):
    keys = ("target", "kernel", "dtype", "constexprs", "faults", "stack_bytes")
    return [{key: record.get(key) for key in keys} for record in records if record["faults"] or record["stack_bytes"]]


def test_the_order_of_the_targets_changes_no_launch(planned, sampled):
    for target, launches in sampled["plans"].items():
        assert set(launches) == {launch["launch"] for launch in planned["launches"] if launch["target"] == target}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", SAMPLED)
def test_nothing_spills_and_no_instruction_is_missing(target, sampled):
    records = [record for record in sampled["records"] if record["target"] == target]
    assert {record["kernel"] for record in records} == {k for k in launched_kernels() if target in targets_of(k)}
    assert faults_of(records) == []


@pytest.mark.timeout(1200)
def test_nothing_at_all_spills_and_no_instruction_is_missing(planned, tmp_path):
    process = run("-m", "benchmarks", "aot", "--jobs", "2", "--target", WHOLE, "--out", str(tmp_path))
    faults = "\n".join(line for line in process.stdout.splitlines() if line.startswith(WHOLE))
    assert process.returncode == 0, faults or process.stderr
    records = json.loads((tmp_path / f"{WHOLE}.json").read_text())["records"]
    assert {r["launch"] for r in records} == {x["launch"] for x in planned["launches"] if x["target"] == WHOLE}
    assert faults_of(records) == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_results_are_those_of_the_present_kernels(target, planned):
    mend = f"run: python -m benchmarks aot --target {target} && python -m benchmarks report"
    path = environment.RESULTS / "aot" / f"{target}.json"
    assert path.is_file(), mend
    result = json.loads(path.read_text(encoding="utf-8"))
    stale = sorted({record["kernel"] for record in result["records"] if is_stale(record)})
    assert not stale, f"{', '.join(stale)} changed since; {mend}"
    assert not [record["kernel"] for record in result["records"] if record["faults"]]
    if result["environment"]["triton"] == triton.__version__:  # others may name the same launch differently
        present = {launch["launch"] for launch in planned["launches"] if launch["target"] == target}
        assert {record["launch"] for record in result["records"]} == present, f"other launches now; {mend}"


BAD = """
import dataclasses, torch
from benchmarks import aot_cases, aot_units, compiled_traffic
from benchmarks.gpu_code import TARGETS
from scalelong_fast.kernels import configs

def faults_of(name, shape, target="sm_90", only=None, **line):
    index, case = next((i, case) for i, case in enumerate(aot_cases.CASES) if case.name == name)
    aot_cases.CASES[index] = dataclasses.replace(case, shapes=(shape,), dtypes=(torch.bfloat16,))
    if line:
        configs.table(target)["configs"][name] = [line]
    units, _ = aot_units.plan([target], [only or name])
    units = [unit for unit in units if unit.call.case.name == name]
    return [aot_units.record_of(unit, aot_units.compile_unit(unit))["faults"] for unit in units]

aot_cases.CASES = aot_units.CASES = list(aot_cases.CASES)
tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8}
print(faults_of("dual_gemm", aot_cases.S2, meta=tile, num_warps=4, num_stages=3))
configs.launch_config.cache_clear()
print(faults_of("dual_gemm", aot_cases.S2, meta={**tile, "BLOCK_M": 32, "BLOCK_N": 32}, num_warps=4, num_stages=3))
print(faults_of("gap", dataclasses.replace(aot_cases.S2, width=511)))
compiled_traffic.EXPLAINED.clear()
print(faults_of("se", aot_cases.S2, "gfx942", "se_weight"))
"""


def test_bad_code_is_found(tmp_path):
    process = run("-c", BAD, TRITON_CACHE_DIR=str(tmp_path))
    assert process.returncode == 0, process.stderr
    spilling, without_wgmma, narrow, copied = process.stdout.splitlines()
    assert "spills: " in spilling
    assert "no wgmma, but mma" in without_wgmma
    assert "loads have 16 bytes, expected at least 1" in narrow
    assert "stores every element of a tile 4 times, its source once" in copied

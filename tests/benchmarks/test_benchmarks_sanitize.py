"""``python -m benchmarks sanitize``: the calls, and how the tools are asked."""

import subprocess

import pytest
import torch

from benchmarks import sanitize
from benchmarks.__main__ import main
from benchmarks.op_cases import OPS
from benchmarks.op_variants import PYTORCH_PLANS
from scalelong_fast.ops import list_plans


def test_every_kernel_is_found_by_name():
    names = sanitize.kernel_names()
    assert {"se_forward_kernel", "dual_gemm_kernel", "gap_kernel", "scale_concat_kernel"} <= set(names)


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_every_triton_plan_runs_on_some_shape(tool):
    for op in OPS:
        cases = sanitize.sanitizer_cases(op, tool)
        assert cases
        assert all(max(case.shape) < 300 for case in cases), "the tools are slow"


def test_the_calls_run_in_the_interpreter():
    lines = sanitize.run_calls("racecheck", torch.device("cpu"), ["se_gate", "layer_norm_gap", "scale_concat"])
    plans = sum(len([p for p in list_plans(op) if p not in PYTORCH_PLANS]) for op in ("se_gate", "layer_norm_gap"))
    assert len(lines) >= plans + 1
    assert all(line.endswith(": ran") for line in lines)


def test_the_ops_of_a_unet_run_in_the_interpreter():
    ops = ["scale_concat_group_norm", "channel_stats"]
    lines = sanitize.run_calls("racecheck", torch.device("cpu"), ops)
    assert len(lines) >= 2 * len(ops)
    assert all(line.endswith(": ran") for line in lines)


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_a_group_straddles_the_border_of_x_and_skip(tool):
    cases = sanitize.sanitizer_cases("scale_concat_group_norm", tool)
    (groups,) = {case.example(torch.device("cpu")).args[3] for case in cases}
    assert 24 % (44 // groups) != 0, "a group holds channels of x and of the skip"


def test_a_plan_that_cannot_run_is_named():
    lines = sanitize.run_calls("memcheck", torch.device("cpu"), ["ls_scale_concat"])
    assert any("cooperative: did not run: " in line for line in lines)


def test_racecheck_looks_at_our_kernels_only():
    command = sanitize.command("/bin/compute-sanitizer", "racecheck", ["se_gate"])
    assert command[:3] == ["/bin/compute-sanitizer", "--tool", "racecheck"]
    assert "kernel_substring=se_forward_kernel" in command
    assert command[-6:] == ["sanitize", "--calls", "--tool", "racecheck", "--op", "se_gate"]
    assert "--kernel-name" not in sanitize.command("/bin/compute-sanitizer", "memcheck", OPS)


@pytest.mark.parametrize(
    ("codes", "outcome"), [((0, 0), 0), ((0, sanitize.FOUND), 1), ((sanitize.FOUND, 9), 1), ((9, 0), 2)]
)
def test_what_the_tools_say_is_told(codes, outcome, monkeypatch, capsys):
    left = list(codes)
    environments = []

    def fake_run(command, *, env, **kwargs):
        environments.append(env)
        return subprocess.CompletedProcess(command, left.pop(0))

    monkeypatch.setattr(sanitize.subprocess, "run", fake_run)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: "/bin/compute-sanitizer")
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: True)
    assert main(["sanitize"]) == outcome
    out = capsys.readouterr().out
    assert ("FOUND ERRORS" in out) == (sanitize.FOUND in codes)
    assert ("DID NOT WORK" in out) == (9 in codes)
    assert all(env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and env["TRITON_INTERPRET"] == "0" for env in environments)


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert main(["sanitize"]) == 2
    assert "compute-sanitizer was not found" in capsys.readouterr().err
    assert main(["sanitize", "--op", "se_gat"]) == 2
    assert "Did you mean 'se_gate'" in capsys.readouterr().err

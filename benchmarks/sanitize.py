"""``python -m benchmarks sanitize``: every plan with Triton kernels, forward and backward, under compute-sanitizer.

memcheck looks for reads and writes outside allocations, racecheck for races in shared memory. Both run small and odd
shapes: the tools slow a kernel down a hundredfold.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.environment import ROOT
from benchmarks.op_cases import ONE_IMAGE_OPS, OPS, UNET_OPS, Case
from benchmarks.op_timing import make_calls
from benchmarks.op_variants import PYTORCH_PLANS, Variant
from scalelong_fast.errors import UserError, unknown_name
from scalelong_fast.ops import list_plans

TOOLS = ("memcheck", "racecheck")
FOUND = 86  #: exit code of compute-sanitizer where it has found something

_PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")


def sanitizer_cases(op: str, tool: str) -> list[Case]:
    """Shapes for a tool: for racecheck a single one; widths a multiple of 8 let the TMA plans take part."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if op == "se_gate":
        return [Case(op, (3, 37), fp32)]
    if op in UNET_OPS:
        return _unet_cases(op, tool)
    if tool == "racecheck":
        return [Case(op, (2, 33, 64), bf16)]
    rows = [Case(op, (3, 37, 72), bf16), Case(op, (2, 17, 35), fp32)]
    if op in ("scale_concat", "ls_scale_concat"):
        return [*rows, Case(op, (2, 24, 19, 5, 7), bf16, "pixels"), Case(op, (2, 24, 19, 5, 7), bf16, "planes")]
    if op == "ls_skip_linear":
        return [*rows, Case(op, (3, 37, 72), bf16, pooled=True)]
    return rows


def _unet_cases(op: str, tool: str) -> list[Case]:
    """The same of the ops on images; 24 + 20 channels in groups of 11 straddle the border of x and skip."""
    bf16, fp32 = torch.bfloat16, torch.float32
    widths = (40,) if op in ONE_IMAGE_OPS else (24, 20)
    if tool == "racecheck":
        return [Case(op, (2, *widths, 5, 7), bf16, layout) for layout in ("pixels", "planes")]
    found = [Case(op, (2, *widths, 5, 7), dtype, layout) for dtype in (bf16, fp32) for layout in ("pixels", "planes")]
    if op == "scale_concat_group_norm":
        found += [Case(op, (2, *widths, 5, 7), bf16, layout, pooled=True, raw=True) for layout in ("pixels", "planes")]
    return found


def run_calls(tool: str, device: torch.device, ops: Sequence[str] = OPS) -> list[str]:
    """Make every call; returns a line for each, which says what did not run."""
    lines = []
    for op in ops:
        for plan in (p for p in list_plans(op) if p not in PYTORCH_PLANS):
            for case in sanitizer_cases(op, tool):
                variant = Variant(plan, case.public(), plan)
                try:
                    with variant.forced():
                        (call,) = make_calls(case, variant, [case.example(device)], "fwd_bwd")
                        call()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    lines.append(f"{case}, plan {plan}: ran")
                except NotImplementedError as error:
                    lines.append(f"{case}, plan {plan}: did not run: {error}")
                print(lines[-1], flush=True)
    return lines


def kernel_names() -> list[str]:
    """Names of the project's kernels, as launched."""
    names = set()
    for path in (ROOT / "kernels").glob("*.py"):
        names |= set(re.findall(r"^@triton\.jit\s*\ndef (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.M))
    return sorted(names)


def command(executable: str, tool: str, ops: Sequence[str]) -> list[str]:
    """The command line that runs the calls under a tool."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    if tool == "racecheck":
        # Only ours: in PyTorch's own kernels there is nothing for us to mend.
        for name in kernel_names():
            options += ["--kernel-name", f"kernel_substring={name}"]
    calls = ["-m", "benchmarks", "sanitize", "--calls", "--tool", tool, *(part for op in ops for part in ("--op", op))]
    return [executable, *options, sys.executable, *calls]


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, or None."""
    return shutil.which("compute-sanitizer") or next((place for place in _PLACES if Path(place).is_file()), None)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code: 0 clean, 1 something was found, 2 nothing could be checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be repeated (default: both)")
    parser.add_argument("--op", action="append", help=f"only this op; may be repeated; of {', '.join(OPS)}")
    parser.add_argument("--calls", action="store_true", help="make the calls in this process, under no tool")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; with --calls also cpu (the interpreter)")
    options = parser.parse_args(args)
    tools, ops = options.tool or TOOLS, options.op or OPS
    for op in ops:
        if op not in OPS:
            raise unknown_name("--op", op, OPS)
    if options.calls:
        for tool in tools:
            run_calls(tool, torch.device(options.device), ops)
        return 0
    executable = find_sanitizer()
    if executable is None:
        raise UserError("compute-sanitizer was not found. It comes with the CUDA toolkit; put it on the PATH.")
    if not torch.cuda.is_available():
        raise UserError("compute-sanitizer needs an NVIDIA GPU, and PyTorch sees none here.")
    # Each tensor in an allocation of its own, or an access past its end would land in its neighbour unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
    outcome = 0
    for tool in tools:
        print(f"{tool}: {len(kernel_names())} kernels", flush=True)
        code = subprocess.run(command(executable, tool, ops), cwd=ROOT, env=environment, check=False).returncode
        verdict = {0: "clean", FOUND: "FOUND ERRORS"}.get(code, f"DID NOT WORK (exit code {code}): nothing was checked")
        print(f"{tool}: {verdict}", flush=True)
        outcome = outcome or (0 if code == 0 else 1 if code == FOUND else 2)
    return outcome

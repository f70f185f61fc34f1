"""``python -m benchmarks traffic``: the bytes our kernels move, counted, against the fewest there can be."""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.compiled_traffic import worst_factors
from benchmarks.floors import DIRECTIONS, total_bytes
from benchmarks.op_cases import UNET_OPS, Case
from benchmarks.op_variants import op_files
from benchmarks.screen import Screen
from benchmarks.traffic_counter import Launch, counting, pytorch_work
from scalelong_fast.errors import UserError
from scalelong_fast.ops import explain_plan, force_plan, list_plans
from scalelong_fast.training.checkpoint import write_json

#: Two sizes of each kind of shape, which differ in tokens or pixels alone: what grows with them is the features' bytes.
ROWS = ((2, 64, 64), (2, 128, 64))
IMAGES = ((2, 32, 16, 8, 8), (2, 32, 16, 16, 8))
UNET_IMAGES = ((1, 32, 32, 4, 8), (1, 32, 32, 8, 8))
#: Plans whose passes are all kernels of ours.
PLANS = ("triton", "two_launch", "single_launch", "pointer", "tma")
OUT = environment.RESULTS / "interpreter" / "traffic.json"

_ROW_OPS = ("layer_norm_gap", "add_layer_norm_gap", "scale_concat", "ls_scale_concat")
_PRODUCT_OPS = ("scale_concat_linear", "ls_skip_linear")


def case_pairs(dtype: torch.dtype = torch.bfloat16) -> list[tuple[Case, Case]]:
    """Each case at its smaller and its larger size."""
    kinds: list[tuple[str, tuple, dict[str, Any]]] = [(op, ROWS, {}) for op in (*_PRODUCT_OPS, *_ROW_OPS)]
    kinds.append(("ls_skip_linear", ROWS, {"pooled": True}))
    for layout in ("pixels", "planes"):
        kinds += [(op, IMAGES, {"layout": layout}) for op in ("scale_concat", "ls_scale_concat")]
        kinds.append(("ls_scale_concat", IMAGES, {"layout": layout, "pooled": True}))
        for op in UNET_OPS:
            images = UNET_IMAGES if op.startswith("scale_concat") else tuple((b, c, *s) for b, _, c, *s in UNET_IMAGES)
            kinds.append((op, images, {"layout": layout}))
        kinds.append(("scale_concat_group_norm", UNET_IMAGES, {"layout": layout, "pooled": True, "raw": True}))
    pairs = [tuple(Case(op, shape, dtype, **options) for shape in shapes) for op, shapes, options in kinds]
    return [(Case("se_gate", (4, 64), torch.float32), Case("se_gate", (8, 64), torch.float32)), *pairs]


def count(case: Case, plan: str) -> dict[str, tuple[list[Launch], list[str]]]:
    """Launches, and data-moving work of PyTorch, of a call and of its backward: ``fwd`` and ``bwd``.

    Raises:
        NotImplementedError: the plan cannot run here.
    """
    example = case.example(torch.device("cpu"))
    leaves = [a for a in (*example.args, *example.kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]
    with force_plan(plan):
        explain_plan(case.op, *example.args, **example.kwargs)
        with counting() as forward, pytorch_work() as forward_work:
            outputs = case.public()(*example.args, **example.kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = case.cotangents(outputs)
        with counting() as backward, pytorch_work() as backward_work:
            torch.autograd.grad(case.grade(outputs), leaves, cotangents, allow_unused=True)
    return {"fwd": (forward, forward_work), "bwd": (backward, backward_work)}


def records_of(small: Case, large: Case, plan: str, factors: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A record for each direction; see :func:`main` for what it holds.

    Args:
        small, large: the case at both sizes.
        plan: to force.
        factors: of :func:`~benchmarks.compiled_traffic.worst_factors`. Where a kernel of the plan has none, the bytes
            of the compiled code are ``None``.
    """
    counted = {case: count(case, plan) for case in (small, large)}
    sources = [*op_files(large.op), "benchmarks/floors.py", "benchmarks/traffic_counter.py"]
    found = []
    for direction in DIRECTIONS[:2]:
        launches, work = counted[large][direction]
        if not launches:
            continue
        moved = {case: sum(launch.read + launch.written for launch in counted[case][direction][0]) for case in counted}
        compiled = {case: _compiled_bytes(counted[case][direction][0], factors) for case in counted}
        floor = {case: total_bytes(case, direction) for case in counted}
        grown = floor[large] - floor[small]
        found.append(
            {
                "op": large.name,
                "plan": plan,
                "direction": direction,
                "layout": large.layout,
                "shape": large.shape,
                "smaller_shape": small.shape,
                "dtype": large.dtype_name,
                "floor_bytes": floor[large],
                "moved_bytes": moved[large],
                "asked_bytes": sum(launch.loads + launch.stores for launch in launches),
                "compiled_bytes": compiled[large],
                "growth": round((moved[large] - moved[small]) / grown, 4),
                "compiled_growth": compiled[large] and round((compiled[large] - compiled[small]) / grown, 4),
                "kernels": [[launch.kernel, launch.read, launch.written] for launch in launches],
                "pytorch": work,
                "sources": sources,
                "source_sha256": environment.source_hash(sources),
            }
        )
    return found


def _compiled_bytes(launches: Sequence[Launch], factors: Mapping[str, Mapping[str, float]]) -> int | None:
    """Bytes moved, each load and store as often as the compiled code of its kernel makes it."""
    if any(launch.kernel not in factors for launch in launches):
        return None
    own = [(launch, factors[launch.kernel]) for launch in launches]
    return round(sum(launch.read * times["loads"] + launch.written * times["stores"] for launch, times in own))


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks traffic",
        description="Run the kernels in Triton's interpreter, on a CPU, and count the bytes that each loads and "
        "stores: each address once (moved), and as often as it was asked for (asked). Beside them the fewest bytes "
        "there can be (benchmarks/floors.py), and by how much the moved bytes grow with tokens or pixels, in units of "
        "the floor's growth; and the moved bytes times the factors that the compiled code of the kernels has on the "
        "worst target (python -m benchmarks aot, to be run before).",
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="result file (default: benchmarks/results/interpreter/traffic.json)"
    )
    options = parser.parse_args(args)
    options.out = options.out.resolve()
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton looks at it when it is imported, and others may have done that by now.
        command = [sys.executable, "-m", "benchmarks", "traffic", *args]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=environment.ROOT).returncode
    try:
        import triton
    except ImportError:
        raise UserError("Triton is not installed, whose interpreter counts. Install it: pip install triton.") from None
    torch.set_num_threads(1)
    screen, records, factors = Screen(), [], worst_factors()
    for small, large in case_pairs():
        for plan in list_plans(large.op):
            if plan not in PLANS:
                continue
            screen.print(f"{large}, {plan}")
            records += records_of(small, large, plan, factors)
    where = {"triton": triton.__version__, "torch": torch.__version__}
    described = environment.describe(torch.device("cpu"))
    where |= {key: described[key] for key in ("python", "scalelong_fast", "date")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {"environment": where, "records": records})
    screen.print(f"{len(records)} records written to {options.out}.")
    return 0

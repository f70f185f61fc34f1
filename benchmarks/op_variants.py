"""The ways to make one call that are compared: the definition in PyTorch, the same compiled, and each of our plans."""

import ast
import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import ROOT
from benchmarks.op_cases import UNET_OPS, Case
from benchmarks.unet_baselines import BASELINES
from scalelong_fast.ops import explain_plan, force_plan, list_plans
from scalelong_fast.ops.examples import Example
from scalelong_fast.ops.problem import architecture, interpreting

#: Plans made of PyTorch calls alone: no kernel of ours runs in them.
PYTORCH_PLANS = ("eager", "two_gemm", "cat_buffer", "native")

#: Files of scalelong_fast/ops/ that choose and join, but do not say what is computed.
_MACHINERY = ("__init__", "checks", "differentiable", "examples", "group_norm_checks", "kappa", "plans", "problem")
_MACHINERY += ("tables", "tuning")


@dataclass(frozen=True)
class Variant:
    """One way to make a case's call.

    Attributes:
        name: ``eager``, ``compile``, ``dispatch`` (what a user gets) or a plan's name.
        function: takes the op's arguments.
        plan: of our op; None for the reference.
        obstacle: why it cannot be timed here, or None.
        sources: files whose code it runs, relative to the repository.
        planes: it is given contiguous images, whatever the layout of the case.
    """

    name: str
    function: Callable[..., Any]
    plan: str | None = None
    obstacle: str | None = None
    sources: tuple[str, ...] = ()
    planes: bool = False

    def prepared(self, example: Example) -> Example:
        """The arguments as the variant takes them, made outside of what is timed."""
        if not self.planes:
            return example

        def contiguous(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.is_contiguous():
                return value
            return value.detach().contiguous().requires_grad_(value.requires_grad)

        return Example(
            tuple(map(contiguous, example.args)), {key: contiguous(value) for key, value in example.kwargs.items()}
        )

    def forced(self) -> contextlib.AbstractContextManager[None]:
        """Context in which :attr:`function` takes the plan; not entered in a timed region."""
        own_plan = self.plan is not None and self.name != "dispatch"
        return force_plan(self.plan) if own_plan else contextlib.nullcontext()

    def __call__(self, case: Case, example: Example) -> tuple[Tensor, ...]:
        """Make the call; the outputs as a tuple."""
        if case.autocast is None:
            outputs = self.function(*example.args, **example.kwargs)
        else:
            # No cache of cast weights: in a training step, too, each is cast once per call.
            with torch.autocast(example.args[0].device.type, dtype=case.autocast, cache_enabled=False):
                outputs = self.function(*example.args, **example.kwargs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


@contextlib.contextmanager
def no_interpreter() -> Iterator[None]:
    """Inside the block Triton's plans refuse CPU tensors: times of the interpreter mean nothing."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def variants(case: Case, device: torch.device, example: Example | None = None) -> list[Variant]:
    """Every variant of a case; those with an obstacle are listed too.

    Args:
        case: the call.
        device: where.
        example: arguments of the case, where there are some already.
    """
    if device.type == "cpu" and interpreting():
        raise RuntimeError("Triton's interpreter is on: call this inside no_interpreter()")
    example = example or case.example(device)
    baseline = case.baseline()
    compiled = torch.compile(baseline, fullgraph=True, dynamic=False)
    sources = baseline_sources(case.op, device)
    found = [
        # Most eager UNets are contiguous, and PyTorch's GroupNorm copies what is not.
        Variant("eager", baseline, sources=sources, planes=case.op in UNET_OPS),
        Variant("compile", compiled, sources=sources),
    ]
    chosen = _choice(case, example)
    found.append(Variant("dispatch", case.public(), chosen, sources=_sources(case.op, chosen, device)))
    for plan in list_plans(case.op):
        if plan == "eager":
            continue  # the reference and a check of the arguments, which dispatch shows
        obstacle = None
        try:
            with force_plan(plan):
                _choice(case, example)
        except NotImplementedError as error:
            obstacle = str(error)
        found.append(Variant(plan, case.public(), plan, obstacle, _sources(case.op, plan, device)))
    return found


def _choice(case: Case, example: Example) -> str:
    context = contextlib.nullcontext()
    if case.autocast is not None:
        context = torch.autocast(example.args[0].device.type, dtype=case.autocast)
    with context:
        return explain_plan(case.op, *example.args, **example.kwargs).plan


def _sources(op: str, plan: str, device: torch.device) -> tuple[str, ...]:
    kernels = device.type == "cuda" and plan not in PYTORCH_PLANS
    files = [path for path in op_files(op) if kernels or not path.startswith("kernels/")]
    if kernels:
        table = f"kernels/tables/{architecture(device)}.json"
        files.append(table if (ROOT / table).is_file() else "kernels/tables/sm_80.json")
    return tuple(files)


def baseline_sources(op: str, device: torch.device) -> tuple[str, ...]:
    """Sources of what PyTorch is timed with."""
    return ("benchmarks/unet_baselines.py",) if op in BASELINES else _sources(op, "eager", device)


def source_lists(op: str, device: torch.device) -> set[tuple[str, ...]]:
    """Every list of sources that a variant of an op can have on a device."""
    return {baseline_sources(op, device), *(_sources(op, plan, device) for plan in list_plans(op))}


@functools.cache
def op_files(op: str) -> tuple[str, ...]:
    """The files that an op's results depend on: its own, those of ops it is made of, and their kernels, sorted."""
    found: set[str] = set()
    waiting = [f"scalelong_fast/ops/{op}.py"]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imports(ROOT / path)
    return tuple(sorted(found))


def _imports(path: Path) -> list[str]:
    """Kernel and op files that a file imports anywhere in it, relative to the repository."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    files = []
    for module in modules:
        folder, _, name = module.rpartition(".")
        if folder == "scalelong_fast.kernels":
            files.append(f"kernels/{name}.py")
        elif folder == "scalelong_fast.ops" and name not in _MACHINERY:
            files.append(f"scalelong_fast/ops/{name}.py")
    return [file for file in files if (ROOT / file).is_file()]

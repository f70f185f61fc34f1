"""Opt-in tuning: time every plan that can serve a call and remember the fastest.

Nothing here runs unless it is called: not on import, not in a training step, not under ``torch.compile`` or while a
CUDA graph is captured.
"""

import datetime
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalelong_fast.errors import UserError
from scalelong_fast.ops import plans
from scalelong_fast.ops.examples import example_gradients
from scalelong_fast.ops.problem import Problem, interpreting
from scalelong_fast.ops.tuned import device_name, exact_rule, put_in_front, store_tuned

#: A plan must be faster by this much than the one that would be taken anyway: less is noise.
MARGIN = 0.02

#: A plan whose results differ from eager's by more than this (relative, root mean square) is broken, not inexact.
GARBAGE = 0.2


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` found.

    Attributes:
        op: public name.
        plan: the one that will be taken from now on.
        times_ms: median milliseconds of forward and backward together, by plan.
        skipped: why the other plans were not timed.
        path: the file that remembers it, or None where there was no choice or it could not be written.
    """

    op: str
    plan: str
    times_ms: dict[str, float]
    skipped: dict[str, str]
    path: Path | None

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(self.times_ms.items(), key=lambda item: item[1]))
        return f"{self.op}: plan {self.plan!r} ({times})"


def tune(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Tuning:
    """Time the plans of an op on these arguments and use the fastest for all calls like this one from now on.

    Alike are calls of the same shapes, dtype and layout on this device. Forward and backward are timed together (only
    the forward where no argument wants a gradient), in interleaved rounds, launches by the host included. The winner is
    stored for later processes (:mod:`scalelong_fast.ops.tuned`). Plans are forced meanwhile, for the whole process.

    Args:
        op: a function of :mod:`scalelong_fast.ops` or its name.
        *args, **kwargs: the call's arguments; give it real data, never zeros.

    Raises:
        UserError: arguments that the op itself would refuse; Triton's interpreter, whose times mean nothing.
        RuntimeError: called while a CUDA graph is captured or under ``torch.compile``.
    """
    return tune_call(op, args, kwargs)


def tune_call(
    op: str | Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    rounds: int = 11,
    seconds: float = 0.02,
) -> Tuning:
    """:func:`tune` with the arguments in containers.

    Args:
        rounds: visits of each plan; the median over them counts.
        seconds: least length of a visit.
    """
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError("tune: called under torch.compile or while a CUDA graph is captured; call it before.")
    if interpreting():
        raise UserError("tune: TRITON_INTERPRET=1 is set, and times in the interpreter mean nothing. Unset it.")
    name, owner = plans._owner(op)
    problem = owner.problem(*args, **kwargs)
    device = next(a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    function = _public(name)
    default = plans.explain_plan(name, *args, **kwargs).plan

    skipped: dict[str, str] = {}
    steps: dict[str, Callable[[], list[Tensor]]] = {}
    results: list[Tensor] = []
    # Eager first: the others are held against its results.
    for plan in sorted(owner.plans.values(), key=lambda plan: plan.name != "eager"):
        obstacle = plan.obstacle(problem)
        if obstacle is not None:
            skipped[plan.name] = obstacle
            continue
        step = _step(plan.name, function, args, kwargs)
        try:
            found = step()
            if plan.name == "eager":
                results = found
            elif not _agree(found, results):
                skipped[plan.name] = "its results differ from eager's"
                continue
            steps[plan.name] = step
        except Exception as error:
            if plan.name == "eager":
                raise
            message = (str(error).strip() or "no message").splitlines()[0]
            skipped[plan.name] = f"{type(error).__name__}: {message}"
    del results

    times = _interleaved(steps, device, rounds, seconds)
    best = min(times, key=times.__getitem__)
    if default in times and times[default] <= times[best] * (1 + MARGIN):
        best = default
    return _remember(name, problem, device, best, times, skipped)


def _public(op: str) -> Callable[..., Any]:
    from scalelong_fast import ops

    return getattr(ops, op)


def _step(
    plan: str, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Callable[[], list[Tensor]]:
    """One call and its backward; returns outputs and gradients."""
    inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    cotangents: list[Tensor] = []

    def step() -> list[Tensor]:
        with plans.force_plan(plan), torch.set_grad_enabled(bool(inputs)):
            outputs = function(*args, **kwargs)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            differentiable = [o for o in outputs if o.requires_grad]
            if not differentiable:
                return outputs
            if not cotangents:
                cotangents.extend(example_gradients(tuple(differentiable)))
            grads = torch.autograd.grad(differentiable, inputs, cotangents, allow_unused=True)
        return [*(o.detach() for o in outputs), *(g for g in grads if g is not None)]

    return step


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether results are those of eager but for rounding."""
    if len(found) != len(expected):
        return False
    for a, b in zip(found, expected, strict=True):
        a, b = a.float(), b.float()
        if not bool((a - b).norm() <= GARBAGE * b.norm()):  # a NaN fails too
            return False
    return True


def _interleaved(
    steps: dict[str, Callable[[], Any]], device: torch.device, rounds: int, seconds: float
) -> dict[str, float]:
    """Median milliseconds a step; every plan is visited in every round, so that a drifting clock hits all alike."""
    repeats = {}
    for name, step in steps.items():
        step()
        repeats[name] = max(1, min(1000, round(seconds * 1e3 / max(_visit(step, 2, device), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            steps[name]()  # what ran before has emptied the caches
            times[name].append(_visit(steps[name], repeats[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def _visit(step: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Milliseconds a step."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) * 1e3 / repeats
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / repeats


def _remember(
    op: str, problem: Problem, device: torch.device, plan: str, times: dict[str, float], skipped: dict[str, str]
) -> Tuning:
    if len(times) < 2:
        return Tuning(op, plan, times, skipped, None)  # there was no choice
    date = datetime.date.today().isoformat()
    rule = exact_rule(plan, problem, f"tuned on {device_name(device)}, {date}")
    put_in_front(op, problem.arch, [rule])
    path = None
    try:
        path = store_tuned(device, op, rule, date, {name: round(ms, 5) for name, ms in times.items()})
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody has a home here
        warnings.warn(
            f"tune: the plan holds for this process only, since it could not be stored: {error}. Name a "
            "folder that can be written in the environment variable SCALELONG_CACHE.",
            stacklevel=4,
        )
    return Tuning(op, plan, times, skipped, path)

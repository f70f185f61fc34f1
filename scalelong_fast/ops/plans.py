"""Plans: the ways an op can be carried out, and the choice between them.

A plan is one name for a forward and the backward that belongs to it. The choice is made per call, from shapes, dtype
and architecture alone; values are never read. In order: :func:`force_plan`, the environment variable
``SCALELONG_PLAN``, the tuner's cache, the checked-in table (:mod:`scalelong_fast.ops.tables`), and where that is
silent, eager.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalelong_fast.errors import unknown_name
from scalelong_fast.ops import tables
from scalelong_fast.ops.differentiable import under_functorch
from scalelong_fast.ops.problem import Problem, assumed_architecture


@dataclass(frozen=True)
class Plan:
    """One way to carry out an op.

    Attributes:
        name: as in :func:`list_plans`.
        summary: what runs, in a few words.
        obstacle: why the plan cannot serve a problem, or None.
    """

    name: str
    summary: str
    obstacle: Callable[[Problem], str | None] = lambda problem: None


@dataclass(frozen=True)
class PlanChoice:
    """What :func:`explain_plan` says: ``str()`` of it is a sentence."""

    op: str
    plan: str
    reason: str
    summary: str

    def __str__(self) -> str:
        return f"{self.op}: plan {self.plan!r} ({self.summary}), since {self.reason}."


@dataclass(frozen=True)
class _Owner:
    plans: dict[str, Plan]
    problem: Callable[..., Problem]


_OWNERS: dict[str, _Owner] = {}

# A module global, not a context variable: torch.compile guards on it, so that a compiled caller sees the change.
_forced: tuple[str, ...] = ()


def register_plans(op: str, plans: list[Plan], problem: Callable[..., Problem]) -> None:
    """Make an op known.

    Args:
        op: public name.
        plans: eager among them.
        problem: takes the op's arguments, checks them and returns the :class:`Problem`.
    """
    _OWNERS[op] = _Owner({plan.name: plan for plan in plans}, problem)


def _owner(op: str | Callable[..., Any]) -> tuple[str, _Owner]:
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OWNERS:
        raise unknown_name("op", name, _OWNERS)
    return name, _OWNERS[name]


def list_plans(op: str | Callable[..., Any]) -> list[str]:
    """Names of the plans of an op.

    Args:
        op: a function of :mod:`scalelong_fast.ops` or its name.

    Raises:
        UserError: an op that is not known.
    """
    return list(_owner(op)[1].plans)


def explain_plan(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> PlanChoice:
    """Say which plan a call would take, and why, without making the call.

    Args:
        op: a function of :mod:`scalelong_fast.ops` or its name.
        *args, **kwargs: the call's arguments.

    Raises:
        UserError: arguments that the op itself would refuse.
        NotImplementedError: a forced plan that cannot serve the call.
    """
    name, owner = _owner(op)
    problem = owner.problem(*args, **kwargs)
    plan, reason = _choose(name, problem)
    return PlanChoice(name, plan, reason, owner.plans[plan].summary)


@contextmanager
def force_plan(name: str) -> Iterator[None]:
    """Make every op that owns plan ``name`` use it inside the block; other ops choose as usual.

    Blocks may be nested, e.g. one plan for the norms and one for the products; for an op that owns both the inner one
    holds. The force holds for the whole process, all threads included. A backward follows the plan of its forward,
    whether or not it runs inside the block; but activation checkpointing runs the forward once more in the backward,
    and that choice is made then: keep the backward inside the block too.

    Raises:
        UserError: a name that no op owns.
        NotImplementedError: (by the op, in the block) where the plan cannot serve a call; nothing else is run instead.
    """
    global _forced
    _check_known(name)
    before, _forced = _forced, (name, *_forced)
    try:
        yield
    finally:
        _forced = before


def _check_known(name: str) -> None:
    known = {plan for owner in _OWNERS.values() for plan in owner.plans}
    if name not in known:
        raise unknown_name("plan", name, known)


def _demanded(owner: _Owner) -> tuple[str, str] | None:
    """The plan that the user demands of this op, and where he said so."""
    for name in _forced:
        if name in owner.plans:
            return name, f"force_plan({name!r}) says so"
    name = os.environ.get("SCALELONG_PLAN")
    if name:
        if name in owner.plans:
            return name, f"the environment variable SCALELONG_PLAN={name} says so"
        _check_known(name)
    return None


def _choose(op: str, problem: Problem) -> tuple[str, str]:
    owner = _OWNERS[op]
    functorch = under_functorch()
    demanded = _demanded(owner)
    if demanded is not None:
        obstacle = owner.plans[demanded[0]].obstacle(problem)
        if obstacle is not None:
            raise NotImplementedError(f"plan {demanded[0]!r} of {op} not supported: {obstacle}")
        return demanded
    if functorch:
        return "eager", "a functorch transform is at work, which kernels cannot see through"
    passed_over = ""
    for name, reason in tables.candidates(op, problem):
        if name not in owner.plans:
            continue
        obstacle = owner.plans[name].obstacle(problem)
        if obstacle is None:
            return name, reason + passed_over
        passed_over = f"; plan {name!r} was passed over: {obstacle}"
    return "eager", f"no rule of the table for {problem.arch} fits" + passed_over


def choose_plan(op: str, problem: Problem) -> str:
    """Name of the plan for a call.

    Raises:
        NotImplementedError: a demanded plan that cannot serve the call.
    """
    return _choose(op, problem)[0]


# Checking arguments and choosing a plan takes longer on the host than a small PyTorch call. Both depend on what
# _signature gathers and on the rules alone, so calls that look alike are checked once.
_MEMO: dict[tuple, tuple[Problem, str, tuple[tables.Rule, ...] | None]] = {}
_MEMO_LIMIT = 4096


def _signature(op: str, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """All that the checks and the choice look at, hashable; fails for tensors of unusual kinds."""
    signature: list[Any] = [op, _forced, os.environ.get("SCALELONG_PLAN"), assumed_architecture()]
    _note(signature, (*args, *kwargs.values()))
    signature += kwargs
    kind = args[0].device.type
    if torch.is_autocast_enabled(kind):
        signature.append(torch.get_autocast_dtype(kind))
    return tuple(signature)


def _note(signature: list[Any], values: tuple | list) -> None:
    for value in values:
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
                raise TypeError("a tensor of an unusual kind")
            signature += (value.shape, value.stride(), value.dtype, value.device)
        elif isinstance(value, (tuple, list)):
            # Their tensors must not be kept: a memo is no place for features.
            signature += (type(value), len(value))
            _note(signature, value)
        else:
            signature += (type(value), value)


def resolve(op: str, *args: Any, **kwargs: Any) -> tuple[Problem, str]:
    """Check a call's arguments and choose its plan; for the ops themselves.

    Raises:
        UserError: wrong arguments.
        NotImplementedError: a demanded plan that cannot serve the call.
    """
    if torch.compiler.is_compiling() or under_functorch():
        problem = _OWNERS[op].problem(*args, **kwargs)
        return problem, choose_plan(op, problem)
    try:
        signature = _signature(op, args, kwargs)
        known = _MEMO.get(signature)
    except (AttributeError, TypeError, RuntimeError):  # not even tensors: the checks find the words
        signature, known = None, None
    if known is not None and tables.RULES.get((op, known[0].arch)) is known[2]:
        return known[0], known[1]
    problem = _OWNERS[op].problem(*args, **kwargs)
    plan = choose_plan(op, problem)
    if signature is not None:
        if len(_MEMO) >= _MEMO_LIMIT:
            _MEMO.clear()
        _MEMO[signature] = problem, plan, tables.RULES.get((op, problem.arch))
    return problem, plan

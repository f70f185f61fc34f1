"""Activation checkpointing in which gates would stay without gradients."""

import sys
from collections.abc import Iterator
from types import FrameType

import torch
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.state import ScaleLongState


def refuse_lost_gradients(state: ScaleLongState, module: str) -> None:
    """Raise in the second run of a checkpoint that hands gradients to the parameters it was given, and to no others.

    Checkpoints written as an ``autograd.Function`` of their own (as in the UNets of openai) ask for the gradients of
    listed parameters. Gates are none of these; without an error they would never learn. Those of
    ``torch.utils.checkpoint`` give every parameter its gradient.

    Raises:
        UserError: the skip of ``module`` is scaled by a gate inside such a checkpoint.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return  # no backward is at work, so nothing is run again
    if not any(parameter.requires_grad for parameter in state.parameters()):
        return
    # One that calls backward() in its backward reaches every parameter.
    if any(runs_function(frame, "backward") and "backward" not in frame.f_code.co_names for frame in frames()):
        raise UserError(
            f"model: the long skip that {module!r} receives is scaled inside an activation checkpoint of the network's "
            "own making (an autograd.Function), which gives no gradient to gates. Let it call "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), switch it off, or take a scaling without "
            "gates, such as 'cs'."
        )


def frames(until: FrameType | None = None) -> Iterator[FrameType]:
    """The Python frames of the callers, innermost first, up to ``until``."""
    frame = sys._getframe(1)
    while frame is not None and frame is not until:
        yield frame
        frame = frame.f_back


def runs_function(frame: FrameType, method: str) -> bool:
    """Whether a frame is ``method`` of an autograd.Function other than that of ``torch.utils.checkpoint``."""
    code = frame.f_code
    if code.co_name != method or not code.co_argcount or code.co_filename == checkpoint.__file__:
        return False
    return isinstance(frame.f_locals.get(code.co_varnames[0]), FunctionCtx)

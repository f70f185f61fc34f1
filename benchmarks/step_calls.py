"""A recipe ready to be timed: what is called, its memory and its host time."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks import model_check
from benchmarks.model_check import Built, Errors
from benchmarks.op_timing import host_seconds, peak_bytes
from benchmarks.step_bench import Recipe, StepBench
from benchmarks.timing import synchronize

WARM_UP_STEPS = 3
#: What of a recipe is timed: the loss with its graph; and its gradients; and the optimiser and the average.
DIRECTIONS = ("fwd", "fwd_bwd", "step")
#: Calls whose host time is read.
_HOST_CALLS = 10


@dataclass
class Ready:
    """A recipe that has been built, checked and warmed up.

    Attributes:
        calls: what is timed, by direction.
        errors: relative to the plain model in float32.
        peaks: most bytes held during a call above what was held before it, by direction.
        host: seconds that the host needs to queue a call, by direction; empty where it computes itself.
    """

    calls: dict[str, Callable[[], object]]
    errors: Errors
    peaks: dict[str, int]
    host: dict[str, float]


def calls_of(built: Built, directions: Sequence[str]) -> dict[str, Callable[[], object]]:
    """What is timed of a recipe, by direction; only the authors' step leaves gradients, which its next call frees."""

    def forward() -> None:
        built.loss()

    def forward_backward() -> None:
        built.loss().backward()
        model_check.forget_gradients(built.model)

    known = {"fwd": forward, "fwd_bwd": forward_backward, "step": built.take}
    return {direction: known[direction] for direction in directions}


def prepare(bench: StepBench, name: str, recipe: Recipe, directions: Sequence[str] = ("step",)) -> Ready:
    """Build a recipe, check what it computes, warm it up, and read what a single call shows.

    Raises:
        LossMismatchError: its prediction or gradients are not those of the plain model in float32.
    """
    device = bench.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
    built = bench.build(recipe)
    with warnings.catch_warnings():
        # A training run goes on eagerly where compiling fails; what is measured must be what it is called.
        warnings.filterwarnings("error", message="torch.compile failed")
        ready = Ready(calls_of(built, directions), bench.check(name, recipe, built), {}, {})
        for direction, call in ready.calls.items():
            for _ in range(WARM_UP_STEPS):
                call()
            model_check.forget_gradients(built.model)  # the authors' step frees them when it begins, not when it ends
            ready.peaks[direction] = peak_bytes(call, device)
            if device.type == "cuda":
                ready.host[direction] = host_seconds(call, device, samples=_HOST_CALLS)
            model_check.forget_gradients(built.model)
    synchronize(device)
    return ready


def free_bytes(device: torch.device) -> float:
    """What PyTorch can still allocate on a GPU; a CPU's is taken to be enough."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused

"""Taking a step in order to have taken it: everything is compiled and allocated, and nothing has changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scalelong_fast.training.batches import Draw
from scalelong_fast.training.shares import local

if TYPE_CHECKING:  # the step is built from this package's parts
    from scalelong_fast.training.step import TrainStep


def needs_warm_up(train_step: "TrainStep") -> bool:
    """Whether a run gains by warming up: on a GPU that is to run compiled.

    On a CPU the first step does the same once, and nothing is recorded that would have to be left out.
    """
    return train_step.execution.device.type == "cuda" and train_step.execution.compiled


def warm_up(train_step: "TrainStep", draw: Draw, steps: int = 2) -> None:
    """Take whole steps, then put everything that steps depend on back as it was, bit for bit.

    What a first step does once (compiling, picking kernels, capturing CUDA graphs, finding that the memory does not
    suffice) is done before the clock runs, and before anything counts. CUDA graphs take two steps: one runs, the next
    is recorded.

    Args:
        train_step: the step; fresh, or restored from a checkpoint.
        draw: any batch of the run's shapes; only read.
        steps: how many.
    """
    with _kept(train_step):
        for step in range(steps):
            train_step(step, draw)


@contextmanager
def _kept(train_step: "TrainStep") -> Iterator[None]:
    """Put back model, averages, optimiser, scaler and random numbers when the block ends, also by an exception."""
    optimizer, scaler = train_step.optimizer, train_step.scaler
    cuda = train_step.execution.device.type == "cuda"
    # Copies on the host: on the device they would raise the peak of the memory by as much again.
    tensors = [(tensor, local(tensor).to("cpu", copy=True)) for tensor in _tensors(train_step)]
    moments = {
        parameter: {key: _copied(value) for key, value in state.items()} for parameter, state in optimizer.state.items()
    }
    rates = [group["lr"] for group in optimizer.param_groups]
    scale = scaler.state_dict()
    random = torch.get_rng_state()
    device_random = torch.cuda.get_rng_state(train_step.execution.device) if cuda else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, kept in tensors:
                local(tensor).copy_(kept)
            # Moments that were not there before are there no longer: they begin with the first step that counts.
            for parameter in [p for p in optimizer.state if p not in moments]:
                del optimizer.state[parameter]
            for parameter, state in moments.items():
                for key, kept in state.items():
                    value = optimizer.state[parameter][key]
                    if isinstance(value, Tensor):
                        local(value).copy_(kept)
                    else:
                        optimizer.state[parameter][key] = kept
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        if scale:
            scaler.load_state_dict(scale)
        torch.set_rng_state(random)
        if device_random is not None:
            torch.cuda.set_rng_state(device_random, train_step.execution.device)


def _tensors(train_step: "TrainStep") -> list[Tensor]:
    """Every tensor that a step changes in place, but for the optimiser's."""
    model = train_step.model
    averages = [train_step.ema, *train_step.posthoc.averages.values()]
    return [*model.parameters(), *model.buffers(), *(t for a in averages for t in a.state_dict().values())]


def _copied(value: Any) -> Any:
    return local(value).to("cpu", copy=True) if isinstance(value, Tensor) else value

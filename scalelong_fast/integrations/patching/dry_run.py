"""Run a network once to see what it does, and leave no trace."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.integrations.patching.adapters.base import ExampleInputs


def dry_run(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call ``model`` on ``example_inputs`` in eval mode, without gradients and uncompiled; return what it returns.

    Training flags, buffers, and the random generators of the CPU and of the network's devices are as before afterwards.

    Raises:
        UserError: ``example_inputs`` is not a tuple or dict, or the network fails on them.
    """
    args, kwargs = split_inputs(example_inputs)
    # Where the compiler was never imported nothing is compiled, and importing it takes seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with unharmed(model), torch.no_grad(), eager:
        try:
            return model(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"example_inputs: {type(model).__name__} failed on them ({type(error).__name__}: {error}). Pass what "
                "its forward takes, on the device and in the dtype of its parameters."
            ) from error


def split_inputs(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise invalid(
        "example_inputs",
        type(example_inputs).__name__,
        "a tuple of the arguments of the network's forward, or a dict of its keyword arguments",
    )


@contextmanager
def unharmed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards attributes and buffers of the modules and the random generators are as before.

    That is to say what the attributes refer to; a list that the network appends to keeps what was appended.
    """
    # Set one by one, since train() and eval() may do more than that (adapters that are merged into weights).
    flags = [(module, module.training) for module in model.modules()]
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices], enabled=True):
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, before in attributes:
                module.__dict__.clear()
                module.__dict__.update(before)
            for module, training in flags:
                module.training = training  # of scripted modules it lies elsewhere
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer
                    if buffer.shape == before.shape and not buffer.is_meta:
                        buffer.copy_(before)

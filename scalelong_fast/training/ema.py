"""Exponential moving average of the weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scalelong_fast.training.shares import local


class EMA:
    """θ̄ ← d θ̄ + (1 − d) θ after every step, as one multi-tensor call.

    Args:
        model: its parameters are followed and their present values are the start. Of parameters that lie on several
            processes in shares, each process averages its own.
        decay: d in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        # The parameters themselves: FSDP may move what they hold to other memory when it first runs.
        self._source = list(model.parameters())
        self._average = [p.detach().clone() for p in self._source]
        self._shares = [local(average) for average in self._average]
        self._whole = not any(isinstance(p, DTensor) for p in self._source)

    @torch.no_grad()
    def update(self, weight: float | None = None) -> None:
        """Take one step, with ``weight`` (default: 1 − d) for the present weights of the model."""
        sources = self._source if self._whole else [local(source) for source in self._source]
        torch._foreach_lerp_(self._shares, sources, 1 - self.decay if weight is None else weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name (not copies)."""
        return dict(zip(self.names, self._average, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the averages; names must match."""
        if set(state) != set(self.names):
            raise KeyError(f"EMA parameters differ: {sorted(set(state) ^ set(self.names))[:4]}")
        for name, average in zip(self.names, self._average, strict=True):
            average.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module | None) -> nn.Module | None:
        """Write the averages into another instance of the model, and return it.

        Where they lie on several processes, every one must call it; those without a model give None.
        """
        parameters = {} if model is None else dict(model.named_parameters())
        for name, average in self.state_dict().items():
            whole = average.full_tensor() if isinstance(average, DTensor) else average
            if model is not None:
                parameters[name].copy_(whole)
        return model

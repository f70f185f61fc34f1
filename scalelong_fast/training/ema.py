"""Exponential moving average of the weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """θ̄ ← d θ̄ + (1 − d) θ after every step, as one multi-tensor call.

    Args:
        model: its parameters are followed and their present values are the start.
        decay: d in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self._source = [p.detach() for p in model.parameters()]
        self._average = [p.clone() for p in self._source]

    @torch.no_grad()
    def update(self) -> None:
        """Take one step."""
        torch._foreach_lerp_(self._average, self._source, 1 - self.decay)

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
    def copy_to(self, model: nn.Module) -> nn.Module:
        """Write the averages into another instance of the model, and return it."""
        averages = self.state_dict()
        for name, parameter in model.named_parameters():
            parameter.copy_(averages[name])
        return model

"""What autocast does to the features of an op."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype an op casts ``tensor`` to: autocast's where that is on, else its own; float64 is left alone."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def no_autocast(kind: str) -> AbstractContextManager:
    """Context without autocast on devices of a kind; free where autocast is off anyway."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()

"""Sinusoidal time embedding."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0, freq_shift: int = 0) -> Tensor:
    """Sinusoidal embedding, cosines first.

    Args:
        timesteps: ``(B,)`` on the 0…999 scale, whole or fractional.
        dim: width; an odd one gets a zero column.
        freq_shift: 1: the lowest frequency is 1 / max_period itself, as in DDPM; 0: the one after it would be.

    Returns:
        ``(B, dim)`` float32.
    """
    half = dim // 2
    step = -math.log(max_period) / (half - freq_shift)
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) * step
    angles = timesteps[:, None].float() * exponent.exp()
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))

"""What every backbone asks of its inputs."""

import torch
from torch import Tensor

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.models.config import UViTConfig
from scalelong_fast.models.unet_config import UNetConfig


def check_input(
    config: UViTConfig | UNetConfig, input_shape: tuple[int, int, int], x: Tensor, timesteps: Tensor, y: Tensor | None
) -> None:
    """Images, times and condition fit a model and each other.

    Args:
        config: of the model; ``num_classes``, ``clip_dim`` and ``num_clip_token`` say what condition it takes.
        input_shape: (C, H, W) of its images.
        x, timesteps, y: as a model's forward takes them.

    Raises:
        UserError: a shape that does not fit, or a condition missing or unexpected.
    """
    if x.dim() != 4 or tuple(x.shape[1:]) != input_shape:
        raise invalid("x", tuple(x.shape), f"shape (B, {', '.join(map(str, input_shape))})")
    if timesteps.shape != x.shape[:1]:
        raise invalid("timesteps", tuple(timesteps.shape), f"one time for each of the {x.shape[0]} images")
    conditional = config.num_classes > 0 or config.clip_dim > 0
    if y is None:
        if conditional:
            kind = "text features" if config.clip_dim > 0 else "labels"
            raise invalid("y", None, f"{kind}, since the model is conditional")
        return
    if not conditional:
        raise UserError(f"y: got {tuple(y.shape)}, expected None, since the model is unconditional.")
    if config.clip_dim > 0:
        expected = (x.shape[0], config.num_clip_token, config.clip_dim)
        if tuple(y.shape) != expected:
            raise invalid("y", tuple(y.shape), f"text features of shape {expected}")
        return
    if y.shape != x.shape[:1] or y.dtype not in (torch.int64, torch.int32):
        raise invalid("y", f"{y.dtype} {tuple(y.shape)}", f"int64 labels of shape ({x.shape[0]},)")
    if y.device.type == "cpu" and not torch.compiler.is_compiling() and y.numel():
        # On a GPU this look would stall the queue; there the embedding's own device assertion catches it.
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= config.num_classes:
            raise invalid("y", low if low < 0 else high, f"labels in 0 … {config.num_classes - 1}")

"""A UNet's decoder concat and norms as users write them under autocast: what ``eager`` and ``compile`` stand for.

The ops' definitions compute in float32 from end to end, which no user would: timed as the baseline they would flatter
whatever is compared with them. Here the concat has the dtype of the features, κ too (as an SE gate gives it under
autocast), and the norm alone is computed in float32, as autocast does it. Arguments are those of the ops.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str) -> Tensor:
    out = F.group_norm(x.float(), num_groups, weight, bias, eps)
    return (F.silu(out) if activation == "silu" else out).to(x.dtype)


def _concat(x: Tensor, skip: Tensor, kappa: Tensor) -> Tensor:
    return torch.cat([x, skip * kappa.to(skip.dtype)[:, :, None, None]], dim=1)


def scale_concat_group_norm(
    x: Tensor,
    skip: Tensor,
    kappa: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    activation: str = "silu",
    return_concat: bool = False,
    stats: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """cat, GroupNorm, SiLU; PyTorch's norm has no use for statistics."""
    concat = _concat(x, skip, kappa)
    out = _norm(concat, num_groups, weight, bias, eps, activation)
    return (out, concat) if return_concat else out


def scale_concat_conv1x1(x: Tensor, skip: Tensor, kappa: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """cat and a 1×1 convolution."""
    return F.conv2d(_concat(x, skip, kappa), weight, None if bias is None else bias.to(x.dtype))


def group_norm_gap(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, activation: str = "silu"
) -> tuple[Tensor, Tensor]:
    """GroupNorm, SiLU and the GAP; nobody but our kernels wants the sum of squares."""
    return _norm(x, num_groups, weight, bias, eps, activation), x.mean((2, 3), dtype=torch.float32)


def channel_stats(x: Tensor) -> Tensor:
    """The GAP."""
    return x.mean((2, 3), dtype=torch.float32)


BASELINES: dict[str, Callable[..., Any]] = {
    "scale_concat_group_norm": scale_concat_group_norm,
    "scale_concat_conv1x1": scale_concat_conv1x1,
    "group_norm_gap": group_norm_gap,
    "channel_stats": channel_stats,
}

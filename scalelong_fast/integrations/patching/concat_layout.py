"""Where a concat by the ops lies in memory as ``torch.cat`` would lay it, so that what follows sees no difference."""

from typing import Any

from torch import Tensor

from scalelong_fast.kernels.layouts import fitting_layouts, is_dense


def common_layout(x: Any, skip: Tensor, dim: Any) -> str | None:
    """The layout in which the ops concatenate x and skip as ``torch.cat`` does; None where they do not."""
    if not isinstance(x, Tensor) or x.dim() != skip.dim() or x.dtype != skip.dtype or x.device != skip.device:
        return None
    if not isinstance(dim, int) or x.is_inference() or x.numel() == 0 or not -x.dim() <= dim < x.dim():
        return None
    dim %= x.dim()
    if any(x.shape[d] != skip.shape[d] for d in range(x.dim()) if d != dim):
        return None
    if dim == 2 and x.dim() == 3:
        return "rows" if x.is_contiguous() and skip.is_contiguous() else None
    if dim != 1:
        return None
    both = [layout for layout in fitting_layouts(x) if layout in fitting_layouts(skip)]
    # Where the strides fit both, or PyTorch knows no such format, its concat is not always laid out as the op's.
    if both != ["planes"] and not (both == ["pixels"] and x.dim() > 3):
        return None
    return both[0] if is_dense(x, both[0]) and is_dense(skip, both[0]) else None


def dense_strides(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Strides of a tensor of this shape that lies densely in ``layout``."""
    order = [0, *range(2, len(shape)), 1] if layout == "pixels" else range(len(shape))
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim], step = step, step * shape[dim]
    return tuple(strides)

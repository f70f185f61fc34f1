"""Arguments to call an op with, for timing and for trying it out: random, never zero, with gradients wanted."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalelong_fast.errors import invalid, unknown_name

#: Meaning of the numbers of a shape, by op.
SHAPES = {
    "se_gate": "[B, N]",
    "scale_concat": "[B, L, D], or [B, C_x, C_skip, *spatial]",
    "ls_scale_concat": "[B, L, D], or [B, C_x, C_skip, *spatial]",
    "scale_concat_linear": "[B, L, D]",
    "ls_skip_linear": "[B, L, D]",
    "layer_norm_gap": "[B, L, D]",
    "add_layer_norm_gap": "[B, L, D]",
    "channel_stats": "[B, C, *spatial]",
    "group_norm_gap": "[B, C, *spatial]",
    "scale_concat_group_norm": "[B, C_x, C_skip, *spatial]",
    "scale_concat_conv1x1": "[B, C_x, C_skip, *spatial]",
}

#: Widths that come before the spatial dimensions, in the ops on images; the others take tokens, some take both.
_IMAGE_WIDTHS = {
    "scale_concat": 2,
    "ls_scale_concat": 2,
    "channel_stats": 1,
    "group_norm_gap": 1,
    "scale_concat_group_norm": 2,
    "scale_concat_conv1x1": 2,
}


class Example(NamedTuple):
    """A call's arguments: ``getattr(scalelong_fast.ops, op)(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """The tensors to differentiate with respect to."""
        values = (*self.args, *self.kwargs.values())
        return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def example_arguments(
    op: str,
    shape: tuple[int, ...] | list[int],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    stream_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    pooled: bool = False,
    reduction: int = 16,
    seed: int = 0,
) -> Example:
    """Make the arguments of one call of ``op``.

    Args:
        op: public name, a key of :data:`SHAPES`.
        shape: its numbers mean what :data:`SHAPES` says; x and skip are equally wide where it names one width, and a
            product's output is as wide as x.
        dtype: of the features and of a Linear's weight. Biases, SE and norm parameters are float32 (float64 with a
            float64 ``dtype``), as under autocast.
        device: where the tensors are made.
        stream_dtype: dtype of the residual stream in the LayerNorm ops, ``dtype`` where it is None. With another one
            the branch, the normalised output and the handle for the skip have ``dtype``, as in training under autocast.
        channels_last: lay (B, C, H, W) out as channels_last; needs two spatial dimensions.
        pooled: hand ``pooled`` (or the ``stats`` of the skip) to the ops that take it, rather than have them pool.
        reduction: r of the SE gate, whose hidden width is max(1, N // r).
        seed: of the random numbers, which are drawn on the CPU and alike for every device.

    Raises:
        UserError: an op or a shape that is not known.
    """
    if op not in SHAPES:
        raise unknown_name("op", op, SHAPES)
    shape = tuple(shape)
    spatial_dims = len(shape) - 1 - _IMAGE_WIDTHS.get(op, 0)
    images = op in _IMAGE_WIDTHS and 1 <= spatial_dims <= 3
    tokens = "[B, L, D]" in SHAPES[op] and len(shape) == 3
    if not (images or tokens or (op == "se_gate" and len(shape) == 2)) or min(shape, default=0) < 1:
        raise invalid("shape", list(shape), f"{SHAPES[op]} for {op}, all at least 1")
    if channels_last and not (images and spatial_dims == 2):
        raise invalid("channels_last", channels_last, "False, or a shape that ends in H and W alone")
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.promote_types(dtype, torch.float32)

    def draw(*size: int, scale: float = 1.0, offset: float = 0.0, dtype: torch.dtype = parameters) -> Tensor:
        value = torch.randn(size, generator=generator) * scale + offset
        return value.to(device, dtype).requires_grad_()

    def feature(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        value = draw(*size, dtype=dtype)
        if channels_last:
            value = value.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        return value

    def gate(count: int) -> tuple[Tensor, ...]:
        hidden = max(1, count // reduction)
        return (
            draw(hidden, count, scale=count**-0.5),
            draw(hidden, scale=0.1),
            draw(count, hidden, scale=hidden**-0.5),
            draw(count, scale=0.1),
        )

    if op == "se_gate":
        return Example((draw(*shape), *gate(shape[1])), {})

    if op in ("layer_norm_gap", "add_layer_norm_gap"):
        stream = stream_dtype or dtype
        width = shape[2]
        args = [feature(*shape, dtype=stream)]
        if op == "add_layer_norm_gap":
            args.append(feature(*shape))
        args += [draw(width, scale=0.1, offset=1.0), draw(width, scale=0.1)]
        kwargs: dict[str, Any] = {}
        if stream != dtype:
            kwargs["out_dtype"] = dtype
            if op == "add_layer_norm_gap":
                kwargs["skip_dtype"] = dtype
        return Example(tuple(args), kwargs)

    def norm(channels: int) -> tuple[Any, ...]:
        groups = next(n for n in (32, 16, 8, 4, 2, 1) if channels % n == 0)
        return groups, draw(channels, scale=0.1, offset=1.0), draw(channels, scale=0.1)

    if op == "channel_stats":
        return Example((feature(*shape),), {})
    if op == "group_norm_gap":
        return Example((feature(*shape), *norm(shape[1])), {})

    if images:
        batch, channels_x, channels_skip, *spatial = shape
        x, skip = feature(batch, channels_x, *spatial), feature(batch, channels_skip, *spatial)
        count, kwargs = channels_skip, {}
    else:
        batch, count, width = shape
        x, skip = feature(*shape), feature(*shape)
        kwargs = {"dim": -1} if op in ("scale_concat", "ls_scale_concat") else {}
    if op == "scale_concat":
        return Example((x, skip, draw(batch, count, scale=0.1, offset=0.5)), kwargs)
    if op == "scale_concat_group_norm":
        if pooled:
            mean = skip.detach().to(parameters).flatten(2).mean(-1)
            spread = skip.detach().to(parameters).flatten(2) - mean.unsqueeze(-1)
            kwargs["stats"] = (None, (mean, spread.square().sum(-1)))
        return Example((x, skip, draw(batch, count, scale=0.1, offset=0.5), *norm(channels_x + count)), kwargs)
    if op == "scale_concat_conv1x1":
        kappa, channels = draw(batch, count, scale=0.1, offset=0.5), channels_x + count
        ones = [1] * len(spatial)
        weight = draw(channels_x, channels, *ones, scale=channels**-0.5, dtype=dtype)
        return Example((x, skip, kappa, weight, draw(channels_x, scale=0.1)), kwargs)
    if op == "scale_concat_linear":
        kappa = draw(batch, count, scale=0.1, offset=0.5)
        weight = draw(width, 2 * width, scale=(2 * width) ** -0.5, dtype=dtype)
        return Example((x, skip, kappa, weight, draw(width, scale=0.1)), kwargs)

    if pooled:
        mean = skip.detach().to(parameters).flatten(2).mean(-1)
        kwargs["pooled"] = mean.requires_grad_()
    if op == "ls_scale_concat":
        return Example((x, skip, *gate(count)), kwargs)
    weight = draw(width, 2 * width, scale=(2 * width) ** -0.5, dtype=dtype)
    return Example((x, skip, *gate(count), weight, draw(width, scale=0.1)), kwargs)


def example_gradients(outputs: Tensor | tuple[Tensor, ...], seed: int = 1) -> list[Tensor]:
    """Random output gradients of a call, one for each output that has a graph, in order and in its memory format."""
    tensors = (outputs,) if isinstance(outputs, Tensor) else outputs
    generator = torch.Generator().manual_seed(seed)
    return [torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator)) for t in tensors if t.requires_grad]

"""Checks of the ops' arguments; every message names the argument, what came, what was expected and the mend."""

import torch
from torch import Tensor

from scalelong_fast.errors import UserError, invalid, unknown_name

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTIVATIONS = ("relu", "elu", "mish")


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``float32``."""
    return str(dtype).removeprefix("torch.")


def shape_of(value: Tensor) -> tuple[int, ...]:
    """Shape in plain numbers, for messages: symbolic sizes have no text of their own."""
    return tuple(int(size) for size in value.shape)


def check_tensor(
    argument: str, value: Tensor, *, shape: tuple[int, ...] | None = None, device: torch.device | None = None
) -> None:
    """A dense floating tensor, of a shape and on a device where those are given.

    Raises:
        UserError: anything else.
    """
    if not isinstance(value, Tensor):
        raise invalid(argument, type(value).__name__, "a torch.Tensor")
    if value.layout != torch.strided or value.is_nested:
        kind = (
            "a nested tensor" if value.is_nested else f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
        )
        raise UserError(f"{argument}: got {kind}, expected a dense one. Pad it, or call to_dense() first.")
    if value.dtype not in FLOATING:
        raise invalid(
            argument,
            name_of(value.dtype),
            "float32, float16, bfloat16 or float64",
            f"Convert it: {argument}.float().",
        )
    if shape is not None and tuple(value.shape) != shape:
        raise invalid(argument, shape_of(value), f"shape {tuple(int(size) for size in shape)}")
    if device is not None and value.device != device:
        raise invalid(
            argument,
            str(value.device),
            f"a tensor on {device}, where x is",
            f"Move it: {argument}.to({str(device)!r}).",
        )


def check_one_memory_format(argument: str, value: Tensor, reference: str, like: Tensor) -> None:
    """``value`` is not channels_last beside a contiguous ``like``, or the other way round.

    Tensors whose strides fit both formats (one channel, one pixel) or none (slices) go with either.

    Raises:
        UserError: formats that are clear and differ; nothing is copied from one to the other in silence.
    """
    formats = _memory_format(value), _memory_format(like)
    if None in formats or formats[0] == formats[1]:
        return
    theirs, ours = formats
    attribute = "contiguous_format" if ours == "contiguous" else ours
    raise invalid(
        argument,
        f"memory format {theirs}",
        f"{ours}, the memory format of {reference}",
        f"Convert one of them, best where it is made: {argument}.contiguous(memory_format=torch.{attribute}).",
    )


def _memory_format(value: Tensor) -> str | None:
    """PyTorch's name for the format of (B, C, *spatial) where the strides fit one alone, else None."""
    if not 4 <= value.dim() <= 5:
        return None  # PyTorch knows no channels_last for one spatial dimension
    last = torch.channels_last if value.dim() == 4 else torch.channels_last_3d
    planes, pixels = value.is_contiguous(), value.is_contiguous(memory_format=last)
    if planes == pixels:
        return None
    return "contiguous" if planes else str(last).removeprefix("torch.")


def check_same_dtype(argument: str, value: Tensor, reference: str, dtype: torch.dtype) -> None:
    """``value`` has the dtype of the argument called ``reference``."""
    if value.dtype != dtype:
        raise invalid(
            argument,
            name_of(value.dtype),
            f"{name_of(dtype)}, the dtype of {reference}",
            f"Convert one of them: {argument}.to({reference}.dtype).",
        )


def check_parameter_dtype(argument: str, value: Tensor, dtype: torch.dtype) -> None:
    """κ, SE and norm parameters are float32 or have the dtype of the feature."""
    if value.dtype not in (dtype, torch.promote_types(dtype, torch.float32)):
        wide = name_of(torch.promote_types(dtype, torch.float32))
        expected = wide if wide == name_of(dtype) else f"{wide} or {name_of(dtype)}"
        raise invalid(argument, name_of(value.dtype), f"{expected}; the feature is {name_of(dtype)}")


def check_activation(activation: str) -> None:
    """One of relu, elu, mish."""
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)


def check_gate(
    w_down: Tensor, b_down: Tensor, w_up: Tensor, b_up: Tensor, *, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Weights of an SE gate of ``width`` N: w_down (H, N), b_down (H), w_up (N, H), b_up (N)."""
    check_tensor("w_down", w_down, device=device)
    if w_down.dim() != 2 or w_down.shape[1] != width or w_down.shape[0] < 1:
        raise invalid(
            "w_down",
            shape_of(w_down),
            f"shape (H, {int(width)}) with H >= 1: hidden width by the number of gated channels or tokens",
            "A reduction r larger than that number gives H = 0: use max(1, N // r)." if 0 in w_down.shape else "",
        )
    hidden = w_down.shape[0]
    check_tensor("b_down", b_down, shape=(hidden,), device=device)
    check_tensor("w_up", w_up, shape=(width, hidden), device=device)
    check_tensor("b_up", b_up, shape=(width,), device=device)
    for argument, value in (("w_down", w_down), ("b_down", b_down), ("w_up", w_up), ("b_up", b_up)):
        check_parameter_dtype(argument, value, dtype)

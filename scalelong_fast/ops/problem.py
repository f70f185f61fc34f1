"""What a plan is chosen for: the facts of one call that do not depend on values."""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """One call of an op, as the choice of a plan sees it.

    Attributes:
        op: public name of the op.
        arch: ``cpu``, ``sm_80``, ``sm_90``, ``sm_100``, ``gfx942``, ... : the row of the table.
        dtype: of x (and skip and weight).
        rows: tokens or pixels, B·L or B·H·W.
        widths: feature widths, in the op's order (x, skip, output).
        layout: ``rows`` for (B, L, D), ``planes`` for contiguous (B, C, *spatial), ``pixels`` for channels_last.
        batch: B.
        hidden: hidden width of the SE gate, 0 without one.
        aligned: whether every row starts at a multiple of 16 bytes.
    """

    op: str
    arch: str
    dtype: torch.dtype
    rows: int
    widths: tuple[int, ...]
    layout: str = "rows"
    batch: int = 1
    hidden: int = 0
    aligned: bool = True


def interpreting() -> bool:
    """Whether Triton runs its kernels in the interpreter, where they take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


#: Whether Triton can be imported (it has no build for macOS and Windows).
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


@functools.cache
def _cuda_arch(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    # Tables are kept per generation: an L40 (8.9) reads sm_80's, a B300 (10.3) sm_100's.
    major = torch.cuda.get_device_capability(index)[0]
    return f"sm_{major}0"


_assumed: str | None = None


@contextmanager
def assume_architecture(arch: str) -> Iterator[None]:
    """Choose plans as on ``arch`` inside the block, whatever device the tensors are on: for tracing without values."""
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


def assumed_architecture() -> str | None:
    """That of the innermost :func:`assume_architecture`; None outside of any."""
    return _assumed


def architecture(device: torch.device) -> str:
    """The row of the plan table that serves ``device``."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return _device_arch(device.type, None)
    return _device_arch("cuda", torch.cuda.current_device() if device.index is None else device.index)


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a CPU, and not there to stand for one of an assumed architecture."""
    return tensor.device.type == "cpu" and _assumed in (None, "cpu")


# The answer never changes, so a compiler need not look inside.
@torch.compiler.assume_constant_result
def _device_arch(kind: str, index: int | None) -> str:
    return _first_use(kind, index)


@functools.cache
def _first_use(kind: str, index: int | None) -> str:
    # Tuned plans are read when a device is first used: importing reads no file and asks no device for its name.
    from scalelong_fast.ops.tuned import load_tuned

    arch = kind if index is None else _cuda_arch(index)
    load_tuned(torch.device(kind) if index is None else torch.device(kind, index), arch)
    return arch


def triton_obstacle(problem: Problem) -> str | None:
    """Why Triton kernels cannot serve the call, or None."""
    if problem.dtype == torch.float64:
        return "float64 is served by the eager plan only"
    if not TRITON_INSTALLED:
        return "Triton is not installed (pip install triton; it has builds for Linux only)"
    if problem.arch == "cpu" and not interpreting():
        return "the tensors are on the CPU; Triton takes those only under TRITON_INTERPRET=1"
    if problem.arch not in ("cpu", "gfx942", "gfx90a", "gfx950") and not problem.arch.startswith("sm_"):
        return f"Triton has no backend for {problem.arch}"
    if problem.arch.startswith("sm_") and int(problem.arch[3:]) < 80:
        return f"{problem.arch} is older than the oldest supported GPU, sm_80 (Ampere)"
    return None

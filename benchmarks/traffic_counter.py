"""Bytes that the kernels really move, counted in Triton's interpreter: no GPU is needed."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch

from benchmarks.screen import quiet
from scalelong_fast.errors import UserError

#: Operators that touch no element of a tensor: views, allocations, questions.
_IDLE = re.compile(
    "alias|as_strided|detach|empty|empty_like|empty_strided|expand|flatten|new_empty|permute|promote_types|reshape|"
    "resize_|select|set_|slice|squeeze|t|to|transpose|unsqueeze|view|_unsafe_view"
)
_LAUNCH = "interpreted launch"


@dataclass
class Launch:
    """What one launch of a kernel moved.

    Attributes:
        kernel: name of the function.
        loads, stores: bytes of unmasked elements, as often as they were asked for. An atomic counts as both.
        reads, writes: (address, bytes) of every element that was loaded, stored.
    """

    kernel: str
    loads: int = 0
    stores: int = 0
    reads: list[tuple[np.ndarray, int]] = field(default_factory=list, repr=False)
    writes: list[tuple[np.ndarray, int]] = field(default_factory=list, repr=False)

    @property
    def read(self) -> int:
        """Bytes loaded, each counted once: what comes from memory if the caches hold all the rest."""
        return _different(self.reads)

    @property
    def written(self) -> int:
        """Bytes stored, each counted once."""
        return _different(self.writes)


def _different(accesses: list[tuple[np.ndarray, int]]) -> int:
    total = 0
    for size in {size for _, size in accesses}:
        # Elements of one kernel that overlap have the same size: nothing here reads a tensor under two dtypes.
        total += size * np.unique(np.concatenate([address for address, own in accesses if own == size])).size
    return total


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Count the memory accesses of every kernel launched inside the block.

    Yields:
        A list that grows by a :class:`Launch` with each launch.

    Raises:
        UserError: the kernels are not run by the interpreter.
    """
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise UserError(
            "TRITON_INTERPRET: not set, expected 1: bytes are counted in the interpreter. Set it before the start."
        )
    launches: list[Launch] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, rmw = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    launch = executor.__call__

    def elements(pointers, mask) -> tuple[np.ndarray, int]:
        address = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        return address[np.broadcast_to(mask.data, address.shape).astype(bool)], size

    def note_load(pointers, mask) -> None:
        found = elements(pointers, mask)
        launches[-1].loads += found[0].size * found[1]
        launches[-1].reads.append(found)

    def note_store(pointers, mask) -> None:
        found = elements(pointers, mask)
        launches[-1].stores += found[0].size * found[1]
        launches[-1].writes.append(found)

    def masked_load(self, pointers, mask, *rest, **options):
        note_load(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def masked_store(self, pointers, value, mask, *rest, **options):
        note_store(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def atomic_rmw(self, op, pointers, value, mask, *rest, **options):
        note_load(pointers, mask)
        note_store(pointers, mask)
        return rmw(self, op, pointers, value, mask, *rest, **options)

    def call(self, *args, **kwargs):
        launches.append(Launch(self.fn.__name__))
        with torch.profiler.record_function(_LAUNCH):  # the interpreter has copies of its own
            return launch(self, *args, **kwargs)

    with (
        mock.patch.object(builder, "create_masked_load", masked_load),
        mock.patch.object(builder, "create_masked_store", masked_store),
        mock.patch.object(builder, "create_atomic_rmw", atomic_rmw),
        mock.patch.object(executor, "__call__", call),
    ):
        yield launches


@contextmanager
def pytorch_work() -> Iterator[list[str]]:
    """Note the operators of PyTorch that move data inside the block, outside of our kernels.

    Yields:
        A list that holds, once the block has ended, ``name(elements)`` of all operators but views and allocations, in
        order. A copy that nobody meant would stand there.
    """
    found: list[str] = []
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
    with quiet():
        profiler.start()
    try:
        yield found
    finally:
        with quiet():
            profiler.stop()
    events = profiler.events()
    launches = [event.time_range for event in events if event.name == _LAUNCH]
    for event in events:
        inside = any(span.start <= event.time_range.start <= span.end for span in launches)
        name = event.name.removeprefix("aten::")
        if event.name.startswith("aten::") and not event.cpu_children and not _IDLE.fullmatch(name) and not inside:
            found.append(f"{name}({max((math.prod(shape) for shape in event.input_shapes), default=0)})")

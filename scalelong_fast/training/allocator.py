"""Memory that tensors on a CPU leave behind stays with the process while it trains.

The C library hands large freed blocks back to the system, which gives them out again page by page, each filled with
zeros: a step that frees its activations pays for every page of them again in the next step.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
#: What a process with large blocks arrives at if left alone: glibc raises its thresholds, to at most these.
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}
_NEVER = (1 << 31) - 1


def _is_set_by_hand() -> bool:
    """Whether the user has set glibc's allocator up, or another one: theirs to decide."""
    return (
        any(name.startswith("MALLOC_") for name in os.environ)
        or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
        or "malloc" in os.environ.get("LD_PRELOAD", "")
    )


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[bool]:
    """Keep, inside, memory that is freed for the process's next use of it; yields whether that is so.

    Nothing is done for other devices, on other systems than Linux with glibc, and where the environment sets an
    allocator up (``MALLOC_*``, ``GLIBC_TUNABLES``, ``LD_PRELOAD``). Afterwards the allocator hands memory back as
    PyTorch's processes usually do.

    Args:
        device: where the tensors are.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or _is_set_by_hand():
        yield False
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_MAX, 0)  # blocks of their own go back whole; a limit on their size is refused by older versions
    mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield True
    finally:
        for parameter, value in _USUAL.items():
            mallopt(parameter, value)

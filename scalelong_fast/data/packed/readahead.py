"""Telling the operating system which parts of mapped files will be read next."""

import ctypes
import mmap
from functools import cache
from typing import Any

import numpy as np


def announce(addresses: np.ndarray, size: int) -> None:
    """Have ``size`` bytes from each of these addresses (int64), in mapped files, read in the background and at once.

    Otherwise a copy of rows that are not in memory yet waits for the storage at one row after the other, each time with
    what the operating system reads ahead of it in vain. Where the platform cannot be told, nothing happens.
    """
    advise = _madvise()
    if advise is None:
        return
    into_page = addresses % mmap.PAGESIZE
    for start, length in zip((addresses - into_page).tolist(), (into_page + size).tolist(), strict=True):
        advise(start, length, mmap.MADV_WILLNEED)


@cache
def _madvise() -> Any:
    """The C library's madvise; None where there is none."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return None
    try:
        # PyDLL keeps the interpreter lock: a call takes about as long as giving the lock away and getting it back.
        function = ctypes.PyDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function

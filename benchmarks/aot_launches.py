"""Launches without a GPU: which kernels a host function would launch on a target, and their compiled code.

The host functions of kernels/ are called with tensors of the ``meta`` device, which have shapes and no data, while
Triton is told of a driver for the target. Signatures, constexprs, launch configurations and the specialisation on
divisibility are thereby what they are at run time. Nothing here works under TRITON_INTERPRET=1.
"""

import hashlib
import importlib
import itertools
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from benchmarks.gpu_code import Target


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched.

    Attributes:
        kernel: its name.
        module: file name in kernels/ without ``.py``.
        constexprs: by parameter.
        num_warps, num_stages: the launch configuration.
        key: names signature, constexprs, divisibility and options; equal keys compile to the same code.
    """

    kernel: str
    module: str
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    key: str


@dataclass
class Recording:
    """What happened inside :func:`on_target`.

    Attributes:
        launches: in order.
        lines: lines of the tables that were chosen: (architecture, kernel's name there, line's index).
        compiled: the compiled kernel, where one was asked for.
    """

    launches: list[Launch]
    lines: set[tuple[str, str, int]]
    compiled: Any = None


class _Driver:
    """As much of a driver as launching a kernel without running it asks for."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        # Triton keeps what it has compiled by device.
        self._device = object()

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return self._device

    def get_current_stream(self, device):
        return 0


@contextmanager
def on_target(target: Target, compile_index: int | None = None) -> Iterator[Recording]:
    """Inside the block launches are recorded for ``target`` and none is run.

    Args:
        target: the GPU to pretend.
        compile_index: the launch that is compiled, counted from 0; the others are not.
    """
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    recording = Recording([], set())
    launch = JITFunction.run
    counter = itertools.count()

    def run(kernel, *args, grid, warmup, **kwargs):
        wanted = next(counter) == compile_index

        def hook(*, compile, **_):
            recording.launches.append(_describe(kernel, compile))
            return not wanted  # True: compile nothing

        # With warmup Triton compiles and does not launch.
        with mock.patch.object(knobs.runtime, "jit_cache_hook", hook):
            compiled = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        if wanted:
            recording.compiled = compiled

    before = driver._active
    driver.set_active(_Driver(target))
    try:
        with mock.patch.object(JITFunction, "run", run), _pretence(target, recording.lines):
            yield recording
    finally:
        driver._active = before


def _describe(kernel, compile: dict[str, Any]) -> Launch:
    # Integers that are 1 are constants for Triton too; here stands what the host chose, and which tensors are absent.
    constexprs = {
        kernel.params[path[0]].name: value
        for path, value in compile["constants"].items()
        if kernel.params[path[0]].is_constexpr or value is None
    }
    text = repr((kernel.__name__, compile["key"]))
    return Launch(
        kernel.__name__,
        kernel.__module__.rpartition(".")[2],
        {name: _plain(value) for name, value in constexprs.items()},
        compile["num_warps"],
        compile["num_stages"],
        hashlib.sha256(text.encode()).hexdigest()[:12],
    )


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


@contextmanager
def _pretence(target: Target, chosen: set[tuple[str, str, int]]) -> Iterator[None]:
    """Host functions find the target's table and multiprocessors; the lines that they take are noted."""
    from scalelong_fast import kernels
    from scalelong_fast.kernels import configs, gemm
    from scalelong_fast.ops import problem

    # A module first imported inside the block would keep the replacements for good.
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        importlib.import_module(module.name)
    lookup = configs.launch_config

    def noted(kernel: str, arch: str, dtype: str, width: int):
        found = configs.find_line(kernel, arch, dtype, width)
        if found is not None:
            chosen.add((found[0], kernel, found[1]))
        return lookup(kernel, arch, dtype, width)

    replacements = {"launch_config": (lookup, noted), "processors": (gemm.processors, lambda _: target.processors)}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(problem, "architecture", return_value=target.name))
        for module in [module for name, module in sys.modules.items() if name.startswith("scalelong_fast.kernels.")]:
            for name, (original, replacement) in replacements.items():
                if getattr(module, name, None) is original:
                    stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def record(target: Target, call: Callable[[], object]) -> Recording:
    """The launches that ``call`` makes on ``target``; nothing is compiled."""
    with on_target(target) as recording:
        call()
    return recording


def compile_launch(target: Target, call: Callable[[], object], index: int) -> Any:
    """Triton's compiled kernel of launch number ``index`` of ``call``."""
    with on_target(target, index) as recording:
        call()
    return recording.compiled

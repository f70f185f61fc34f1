"""What the benchmarks' commands share: options of the same names, the result file, and how a command ends."""

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.screen import Screen
from scalelong_fast.errors import unknown_name
from scalelong_fast.training.hardware import resolve_device


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, see :func:`device_of`."""
    parser.add_argument("--device", default="auto", help="auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ...")


def add_out(parser: argparse.ArgumentParser, command: str) -> None:
    """Add ``--out``, see :func:`result_path`."""
    parser.add_argument("--out", type=Path, help=f"result file (default: benchmarks/results/<machine>/{command}.json)")


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Add ``--compile``, see :func:`compiles`."""
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only, as it takes minutes"
    )


def by_device(defaults: Mapping[str, float]) -> str:
    """Defaults by device type, for an option's help."""
    return f"default: {defaults['cuda']:g} on a GPU, {defaults['cpu']:g} on a CPU"


def device_of(options: argparse.Namespace) -> torch.device:
    """The device of ``--device``.

    Raises:
        UserError: it is not there.
    """
    return resolve_device(options.device, "--device")


def compiles(options: argparse.Namespace, device: torch.device) -> bool:
    """Whether recipes that compile are measured."""
    return device.type == "cuda" if options.compile is None else options.compile


def check_names(argument: str, names: Iterable[str] | None, known: Collection[str]) -> None:
    """Refuse names that are not known.

    Raises:
        UserError: one is not.
    """
    for name in names or ():
        if name not in known:
            raise unknown_name(argument, name, known)


def result_path(options: argparse.Namespace, where: Mapping[str, Any], command: str) -> Path:
    """The result file, its folder made: that of ``--out``, else the machine's."""
    path = options.out or environment.RESULTS / where["machine"] / f"{command}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def finish(screen: Screen, faults: Sequence[str], written: Path | None) -> int:
    """Say what failed and where the results lie; returns the exit code.

    Args:
        screen: to say it on.
        faults: a line for each.
        written: the result file; None: nothing was written.
    """
    for fault in faults:
        screen.print(f"benchmarks: error: {fault}", style="red")
    if written is not None:
        screen.print(f"Written to {written}.")
    return 1 if faults else 0

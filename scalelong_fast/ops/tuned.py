"""Plans found by timing, kept on disk per device and versions, and put in front of the table's rules.

The file is ``plans/<device>-torch<version>-triton<version>.json`` in ``~/.cache/scalelong_fast``, or in the folder that
the environment variable ``SCALELONG_CACHE`` names. It is read once, when a device is first used, and never required.
"""

import importlib.metadata
import json
import os
import platform
import re
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from scalelong_fast.ops.problem import Problem
from scalelong_fast.ops.tables import RULES, Rule
from scalelong_fast.version import __version__

#: What a file keeps of a rule: the exact class of calls that was timed, and the winner.
KEPT = ("plan", "dtypes", "layouts", "rows", "batch", "hidden", "widths", "aligned")


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except (OSError, UnicodeDecodeError):
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine() or "unknown"


def _triton_version() -> str:
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def cache_file(device: torch.device) -> Path:
    """Where the tuned plans of a device are kept, by the versions of this library, PyTorch and Triton."""
    folder = os.environ.get("SCALELONG_CACHE")
    root = Path(folder) if folder else Path.home() / ".cache" / "scalelong_fast"
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return root / "plans" / f"{name}-{__version__}-torch{torch.__version__}-triton{_triton_version()}.json"


def exact_rule(plan: str, problem: Problem, reason: str) -> Rule:
    """A rule for the calls that are like ``problem`` in everything a choice depends on."""

    def exactly(value: int) -> tuple[int, int]:
        return int(value), int(value)

    return Rule(
        plan,
        dtypes=(str(problem.dtype).removeprefix("torch."),),
        layouts=(problem.layout,),
        rows=exactly(problem.rows),
        batch=exactly(problem.batch),
        hidden=exactly(problem.hidden),
        widths=tuple(int(width) for width in problem.widths),
        aligned=bool(problem.aligned),
        reason=reason,
    )


def _same_class(a: Rule, b: Rule) -> bool:
    return replace(a, plan="", reason="") == replace(b, plan="", reason="")


def put_in_front(op: str, arch: str, rules: list[Rule]) -> None:
    """Make ``rules`` the first ones of an op; older ones for the same calls go."""
    others = [old for old in RULES.get((op, arch), ()) if not any(_same_class(old, new) for new in rules)]
    RULES[op, arch] = (*rules, *others)


def load_tuned(device: torch.device, arch: str) -> None:
    """Put the tuned plans of a device in front of the table's; without a file nothing happens.

    A file that cannot be used is ignored with a warning that names it. GPUs of one architecture but different names
    share their rules within a process: those of the one used last stand in front.
    """
    try:
        path = cache_file(device)
        content = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: nobody has a home here
        return
    except (OSError, UnicodeDecodeError) as error:
        _ignored(path, error)
        return
    try:
        rules = _parse(json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _ignored(path, error)
        return
    for op, found in rules.items():
        put_in_front(op, arch, found)


def _ignored(path: Path, error: Exception) -> None:
    warnings.warn(
        f"{path} does not hold tuned plans ({type(error).__name__}: {error}); it is ignored. Delete it or run "
        "`scalelong-fast tune` again.",
        stacklevel=2,
    )


def _parse(data: dict[str, Any]) -> dict[str, list[Rule]]:
    rules: dict[str, list[Rule]] = {}
    for op, entries in data["plans"].items():
        rules[op] = []
        for entry in entries:
            conditions = {key: tuple(v) if isinstance(v := entry[key], list) else v for key in KEPT}
            ranges = [conditions[key] for key in ("rows", "batch", "hidden")]
            if not (isinstance(conditions["plan"], str) and all(_whole_numbers(r, 2) for r in ranges)):
                raise ValueError(f"entry {entry!r} of {op}")
            if not _whole_numbers(conditions["widths"], len(conditions["widths"])):
                raise ValueError(f"widths {conditions['widths']!r} of {op}")
            rules[op].append(Rule(**conditions, reason=f"tuned on {data['device']}, {entry['date']}"))
    return rules


def _whole_numbers(value: Any, count: int) -> bool:
    return isinstance(value, tuple) and len(value) == count and all(type(v) is int for v in value)


def store_tuned(device: torch.device, op: str, rule: Rule, date: str, times_ms: dict[str, float]) -> Path:
    """Add a rule to a device's file, in place of an older one for the same calls; the file is replaced in one step.

    Args:
        date: when it was timed.
        times_ms: median of each plan, for people.

    Returns:
        The file.

    Raises:
        OSError: the folder cannot be written.
    """
    path = cache_file(device)
    data: dict[str, Any] = {"device": device_name(device), "plans": {}}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        _parse(stored)
        data = stored
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _ignored(path, error)
    entry = {key: value for key, value in asdict(rule).items() if key in KEPT}
    entry = json.loads(json.dumps({**entry, "date": date, "ms": times_ms}))
    kept = [
        old
        for old in data["plans"].get(op, [])
        if any(old[key] != entry[key] for key in KEPT if key != "plan")
    ]  # fmt: skip
    data["plans"][op] = [entry, *kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path

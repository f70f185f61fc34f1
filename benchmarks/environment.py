"""What was measured where: machine, versions, speed limits, hashes of the sources. Nothing that names a person."""

import datetime
import hashlib
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.code import running_code
from benchmarks.timing import stopwatch, synchronize
from scalelong_fast.version import __version__

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def slug(text: str) -> str:
    """Lower-case words joined by hyphens, fit for a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine() or "unknown"


def machine_name(device: torch.device) -> str:
    """The folder of this machine's results: the GPU's name, or ``cpu-`` and the processor's, as a :func:`slug`."""
    return slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else f"cpu-{slug(cpu_model())}"


def describe(device: torch.device) -> dict[str, Any]:
    """Machine and versions, JSON-ready; everything but ``date`` stays the same from run to run."""
    gpu = device.type == "cuda"
    return {
        "machine": machine_name(device),
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "cpu_model": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "scalelong_fast": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def ceilings(device: torch.device, seconds: float = 1.0) -> dict[str, Any]:
    """What the machine can do at best, measured now.

    Args:
        device: where.
        seconds: time spent on each of the three measurements.

    Returns:
        ``copy_gb_s``, bytes read plus written in 10^9 a second by a large copy, and ``matmul_tflop_s``, 10^12
        multiplications and additions a second of a large square product, by dtype.
    """
    gpu = device.type == "cuda"
    source = torch.rand((1 << 30 if gpu else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    copy = fastest(lambda: target.copy_(source), device, seconds)
    result: dict[str, Any] = {"copy_gb_s": round(2 * source.nbytes / copy / 1e9, 2), "matmul_tflop_s": {}}
    size = 8192 if gpu else 1024
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        elapsed = fastest(lambda a=a, b=b: a @ b, device, seconds)
        result["matmul_tflop_s"][name] = round(2 * size**3 / elapsed / 1e12, 4)
    return result


def fastest(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of a call at best, repeated for ``seconds``."""
    call()
    synchronize(device)
    watch = stopwatch(device)
    calls = 10 if device.type == "cuda" else 1  # queued together: a single launch would start on an idle GPU

    def several() -> None:
        for _ in range(calls):
            call()

    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, watch(several) / calls)
    return best


def source_hash(sources: Sequence[str], root: Path = ROOT) -> str | None:
    """First 12 hex digits of the SHA-256 over the files, one after the other; None if one is missing.

    Of a Python file the code counts alone (:func:`~benchmarks.code.running_code`): a comment makes no measurement
    stale.

    Args:
        sources: paths relative to ``root``.
        root: the repository.
    """
    digest = hashlib.sha256()
    for source in sources:
        path = root / source
        if not path.is_file():
            return None
        content = path.read_bytes()
        digest.update(running_code(content.decode()).encode() if path.suffix == ".py" else content)
    return digest.hexdigest()[:12]

"""A profile of some steps: a table to read, and a trace for a browser."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scalelong_fast.training.breakdown import PARTS

#: Steps before the profile, in which the device's clocks and the allocator settle.
SETTLING_STEPS = 3

#: Lines of the table.
ROWS = 40


class StepProfile:
    """Records ``steps`` steps of a run with PyTorch's profiler, then writes ``summary.txt`` and ``trace.json``.

    A context manager around them: a run that ends before the profile does leaves a shorter one.

    Args:
        steps: how many; 0: none.
        folder: where the files go.
        device: where the steps run.
        say: is told where the files are.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device, say: Callable[[str], None]):
        self.steps, self.folder, self.device, self.say = steps, folder, device, say
        self._seen = 0
        self._profile: profile | None = None

    def after_step(self) -> None:
        """A step has been queued; the profile begins and ends here."""
        if not self.steps or self._seen > SETTLING_STEPS + self.steps:
            return
        self._seen += 1
        if self._seen == SETTLING_STEPS:
            self._begin()
        elif self._seen == SETTLING_STEPS + self.steps:
            self.close()
            self._seen += 1

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What ended the run is what the user must see, not that the device then answered no more.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(RuntimeError, OSError):
            self.close()

    def close(self) -> None:
        """Write what there is."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        try:
            self._wait()
        finally:
            recorded.stop()
        steps = min(self._seen - SETTLING_STEPS, self.steps)
        if steps == 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / "trace.json"))
        text = summary(recorded.key_averages(), steps, self.device)
        (self.folder / "summary.txt").write_text(text, encoding="utf-8")
        self.say(
            f"Profile of {steps} steps: {self.folder / 'summary.txt'} (table) and {self.folder / 'trace.json'} (open "
            "in chrome://tracing or ui.perfetto.dev)."
        )

    def _begin(self) -> None:
        self._wait()  # kernels queued before belong to other steps
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def summary(averages: Any, steps: int, device: torch.device) -> str:
    """The table of a profile.

    Args:
        averages: what ``torch.profiler.profile.key_averages`` returned.
        steps: steps recorded.
        device: whose time is shown: of kernels on a GPU, of operators on a CPU.

    Returns:
        Text: the parts of the step, then operators by the time spent in themselves, with share and calls a step.
    """
    gpu = device.type == "cuda"
    spans = [event for event in averages if event.key in PARTS]
    # Of a GPU the kernels alone: an operator would show their time a second time.
    rows = [event for event in averages if event.key not in PARTS and (not gpu or _is_kernel(event))]

    def own(event: Any) -> float:
        return event.self_device_time_total if gpu else event.self_cpu_time_total

    rows = sorted((row for row in rows if own(row) > 0), key=own, reverse=True)
    total = sum(map(own, rows)) or 1.0
    lines = [
        f"{steps} steps on {device}; times in milliseconds a step.",
        "",
        "part of the step (time of the host, with all that is called inside)",
        *(
            f"  {event.key:12s} {event.cpu_time_total / 1000 / steps:10.3f}"
            for event in sorted(spans, key=lambda event: PARTS.index(event.key))
            if event.cpu_time_total > 0
        ),
        "",
        f"{'self':>10s} {'share':>7s} {'calls':>8s}  {'kernel' if gpu else 'operator'} (total "
        f"{total / 1000 / steps:.3f})",
    ]
    for row in rows[:ROWS]:
        lines.append(
            f"{own(row) / 1000 / steps:10.3f} {own(row) / total:7.1%} {row.count / steps:8.1f}  {row.key[:110]}"
        )
    if len(rows) > ROWS:
        rest = sum(map(own, rows[ROWS:]))
        calls = sum(row.count for row in rows[ROWS:]) / steps
        lines.append(f"{rest / 1000 / steps:10.3f} {rest / total:7.1%} {calls:8.1f}  {len(rows) - ROWS} others")
    return "\n".join(lines) + "\n"


def _is_kernel(event: Any) -> bool:
    # Ranges that PyTorch names itself (Optimizer.step, FSDP) lie on the device's time line too, around kernels.
    return str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)

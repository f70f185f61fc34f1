"""What a run measures of itself while it goes on: speed, use of the hardware, memory, where the time goes."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from scalelong_fast.training.attention_backend import sound_attention
from scalelong_fast.training.breakdown import Breakdown
from scalelong_fast.training.collector import QuietCollector
from scalelong_fast.training.config import RunConfig
from scalelong_fast.training.flops import flops_per_image, model_flops_utilisation, peak_flops
from scalelong_fast.training.hardware import Execution, fp32_products
from scalelong_fast.training.profiling import StepProfile


class Instruments:
    """Context manager around the loop; sets the hardware's policies and takes the measurements.

    Args:
        config: the run.
        execution: device and precision.
        breakdown: the step's.
        profile: folder of the profile; None on ranks that write nothing.
        world: number of processes.
        say: prints a line.
    """

    def __init__(
        self,
        config: RunConfig,
        execution: Execution,
        breakdown: Breakdown,
        profile: Path | None,
        world: int,
        say: Callable[[str], None],
    ):
        self.config, self.execution, self.breakdown, self.world = config, execution, breakdown, world
        self.say = say
        self.peak = peak_flops(execution.device, execution.autocast, config.train.tf32)
        self.flop = flops_per_image(config.model) if self.peak is not None else 0
        steps = config.train.profile if profile is not None else 0
        self.profile = StepProfile(steps, profile or Path(), execution.device, say)
        self._stack = ExitStack()

    def __enter__(self) -> "Instruments":
        stack, device = self._stack, self.execution.device
        stack.enter_context(fp32_products(device, self.config.train.tf32))
        note = stack.enter_context(sound_attention(self.config.model, self.execution))
        if note:
            self.say(note)
        self.collector = stack.enter_context(QuietCollector())
        stack.enter_context(self.profile)
        self._forget_peak()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def start(self, step: int) -> None:
        """The first step that counts comes next, after ``step`` finished ones."""
        # Replays of CUDA graphs allocate nothing: what they need, the warm-up has allocated while it recorded them.
        if self.execution.mode != "graphs":
            self._forget_peak()
        elif skipped := counters["inductor"]["cudagraph_skips"]:
            self.say(
                f"CUDA graphs: PyTorch could not record {skipped} of the compiled graphs, which run without "
                "(TORCH_LOGS=cudagraphs says why). Set --train.compile whole if it is no faster."
            )
        self._since, self._since_step = time.perf_counter(), step
        self.breakdown.read(1)

    def measure(self, step: int) -> dict[str, float]:
        """What is written beside the loss; call it where the host has waited for the device.

        Returns:
            ``images_per_second`` of all processes, the breakdown of :meth:`Breakdown.read` and ``memory``, the peak in
            bytes, both of this process, and ``mfu`` where the device's peak rate is known. Means since the last
            measurement.
        """
        now = time.perf_counter()
        steps = step - self._since_step
        speed = steps * self.config.train.batch_size / max(now - self._since, 1e-9)
        self._since, self._since_step = now, step
        row = {"images_per_second": speed, **self.breakdown.read(steps)}
        memory = peak_memory(self.execution.device)
        if memory is not None:
            row["memory"] = memory
        mfu = model_flops_utilisation(self.flop, speed, self.peak, self.world)
        if mfu is not None:
            row["mfu"] = mfu
        self.collector.collect()
        return row

    def _forget_peak(self) -> None:
        if self.execution.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.execution.device)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that were in use at a time: tensors on a GPU, on a CPU the whole process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # everywhere else it is in KiB

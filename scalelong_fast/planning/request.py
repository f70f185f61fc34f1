"""What is asked of the planner."""

import typing
from dataclasses import dataclass

from scalelong_fast.errors import check_range, invalid, unknown_name
from scalelong_fast.planning.gpus import resolve_gpu
from scalelong_fast.training.config import Parallel, Precision, Recompute

#: What training knows, but for what it decides by the machine that it runs on.
PARALLEL = ("none", *(name for name in typing.get_args(Parallel) if name != "auto"))
RECOMPUTE = typing.get_args(Recompute)
PRECISIONS = tuple(name for name in typing.get_args(Precision) if not name.startswith("auto"))


@dataclass(frozen=True)
class PlanRequest:
    """Predict memory, time and the best way to share a run, from the network, the GPUs and their links."""

    model: str
    """Network: one of scalelong-fast models, or a training preset, which also says batch and steps."""
    gpus: int = 1
    """GPUs in all."""
    batch: int | None = None
    """Samples a step, of all GPUs together; default: the training preset's."""
    gpu: str = "h200"
    """Kind of GPU: a100-40, a100-80, h100, h200, b200, l40s or rtx4090."""
    gpus_per_node: int = 8
    """GPUs of a machine."""
    parallel: str = "auto"
    """none, ddp, fsdp or hsdp; auto: every way is looked at."""
    recompute: str = "auto"
    """none, selective or block, see --train.recompute; auto: all are looked at."""
    accumulate: int = 1
    """Parts that a GPU takes its share of the batch in, see --train.accumulate."""
    precision: str = "bf16"
    """bf16, fp16 or fp32 (through TF32)."""
    compile: bool = True
    """Whether the step is compiled."""
    steps: int | None = None
    """Steps of the run; default: the training preset's."""
    images: int | None = None
    """Images of the training set, which lies on every GPU where it takes no more than 4 GiB; default: the training
    preset's, none for a network alone."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "accumulate"):
            check_range(f"--{name.replace('_', '-')}", getattr(self, name), low=1, integer=True)
        for name in ("batch", "steps", "images"):
            if getattr(self, name) is not None:
                check_range(f"--{name}", getattr(self, name), low=1, integer=True)
        for name, known in (("parallel", PARALLEL), ("recompute", RECOMPUTE)):
            if getattr(self, name) not in ("auto", *known):
                raise unknown_name(f"--{name}", getattr(self, name), ("auto", *known))
        if self.precision not in PRECISIONS:
            raise unknown_name("--precision", self.precision, PRECISIONS)
        resolve_gpu(self.gpu)
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            below = self.gpus - self.gpus % self.gpus_per_node
            raise invalid(
                "--gpus",
                self.gpus,
                f"a multiple of --gpus-per-node = {self.gpus_per_node}, or no more than that",
                f"Take {below} or {below + self.gpus_per_node}.",
            )

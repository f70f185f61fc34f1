"""The plan itself: every way to share and recompute, what fits, and what is fastest."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scalelong_fast.errors import UserError, invalid, unknown_name
from scalelong_fast.models import ModelConfig, list_models, model_config
from scalelong_fast.planning.assumptions import Assumptions
from scalelong_fast.planning.gpus import GPUS, resolve_gpu
from scalelong_fast.planning.memory import count, memory, resident_bytes
from scalelong_fast.planning.request import RECOMPUTE, PlanRequest
from scalelong_fast.planning.timing import Cluster, StepTime, step_time
from scalelong_fast.planning.tracing import Trace, trace
from scalelong_fast.training.compiling import BLOCKWISE_PARAMETERS
from scalelong_fast.training.config import RunConfig
from scalelong_fast.training.flops import flops_per_image, model_flops_utilisation
from scalelong_fast.training.presets import PRESETS

GIB = 1 << 30

#: Images of the presets' training sets, by the name of the set or of its packed folder.
IMAGES = {"digits": 1797, "cifar10": 50_000, "celeba64": 162_770, "imagenet64": 1_281_167}


@dataclass(frozen=True)
class Option:
    """One way to run: what it takes.

    Attributes:
        parallel, recompute: the way.
        memory: bytes on one GPU by what they are for.
        limit: bytes that there are.
        time: seconds of a step.
    """

    parallel: str
    recompute: str
    memory: dict[str, int]
    limit: int
    time: StepTime

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit


@dataclass(frozen=True)
class Plan:
    """All ways, the best first among those that fit.

    Attributes:
        request: what was asked, batch and steps filled in where they are known.
        model: the network's hyperparameters.
        parameters: their number.
        options: every way that was looked at.
        best: the fastest that fits.
        flops: of the model, one image forward and backward.
        mfu: of the best way; what is recomputed does not count.
    """

    request: PlanRequest
    model: ModelConfig
    parameters: int
    options: tuple[Option, ...]
    best: Option
    flops: int
    mfu: float
    assumptions: Assumptions = field(default_factory=Assumptions)

    @property
    def images_per_second(self) -> float:
        assert self.request.batch is not None
        return self.request.batch / self.best.time.total

    @property
    def days(self) -> float | None:
        """Of the whole run, without checkpoints and samples; None where its steps are not known."""
        return None if self.request.steps is None else self.request.steps * self.best.time.total / 86_400

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs; sizes in bytes, times in seconds."""

        def plain(option: Option) -> dict[str, Any]:
            facts = {"parallel": option.parallel, "recompute": option.recompute, "fits": option.fits}
            times = dataclasses.asdict(option.time) | {"total": option.time.total}
            return facts | {"bytes": option.bytes, "limit": option.limit, "memory": option.memory, "seconds": times}

        return {
            "request": dataclasses.asdict(self.request),
            "parameters": self.parameters,
            "flop_per_image": self.flops,
            "images_per_second": self.images_per_second,
            "mfu": self.mfu,
            "days": self.days,
            "best": plain(self.best),
            "options": [plain(option) for option in self.options],
            "assumptions": dataclasses.asdict(self.assumptions) | {"gpu": dataclasses.asdict(GPUS[self.request.gpu])},
        }


class _Planner:
    """Traces and options of one request."""

    def __init__(self, request: PlanRequest, run: RunConfig, progress: Callable[[str], None]):
        assert request.batch is not None
        model = run.model
        self.request, self.model, self.schedule, self.progress = request, model, run.diffusion.schedule, progress
        self.cluster = Cluster(resolve_gpu(request.gpu), request.gpus, min(request.gpus, request.gpus_per_node))
        self.assumptions, self.sizes = Assumptions(), count(model)
        self.averages, self.clipped = 1 + len(run.train.ema_profiles), run.train.grad_clip > 0
        self._traces: dict[tuple[str, int], Trace] = {}

    def ways(self) -> list[str]:
        if self.request.parallel != "auto":
            return [self.request.parallel]
        if self.request.gpus == 1:
            return ["none"]
        return ["ddp", "fsdp", "hsdp"] if self.cluster.nodes > 1 else ["ddp", "fsdp"]

    def modes(self) -> tuple[str, ...]:
        return RECOMPUTE if self.request.recompute == "auto" else (self.request.recompute,)

    def trace(self, recompute: str, batch: int) -> Trace:
        if (recompute, batch) not in self._traces:
            self.progress(f"forward and backward of {batch} samples without storage, recompute {recompute}")
            self._traces[recompute, batch] = trace(
                self.model,
                batch,
                recompute=recompute,
                precision=self.request.precision,
                arch=self.cluster.gpu.arch,
                schedule=self.schedule,
            )
        return self._traces[recompute, batch]

    def option(self, parallel: str, recompute: str, accumulate: int) -> Option:
        request = self.request
        assert request.batch is not None
        shards = {"fsdp": request.gpus, "hsdp": self.cluster.per_node}.get(parallel, 1)
        traced = self.trace(recompute, request.batch // (request.gpus * accumulate))
        common: dict[str, Any] = dict(
            parallel=parallel,
            shards=shards,
            accumulate=accumulate,
            precision=request.precision,
            averages=self.averages,
            assumptions=self.assumptions,
        )
        # As ``--train.compile auto`` decides.
        copied = parallel in ("none", "ddp")
        whole = request.compile and copied and self.sizes.parameters < BLOCKWISE_PARAMETERS
        data_bytes = resident_bytes(self.model, request.images)
        needed = memory(self.model, self.sizes, traced, gpus=request.gpus, whole=whole, data_bytes=data_bytes, **common)
        time = step_time(traced, self.sizes, self.cluster, compiled=request.compile, clipped=self.clipped, **common)
        return Option(parallel, recompute, needed, int(self.cluster.gpu.memory * GIB), time)

    def nothing_fits(self, options: list[Option]) -> UserError:
        """What would fit instead."""
        request, least = self.request, min(options, key=lambda option: option.bytes)
        assert request.batch is not None
        says = (
            f"--gpu: {request.model} at batch {request.batch:,} on {request.gpus} × {request.gpu} fits in no way that "
            f"was looked at. The least, {least.parallel} with recompute {least.recompute}, takes "
            f"{least.bytes / GIB:.1f} GiB of {least.limit / GIB:.1f}. "
        )
        local = request.batch // request.gpus
        frugal = "none" if request.gpus == 1 else "fsdp"
        for accumulate in (n for n in range(request.accumulate + 1, local + 1) if local % n == 0 and _sparse(n, local)):
            option = self.option(frugal, "block", accumulate)
            if option.fits:
                way = "" if frugal == "none" else f"--parallel {frugal} "
                return UserError(
                    f"{says}{way}--recompute block --accumulate {accumulate} would: {option.bytes / GIB:.1f} GiB."
                )
            least = min(least, option, key=lambda option: option.bytes)
        enough = [name for name, gpu in GPUS.items() if gpu.memory * GIB >= least.bytes]
        if enough:
            return UserError(f"{says}A GPU with more memory would: --gpu {' or '.join(enough)}.")
        return UserError(f"{says}Take more GPUs or a smaller --batch.")


def _sparse(n: int, local: int) -> bool:
    """Whether to try ``n`` micro-batches: powers of two, and one sample at a time."""
    return n & (n - 1) == 0 or n == local


def make_plan(
    request: PlanRequest, model: ModelConfig | None = None, progress: Callable[[str], None] = lambda line: None
) -> Plan:
    """Predict every way of a request.

    Args:
        request: network, batch, GPUs.
        model: the network's hyperparameters where they are not those of ``request.model``.
        progress: called with a line about what is under way.

    Raises:
        UserError: a name that is not known, numbers that do not go together, or a network that fits nowhere; then the
            message says what would.
    """
    request, run = _complete(request, model)
    assert request.batch is not None
    parts = request.gpus * request.accumulate
    if request.batch % parts:
        below = request.batch - request.batch % parts
        raise invalid(
            "--batch",
            request.batch,
            f"a multiple of {parts} = {request.gpus} GPUs × {request.accumulate} parts (--accumulate)",
            f"Take {' or '.join(str(n) for n in (below, below + parts) if n)}.",
        )
    if request.parallel == "none" and request.gpus > 1:
        raise invalid("--parallel", "none", "ddp, fsdp or hsdp with several GPUs")
    if request.parallel not in ("auto", "none") and request.gpus == 1:
        raise invalid("--parallel", request.parallel, "none with one GPU")
    planner = _Planner(request, run, progress)
    options = [
        planner.option(parallel, recompute, request.accumulate)
        for recompute in planner.modes()
        for parallel in planner.ways()
    ]
    fitting = [option for option in options if option.fits]
    if not fitting:
        raise planner.nothing_fits(options)
    best = min(fitting, key=lambda option: option.time.total)
    flops = flops_per_image(run.model)
    peak = planner.cluster.gpu.peak(request.precision != "fp32")
    mfu = model_flops_utilisation(flops, request.batch / best.time.total, peak, request.gpus)
    assert mfu is not None
    return Plan(request, run.model, planner.sizes.parameters, tuple(options), best, flops, mfu, planner.assumptions)


def _complete(request: PlanRequest, model: ModelConfig | None) -> tuple[PlanRequest, RunConfig]:
    """The request with batch and steps of the training preset, and the run: the preset's, or the network's alone."""
    preset = PRESETS[request.model][1] if request.model in PRESETS else None
    if model is None:
        model = preset.model if preset is not None else _network(request.model)
    if preset is None:
        preset = next((run for _, run in PRESETS.values() if run.model == model), None)
    filled = dataclasses.replace(request, gpu=resolve_gpu(request.gpu).name)
    if preset is None:
        if filled.batch is None:
            raise invalid("--batch", None, "samples a step, since no training preset has this network", "Give --batch.")
        return filled, RunConfig(model=model)
    data = preset.data
    known = {
        "batch": preset.train.batch_size,
        "steps": preset.train.steps,
        "images": IMAGES.get(data.path.name if data.path is not None else data.name),
    }
    missing = {name: value for name, value in known.items() if getattr(filled, name) is None}
    return dataclasses.replace(filled, **missing), dataclasses.replace(preset, model=model)


def _network(name: str) -> ModelConfig:
    if name not in list_models():
        raise unknown_name("--model", name, (*list_models(), *PRESETS))
    return model_config(name)

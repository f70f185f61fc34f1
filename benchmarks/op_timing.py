"""How one call is timed and checked: buffers in turn, CUDA graphs, memory, launches, errors against float64."""

import contextlib
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.op_cases import Case
from benchmarks.op_variants import Variant
from benchmarks.screen import quiet
from benchmarks.timing import rotate, stopwatch, synchronize
from scalelong_fast.ops.examples import Example

#: Largest error of a variant, in units of PyTorch's own error in the same dtype.
TOLERATED = 4.0
#: The same for a compiled baseline, whose errors are not ours: Inductor's C++ adds a long column of numbers one after
#: another in fp32, where PyTorch adds pairs. It must compute the same thing, no more.
TOLERATED_OF_BASELINE = 64.0

#: Elements below which a tensor's error says little.
FEW = 256

#: Seconds of a visit, chosen so that reading the clock costs nothing.
VISIT_SECONDS = {"cuda": 5e-3, "cpu": 30e-3}

#: Cache that a set of buffers must not fit into, where the device does not say: a share of a server's last level.
_CPU_CACHE_BYTES = 32 << 20
_MOST_SETS = {"cuda": 16, "cpu": 2}


class WrongResultError(RuntimeError):
    """A variant computes something else than the reference, so that its time would mean nothing."""


# Arguments ------------------------------------------------------------------------------------------------------


def argument_sets(case: Case, device: torch.device) -> list[Example]:
    """Arguments to use in turn, so many that a call never finds its own in the cache (at least two)."""
    first = case.example(device)
    size = sum(tensor.nbytes for tensor in first.tensors())
    cache = _CPU_CACHE_BYTES
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(max(math.ceil(4 * cache / max(size, 1)), 2), _MOST_SETS[device.type])
    return [first, *(_moved(first, shift) for shift in range(1, count))]


def _moved(example: Example, shift: int) -> Example:
    """The same numbers in other places and other memory: as random as the originals, and quickly made."""

    def moved(value: object) -> object:
        if isinstance(value, tuple):  # statistics
            return tuple(map(moved, value))
        if not isinstance(value, Tensor):
            return value
        source = value.detach()
        copy = torch.empty_like(source).copy_(source.roll(shift, 0))  # empty_like keeps channels_last
        return copy.requires_grad_(value.requires_grad)

    return Example(
        tuple(moved(value) for value in example.args), {key: moved(value) for key, value in example.kwargs.items()}
    )


# Calls ----------------------------------------------------------------------------------------------------------


def make_calls(
    case: Case, variant: Variant, examples: Sequence[Example], direction: str
) -> list[Callable[[], tuple[Tensor, ...]]]:
    """One call per set of arguments; to be made inside ``variant.forced()``.

    ``fwd`` keeps what a backward needs, as in training; ``bwd`` differentiates a graph that is kept.
    """
    return [_call(case, variant, example, direction) for example in examples]


def _call(case: Case, variant: Variant, example: Example, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    example = variant.prepared(example)
    inputs = example.tensors()

    def forward() -> tuple[Tensor, ...]:
        return variant(case, example)

    if direction == "fwd":
        return forward
    with variant.forced():
        outputs = forward()
    cotangents = case.cotangents(outputs)
    if direction == "bwd":
        graded = case.grade(outputs)
        return lambda: torch.autograd.grad(graded, inputs, cotangents, retain_graph=True)
    del outputs
    return lambda: torch.autograd.grad(case.grade(forward()), inputs, cotangents)


@contextlib.contextmanager
def kept_graphs() -> Iterator[None]:
    """Compiled functions made inside the block may be differentiated repeatedly, as ``bwd`` does."""
    import torch._functorch.config as config

    before = config.donated_buffer
    config.donated_buffer = False
    try:
        yield
    finally:
        config.donated_buffer = before


# Errors ---------------------------------------------------------------------------------------------------------


class Error(NamedTuple):
    """Relative error ‖out − exact‖ / ‖exact‖ of one tensor, and how many numbers it is the mean of."""

    value: float
    elements: int


@dataclass(frozen=True)
class Accuracy:
    """Errors of a variant against the reference in float64.

    Attributes:
        forward: of each output; backward: of each input's gradient.
    """

    forward: tuple[Error, ...]
    backward: tuple[Error, ...]

    def worst(self, direction: str) -> float:
        """The largest error that matters in a direction; NaN, if there is one."""
        errors = {"fwd": self.forward, "bwd": self.backward}.get(direction, self.forward + self.backward)
        return max((error.value for error in errors), key=lambda value: (math.isnan(value), value))


def exact_results(case: Case, example: Example, cotangents: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the reference in float64 on the same numbers."""

    def double(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(double, value))
        return value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    args = tuple(double(value) for value in example.args)
    # A dtype among the keywords asks for a narrow result.
    kwargs = {
        key: torch.float64 if isinstance(value, torch.dtype) else double(value) for key, value in example.kwargs.items()
    }
    outputs = case.reference()(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(
        case.grade(outputs), Example(args, kwargs).tensors(), [cotangent.double() for cotangent in cotangents]
    )
    return [output.detach() for output in outputs], list(grads)


def _error(actual: Tensor, exact: Tensor) -> Error:
    size = exact.norm().item()
    return Error((actual.double() - exact).norm().item() / (size if size > 0 else 1.0), exact.numel())


def accuracy(
    case: Case,
    variant: Variant,
    example: Example,
    cotangents: Sequence[Tensor],
    exact: tuple[list[Tensor], list[Tensor]],
) -> Accuracy:
    """Errors of one call and its gradients; of a baseline, those of the outputs that it has."""
    example = variant.prepared(example)
    with variant.forced():
        outputs = variant(case, example)
        grads = torch.autograd.grad(case.grade(outputs), example.tensors(), cotangents)
    forward = tuple(_error(o.detach(), e) for o, e in zip(outputs, exact[0], strict=variant.plan is not None))
    return Accuracy(forward, tuple(_error(g, e) for g, e in zip(grads, exact[1], strict=True)))


def check_accuracy(case: Case, name: str, own: Accuracy, eager: Accuracy) -> None:
    """Compare with the errors of the definition in PyTorch in the same dtype.

    The yardstick of a tensor is PyTorch's error in it. A tensor of a few numbers (the bias of a gate's one hidden
    unit) may come out right by chance, so for those it is PyTorch's largest error in the same pass.

    Raises:
        WrongResultError: an error is more than :data:`TOLERATED` (a baseline's: :data:`TOLERATED_OF_BASELINE`) times
            PyTorch's, or not a number.
    """
    tolerated = TOLERATED_OF_BASELINE if name in ("eager", "compile") else TOLERATED
    ulp = torch.finfo(case.dtype).eps / 2  # where PyTorch happens to be exact
    for kind in ("forward", "backward"):
        largest = max(error.value for error in getattr(eager, kind))
        for index, (error, pytorch) in enumerate(
            zip(getattr(own, kind), getattr(eager, kind), strict=kind == "backward")
        ):
            yardstick = max(pytorch.value if pytorch.elements >= FEW else largest, ulp)
            if not error.value <= tolerated * yardstick:
                what = "output" if kind == "forward" else "gradient"
                raise WrongResultError(
                    f"{case}: {name}: {what} {index} is off by {error.value:.3g} (relative, against float64); "
                    f"PyTorch's own error is {yardstick:.3g}, and {tolerated:g} times that is tolerated."
                )


# Memory and launches --------------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that PyTorch held during a call, above what it held before; results included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    from torch.profiler import ProfilerActivity, profile

    with (
        quiet(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler,
    ):
        result = call()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def count_launches(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, int | None]:
    """Kernels, copies and fills that each call puts on a GPU; None on a CPU."""
    if device.type != "cuda":
        return dict.fromkeys(calls)
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, record_function

    with (
        quiet(),
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=False) as profiler,
    ):
        for name, call in calls.items():
            torch.cuda.synchronize(device)
            with record_function(f"call:{name}"):
                result = call()
                torch.cuda.synchronize(device)
            del result
    events = profiler.events()
    on_gpu = [
        event.time_range.start
        for event in events
        # The GPU's own track repeats the annotation of record_function.
        if event.device_type == DeviceType.CUDA and not event.name.startswith("call:")
    ]
    counts: dict[str, int | None] = {}
    for name in calls:
        span = next(
            event.time_range for event in events if event.name == f"call:{name}" and event.device_type == DeviceType.CPU
        )
        counts[name] = sum(span.start <= start <= span.end for start in on_gpu)
    return counts


def host_seconds(call: Callable[[], object], device: torch.device, samples: int = 30) -> float:
    """Median seconds of the host for a call, the device idle before it and not waited for."""
    times = []
    for _ in range(samples + 3):
        synchronize(device)
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        del result
    return statistics.median(times[3:])


# Times ----------------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """A visit: something untimed, since another variant has emptied the caches, then ``repeats`` timed rounds over the
    calls; returns seconds of a call.

    Attributes:
        play: makes every call once, one set of arguments after the other.
        warm: the untimed part.
        calls: how many calls ``play`` makes.
        timer: ``cuda_graph``, ``events`` or ``host``.
        held: what a CUDA graph reads and nothing else would keep: kept graphs of autograd, output gradients.
    """

    play: Callable[[], object]
    warm: Callable[[], object]
    calls: int
    variant: Variant
    device: torch.device
    timer: str
    held: object = None
    repeats: int = 1

    def __call__(self) -> float:
        with self.variant.forced():
            self.warm()
            elapsed = stopwatch(self.device)(self._several)
        return elapsed / (self.repeats * self.calls)

    def _several(self) -> None:
        for _ in range(self.repeats):
            self.play()

    def calibrate(self, seconds: float) -> None:
        """Choose ``repeats`` so that the timed part lasts about ``seconds``."""
        self()  # the first may be slow
        once = max(self() * self.calls, 1e-7)
        self.repeats = min(max(round(seconds / once), 1), 1000)


@contextlib.contextmanager
def working_stream(device: torch.device) -> Iterator[None]:
    """Inside the block work goes to one stream of its own.

    A graph is captured on a stream other than the default one, and a backward runs where its forward ran: all must
    happen on the same.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


@functools.cache
def _stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def make_visit(
    case: Case, variant: Variant, examples: Sequence[Example], direction: str, device: torch.device
) -> Visit:
    """Prepare the timing of a variant, inside :func:`working_stream`.

    On a GPU it is a CUDA graph of all the calls, or, where that cannot be captured, the calls themselves.
    """
    calls = make_calls(case, variant, examples, direction)

    def play() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return Visit(play, calls[-1], len(calls), variant, device, "host")
    try:
        replay = _captured(calls, variant)
        return Visit(replay, replay, len(calls), variant, device, "cuda_graph", held=calls)
    except RuntimeError:
        torch.cuda.synchronize(device)
        return Visit(play, play, len(calls), variant, device, "events")


def _captured(calls: Sequence[Callable[[], object]], variant: Variant) -> Callable[[], object]:
    with variant.forced():
        for _ in range(2):  # compiles, tunes and allocates what must not be captured
            for call in calls:
                call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            # Held until the end, so that no call writes where another has just written.
            results = [call() for call in calls]
        del results
    return graph.replay


def settle(visits: Mapping[str, Visit], seconds: float) -> None:
    """Visit everything until times stop falling, as clocks rise."""
    end = time.perf_counter() + seconds
    before = math.inf
    while True:
        total = sum(visit() for visit in visits.values())
        if total > 0.98 * before or time.perf_counter() > end:
            return
        before = total


def time_visits(
    visits: Mapping[str, Visit], *, rounds: int, device: torch.device, visit_seconds: float | None = None
) -> dict[str, list[float]]:
    """Seconds of a call by variant, a number for each round, the variants interleaved."""
    for visit in visits.values():
        visit.calibrate(VISIT_SECONDS[device.type] if visit_seconds is None else visit_seconds)
    if device.type == "cuda":
        settle(visits, seconds=1.0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        return rotate(visits, rounds=rounds)
    finally:
        if collecting:
            gc.enable()

"""``scalelong-fast plan``."""

import dataclasses
import json
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from scalelong_fast.cli.parse import parse
from scalelong_fast.planning import Plan, PlanRequest, make_plan, resolve_gpu

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class PlanArguments(PlanRequest):
    """Predict what a run needs on GPUs that need not be here: memory, time, and how best to share the work.

    Memory is that of the real network, run on tensors without storage; time that of its operators by their products and
    bytes, and of the exchange between GPUs. Nothing is computed and no GPU is asked.
    """

    json: bool = False
    """Everything as JSON."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if args and not args[0].startswith("-"):  # the network in its natural place, as other commands have it
        args = ["--model", *args]
    arguments = parse(PlanArguments, args, "scalelong-fast plan")
    request = PlanRequest(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(PlanRequest)})
    console = Console(stderr=True)
    with console.status("counting") as status:
        plan = make_plan(request, progress=lambda line: status.update(line))
    if arguments.json:
        print(json.dumps(plan.as_json(), indent=2, ensure_ascii=False))
    else:
        show(plan, Console())
    return 0


def show(plan: Plan, console: Console) -> None:
    """Print a plan: every way, the best one's memory and time, the assumptions."""
    console.width = max(console.width, 100)
    request, gpu, best = plan.request, resolve_gpu(plan.request.gpu), plan.best
    assert request.batch is not None
    local = request.batch // (request.gpus * request.accumulate)
    parts = f", {request.accumulate} parts of {local}" if request.accumulate > 1 else ""
    console.print(
        f"{request.model}: {plan.parameters / 1e6:.1f}M parameters, {plan.flops / 1e9:.1f} GFLOP an image (forward and "
        f"backward); batch {request.batch:,} on {request.gpus} × {gpu.title}, "
        f"{request.batch // request.gpus} a GPU{parts}, {request.precision}, "
        f"{'compiled' if request.compile else 'eager'}",
        highlight=False,
    )
    console.print(_options(plan))
    days = "" if plan.days is None else f", {_duration(plan.days)} for {request.steps:,} steps"
    console.print(
        f"Fastest that fits: {_way(best)}: {best.time.total * 1e3:.1f} ms a step, {plan.images_per_second:,.0f} "
        f"images/s, MFU {plan.mfu:.0%}{days}.",
        highlight=False,
    )
    console.print(_memory(plan))
    console.print(_time(plan))
    console.print(_assumptions(plan))


def _way(option) -> str:
    parallel = "one GPU" if option.parallel == "none" else f"--train.parallel {option.parallel}"
    return parallel if option.recompute == "none" else f"{parallel} --train.recompute {option.recompute}"


def _options(plan: Plan) -> Table:
    table = Table("parallel", "recompute", box=box.SIMPLE)
    for title in ("GiB a GPU", "of", "fits", "ms a step", "images/s", "exchange ms"):
        table.add_column(title, justify="right")
    assert plan.request.batch is not None
    for option in sorted(plan.options, key=lambda option: (not option.fits, option.time.total)):
        time = option.time
        table.add_row(
            option.parallel,
            option.recompute,
            f"{option.bytes / GIB:.1f}",
            f"{option.limit / GIB:.1f}",
            "yes" if option.fits else "no",
            f"{time.total * 1e3:.1f}",
            f"{plan.request.batch / time.total:,.0f}",
            f"{time.exchange * 1e3:.1f} (+ {time.hidden_exchange * 1e3:.1f} hidden)",
            style=None if option.fits else "dim",
        )
    return table


def _memory(plan: Plan) -> Table:
    table = Table("memory of a GPU", box=box.SIMPLE)
    table.add_column("GiB", justify="right")
    for name, size in plan.best.memory.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("together", f"{plan.best.bytes / GIB:.2f}", style="bold")
    return table


def _time(plan: Plan) -> Table:
    table = Table("a step", box=box.SIMPLE)
    table.add_column("ms", justify="right")
    time = plan.best.time
    for name, seconds in (
        ("forward", time.forward),
        ("backward", time.backward),
        ("AdamW, clipping, averages", time.update),
        ("exchange that nothing hides", time.exchange),
    ):
        table.add_row(name, f"{seconds * 1e3:.2f}")
    table.add_row("together", f"{time.total * 1e3:.2f}", style="bold")
    return table


def _assumptions(plan: Plan) -> Table:
    gpu = resolve_gpu(plan.request.gpu)
    table = Table("assumption", "value", "source", box=box.SIMPLE)
    narrow = plan.request.precision != "fp32"
    table.add_row("peak of products", f"{gpu.peak(narrow) / 1e12:,.0f} TFLOP/s, dense", "NVIDIA's data sheet")
    table.add_row("memory, link, network", _figures(gpu), gpu.source)
    for row in plan.assumptions.describe():
        table.add_row(*row)
    return table


def _figures(gpu) -> str:
    return f"{gpu.memory:g} GiB at {gpu.bandwidth:,.0f} GB/s, {gpu.link:g} GB/s, {gpu.network:g} GB/s a GPU"


def _duration(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"

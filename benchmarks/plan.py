"""``python -m benchmarks plan``: the planner's peak memory and time against those of real passes."""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks import environment
from benchmarks.timing import stopwatch
from scalelong_fast.diffusion import create_schedule
from scalelong_fast.errors import UserError
from scalelong_fast.models import ModelConfig, UNetConfig, UViTConfig, build_model, model_config
from scalelong_fast.ops.problem import architecture
from scalelong_fast.planning.assumptions import Assumptions
from scalelong_fast.planning.gpus import GPU, GPUS
from scalelong_fast.planning.request import RECOMPUTE
from scalelong_fast.planning.timing import work_seconds
from scalelong_fast.planning.tracing import example_batch, trace
from scalelong_fast.training.checkpoint import write_json
from scalelong_fast.training.objective import DenoisingObjective
from scalelong_fast.training.recompute import set_recomputation

SOURCES = (
    "benchmarks/plan.py",
    "scalelong_fast/planning/assumptions.py",
    "scalelong_fast/planning/timing.py",
    "scalelong_fast/planning/tracing.py",
)

MIB = 1 << 20

#: Networks and samples, on a GPU those of the big presets.
ON_GPU: dict[str, tuple[ModelConfig, int]] = {
    "uvit_m4": (model_config("uvit_m4"), 128),
    "uvit_l4": (model_config("uvit_l4"), 128),
    "unet_imagenet64": (model_config("unet_imagenet64"), 64),
    "uvit_t2i_s2": (model_config("uvit_t2i_s2"), 128),
}
ON_CPU: dict[str, tuple[ModelConfig, int]] = {
    "uvit_small": (UViTConfig(img_size=32, embed_dim=128, depth=4, num_heads=4, num_classes=10), 16),
    "unet_small": (
        UNetConfig(
            img_size=32,
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(16,),
            num_heads=2,
            num_groups=8,
        ),
        16,
    ),
}


class Passes:
    """Forward and backward of a real network on random numbers; ``()`` runs them once."""

    def __init__(
        self, config: ModelConfig, batch: int, recompute: str, autocast: torch.dtype | None, device: torch.device
    ):
        torch.manual_seed(0)
        self.model = build_model(config).to(device)
        set_recomputation(self.model, recompute)
        self.objective = DenoisingObjective(self.model, create_schedule("vpsde").to(device), autocast)
        x0, noise, u, y = example_batch(config, batch)
        x0.normal_(), noise.normal_(), u.uniform_()
        if y is not None:
            y.zero_()
        self.batch = [None if tensor is None else tensor.to(device) for tensor in (x0, noise, u, y)]

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.objective(*self.batch).backward()


def measured_peak(passes: Passes, device: torch.device) -> int:
    """Most bytes that forward and backward had allocated at once, parameters and input not counted."""
    passes()  # what is made once and kept, is made
    passes.model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        passes()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        passes()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def known_gpu(device: torch.device) -> GPU | None:
    """The planner's entry for a device, or None."""
    if device.type != "cuda":
        return None
    name = environment.slug(torch.cuda.get_device_name(device))
    return next((gpu for gpu in GPUS.values() if environment.slug(gpu.title) == name), None)


def compare(
    label: str, config: ModelConfig, batch: int, recompute: str, precision: str, device: torch.device, rounds: int = 10
) -> dict[str, Any]:
    """Predicted and measured peak, and on a GPU that the planner knows the time, of one network."""
    arch = "cpu" if device.type == "cpu" else architecture(device)
    predicted = trace(config, batch, recompute=recompute, precision=precision, arch=arch)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    passes = Passes(config, batch, recompute, autocast, device)
    peak, gpu = measured_peak(passes, device), known_gpu(device)
    record: dict[str, Any] = {
        "model": label,
        "shape": [batch, config.in_chans, config.img_size, config.img_size],
        "dtype": precision,
        "direction": "fwd_bwd",
        "variant": recompute,
        "predicted_mib": round(predicted.peak / MIB, 2),
        "peak_mib": round(peak / MIB, 2),
        "ratio": round(predicted.peak / peak, 4),
    }
    if gpu is not None:
        watch = stopwatch(device)
        seconds = statistics.median(watch(passes) for _ in range(rounds))
        model = work_seconds(list(predicted.work), gpu, compiled=False, assumptions=Assumptions())
        record |= {"predicted_us": round(model * 1e6, 1), "median_us": round(seconds * 1e6, 1)}
    return record | {"sources": list(SOURCES), "source_sha256": environment.source_hash(SOURCES)}


def as_table(records: Sequence[dict[str, Any]]) -> Table:
    """A line per record."""
    table = Table("network", "batch", "dtype", "recompute")
    for title in ("predicted MiB", "measured", "ratio", "predicted ms", "measured"):
        table.add_column(title, justify="right")
    for record in records:
        times = ["–", "–"]
        if "median_us" in record:
            times = [f"{record[key] / 1e3:.1f}" for key in ("predicted_us", "median_us")]
        sizes = [f"{record[key]:,.1f}" for key in ("predicted_mib", "peak_mib")]
        batch = str(record["shape"][0])
        table.add_row(
            record["model"], batch, record["dtype"], record["variant"], *sizes, f"{record['ratio']:.3f}", *times
        )
    return table


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="may be repeated; default: all of the device's")
    parser.add_argument("--recompute", action="append", choices=RECOMPUTE, help="may be repeated; default: all")
    parser.add_argument("--precision", action="append", choices=("bf16", "fp32"), help="default: bf16, on a CPU both")
    parser.add_argument("--batch", type=int, help="samples; default: the network's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<machine>/plan.json")
    options = parser.parse_args(args)
    device = torch.device(options.device)
    known = ON_CPU if device.type == "cpu" else ON_GPU
    for name in options.model or ():
        if name not in known:
            raise UserError(f"--model: got {name!r}, expected one of {', '.join(known)} on {device.type}.")
    records = []
    console = Console(width=120)
    for name in options.model or known:
        config, batch = known[name]
        for precision in options.precision or (("fp32", "bf16") if device.type == "cpu" else ("bf16",)):
            for recompute in options.recompute or RECOMPUTE:
                record = compare(name, config, options.batch or batch, recompute, precision, device)
                records.append(record)
                console.print(json.dumps({k: v for k, v in record.items() if k != "sources"}), highlight=False)
    console.print(as_table(records))
    where = environment.describe(device)
    out = options.out or environment.RESULTS / where["machine"] / "plan.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    assumptions = dataclasses.asdict(Assumptions())
    write_json(out, {"environment": where, "assumptions": assumptions, "records": records})
    return 0

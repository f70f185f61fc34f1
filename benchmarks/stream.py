"""``python -m benchmarks stream``: does a bf16 residual stream cost quality? Trained on digits, several seeds each."""

import argparse
import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import environment
from benchmarks.command import add_device, add_out
from benchmarks.report import stream_summary
from scalelong_fast.data import ImageDataset, load_images, to_unit_range
from scalelong_fast.diffusion import NoiseSchedule, create_schedule, diffusion_loss, stratified_uniform
from scalelong_fast.errors import check_range
from scalelong_fast.models import UViT
from scalelong_fast.training.batches import BatchSource
from scalelong_fast.training.checkpoint import write_json
from scalelong_fast.training.config import RunConfig
from scalelong_fast.training.hardware import resolve_execution
from scalelong_fast.training.presets import get_preset
from scalelong_fast.training.progress import TrainingProgress
from scalelong_fast.training.step import TrainStep

PRESET = "digits-uvit"
DTYPES = ("fp32", "bf16")

#: Times and noises at which each image is looked at in the evaluation.
EVALUATION_PASSES = 8
EVALUATION_SEED = 20_231

SOURCES = (
    "benchmarks/stream.py",
    "scalelong_fast/diffusion/loss.py",
    "scalelong_fast/diffusion/schedule.py",
    "scalelong_fast/models/attention.py",
    "scalelong_fast/models/cpu_attention.py",
    "scalelong_fast/models/cpu_linear.py",
    "scalelong_fast/models/layers.py",
    "scalelong_fast/models/uvit.py",
    "scalelong_fast/scaling/base.py",
    "scalelong_fast/scaling/gates.py",
    "scalelong_fast/scaling/learnable.py",
    "scalelong_fast/training/ema.py",
    "scalelong_fast/training/optim.py",
    "scalelong_fast/training/presets/digits.py",
    "scalelong_fast/training/batches.py",
    "scalelong_fast/training/objective.py",
    "scalelong_fast/training/step.py",
)
#: Of the sources as they are imported: a file edited while a run goes on is not what it trains.
SOURCE_HASH = environment.source_hash(SOURCES)


def run_config(residual_dtype: str, seed: int, steps: int, device: str = "auto") -> RunConfig:
    """The preset, shortened: bf16 autocast, and a learning rate that has decayed to zero after ``steps``."""
    preset = get_preset(PRESET)
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, residual_dtype=residual_dtype),
        train=dataclasses.replace(
            preset.train,
            seed=seed,
            steps=steps,
            warmup_steps=min(preset.train.warmup_steps, steps // 10),
            decay_steps=steps,
            precision="bf16",
            device=device,
        ),
    )


@torch.no_grad()
def evaluation_loss(
    model: nn.Module, schedule: NoiseSchedule, dataset: ImageDataset, passes: int = EVALUATION_PASSES
) -> float:
    """Loss over every image with its own label, at ``passes`` fixed times and noises each, in float32.

    The times of a pass are stratified over the images, so that each pass covers [0, 1) evenly.

    Args:
        model: on ``schedule``'s device, in evaluation mode.
        schedule: the noise process.
        dataset: images and labels, on any device.
        passes: draws for each image.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(EVALUATION_SEED)  # on the CPU: the same draws on every device
    x0 = to_unit_range(dataset.images).to(device)
    labels = None if dataset.labels is None else dataset.labels.to(device)
    losses: list[Tensor] = []
    for _ in range(passes):
        u = stratified_uniform(len(dataset), generator=generator).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        losses.append(diffusion_loss(model, schedule, x0, noise, u, labels).double())
    return float(torch.stack(losses).mean())


def train(config: RunConfig, dataset: ImageDataset, console: Console) -> float:
    """Train from scratch without a run folder; returns the :func:`evaluation_loss` of the averaged weights."""
    execution = resolve_execution(config.train)
    diffusion = config.diffusion
    schedule = create_schedule(diffusion.schedule, beta_min=diffusion.beta_min, beta_max=diffusion.beta_max)
    schedule = schedule.to(execution.device)
    if execution.compiled:
        torch.compiler.reset()  # the runs share code: each would otherwise count towards the limit of recompilations
    torch.manual_seed(config.train.seed)
    model = UViT(config.model).to(execution.device)
    averaged = copy.deepcopy(model).eval()
    step = TrainStep(model, schedule, config, execution)
    batches = BatchSource(dataset, config, execution.device)
    with TrainingProgress(console, 0, config.train.steps) as progress:
        for index in range(config.train.steps):
            step(index, batches(index))
            progress.advance()
    return evaluation_loss(step.ema.copy_to(averaged), schedule, dataset)


def _resume(path: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of an earlier call with the same settings, machine, versions and sources; else none."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        same = old["settings"] == head["settings"] and _undated(old["environment"]) == _undated(head["environment"])
        return [record for record in old["records"] if record["source_sha256"] == SOURCE_HASH] if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []  # missing or of another shape: it is written anew


def _undated(where: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in where.items() if key != "date"}


def compare(*, seeds: int, steps: int, device: str, out: Path | None, console: Console) -> dict[str, Any]:
    """Train every dtype with every seed, writing the result file after each run.

    Args:
        seeds: runs of each dtype.
        steps: training steps of a run.
        device: as in ``train.device``.
        out: result file, or None for the machine's own.
        console: where progress goes.

    Returns:
        What was written: environment, settings, ceilings, and a record for each run.
    """
    check_range("--seeds", seeds, low=1, integer=True)
    check_range("--steps", steps, low=1, integer=True)
    dataset = load_images("digits")
    execution = resolve_execution(run_config("fp32", 0, steps, device).train)
    where = environment.describe(execution.device)
    path = out or environment.RESULTS / where["machine"] / "residual_dtype.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"preset": PRESET, "steps": steps, "autocast": "bf16", "compiled": execution.compiled}
    settings["evaluation_passes"] = EVALUATION_PASSES
    result: dict[str, Any] = {"environment": where, "settings": settings}
    records = _resume(path, result)
    result["ceilings"] = environment.ceilings(execution.device)
    result["records"] = records
    done = {(record["seed"], record["dtype"]) for record in records}
    for seed in range(seeds):
        for dtype in DTYPES:  # both dtypes of a seed first, so that an interrupted comparison is balanced
            if (seed, dtype) in done:
                console.print(f"seed {seed}, {dtype} residual stream: done before", highlight=False)
                continue
            console.print(f"seed {seed}, {dtype} residual stream: {steps} steps", highlight=False)
            config = run_config(dtype, seed, steps, device)
            loss = train(config, dataset, console)
            records.append(_record(config, loss))
            write_json(path, result)
    console.print(f"Written to {path}.", soft_wrap=True, markup=False, highlight=False)
    return result


def _record(config: RunConfig, loss: float) -> dict[str, Any]:
    model = config.model
    return {
        "model": PRESET,
        "shape": [config.train.batch_size, model.in_chans, model.img_size, model.img_size],
        "dtype": model.residual_dtype,
        "direction": "train",
        "variant": f"residual_{model.residual_dtype}",
        "seed": config.train.seed,
        "steps": config.train.steps,
        "loss": loss,
        "sources": list(SOURCES),
        "source_sha256": SOURCE_HASH,
    }


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks stream",
        description="Train digits-uvit under bf16 autocast with an fp32 and with a bf16 residual stream, and compare "
        "the loss of the averaged weights. The result is written after every run; the same command goes on from there.",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each dtype (default: 3)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of a run (default: 2000)")
    add_device(parser)
    add_out(parser, "residual_dtype")
    options = parser.parse_args(args)
    console = Console()
    result = compare(seeds=options.seeds, steps=options.steps, device=options.device, out=options.out, console=console)
    table = Table("residual stream", "seeds", "loss, mean ± sd", "minus fp32, mean ± sd")
    for row in stream_summary(result["records"]):
        table.add_row(*row)
    console.print(table)
    return 0

"""What reading the data costs a training step: a packed set of 64×64 images, alone and beside steps of 5,000 images/s.

The step is played: on a GPU the host spends it waiting or queueing work. So one variant of it sleeps, and the
interpreter is free for the reading thread; the other runs Python all the time and lets go of the interpreter between
short pieces, as a host does that queues one operation of PyTorch after the other. The set is written before it is read,
so it lies in the operating system's cache, as one that fits into memory does from the second epoch on.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import environment
from benchmarks.command import add_device, add_out, device_of, finish, result_path
from benchmarks.report_loader import loader_table
from benchmarks.screen import Screen
from benchmarks.timing import check_seconds, rotate, synchronize
from scalelong_fast.data import ShuffledOrder
from scalelong_fast.data.packed import Field, PackedSet, PackedWriter, Plan
from scalelong_fast.data.prefetch import Prefetcher
from scalelong_fast.errors import check_range
from scalelong_fast.training.checkpoint import write_json

SOURCES = (
    "benchmarks/loader.py",
    "scalelong_fast/data/order.py",
    "scalelong_fast/data/packed/readahead.py",
    "scalelong_fast/data/packed/reader.py",
    "scalelong_fast/data/prefetch.py",
    "scalelong_fast/data/training_set.py",
)

SIDE = 64

#: Batches read ahead, by the name of the variant.
VARIANTS = {"no prefetch": 0, "prefetch": 2}


def write_set(folder: Path, images: int, shard_size: int = 5000) -> PackedSet:
    """A packed set of random labelled images ``(3, 64, 64)``."""
    generator = np.random.default_rng(0)
    fields = {"images": Field("uint8", (3, SIDE, SIDE)), "labels": Field("int64", ())}
    names = tuple(map(str, range(1000)))
    with PackedWriter(folder, Plan("noise", images, shard_size, fields, names, 1.0, {}, {})) as writer:
        for index in list(writer.todo):
            count = len(writer.plan.samples(index))
            pixels = generator.integers(0, 256, (count, 3, SIDE, SIDE), dtype=np.uint8)
            writer.write_shard(index, {"images": pixels, "labels": generator.integers(0, 1000, count)})
        writer.finish()
    return PackedSet(folder)


def idle(seconds: float) -> None:
    """A step whose host waits for the device: the interpreter is free."""
    time.sleep(seconds)


def busy(seconds: float) -> None:
    """A step whose host queues operations until its end: 0.1 ms of Python, then as little without the interpreter."""
    end = time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        while time.perf_counter() < now + 1e-4:
            pass
        time.sleep(1e-5)


class Visit:
    """A number of steps with batches of one variant.

    Args:
        dataset: where samples come from.
        device: where batches go.
        depth: batches read ahead.
        batch_size: samples of a batch.
        steps: steps of a visit.
        seconds: length of a step without reading.
        play: the step: :func:`idle` or :func:`busy`; None: batches are asked for as fast as they come.
    """

    def __init__(
        self,
        dataset: PackedSet,
        device: torch.device,
        depth: int,
        batch_size: int,
        steps: int,
        seconds: float = 0.0,
        play: Callable[[float], None] | None = None,
    ):
        order = ShuffledOrder(len(dataset), batch_size, seed=0)
        self.fetch = Prefetcher(lambda step: dataset.fetch(order.batch_indices(step)), device, depth)
        self.device, self.steps, self.seconds, self.play = device, steps, seconds, play
        self.step = 0
        self.waits: list[float] = []

    def __call__(self) -> float:
        """Seconds of a step, on average; a first one is not timed."""
        self._take(time.perf_counter)
        synchronize(self.device)
        begin = time.perf_counter()
        for _ in range(self.steps):
            self.waits.append(self._take(time.perf_counter))
        synchronize(self.device)
        return (time.perf_counter() - begin) / self.steps

    def _take(self, clock: Callable[[], float]) -> float:
        """One step; returns the seconds that its batch was waited for."""
        begin = clock()
        self.fetch(self.step)
        waited = clock() - begin
        self.step += 1
        if self.play is not None:
            self.play(self.seconds)
        return waited


def measure(
    dataset: PackedSet,
    device: torch.device,
    *,
    batch_size: int,
    rate: float,
    rounds: int,
    steps: int,
    deadline: float = math.inf,
) -> list[dict[str, Any]]:
    """A record for each variant; see :func:`main` for the arguments, ``deadline`` as for :func:`~.timing.rotate`."""
    seconds = batch_size / rate
    visits: dict[str, Visit] = {}
    for variant, depth in VARIANTS.items():
        for kind, play in (("alone", None), ("idle", idle), ("busy", busy)):
            visits[f"{variant}/{kind}"] = Visit(dataset, device, depth, batch_size, steps, seconds, play)
    times = rotate(dict(visits), rounds=rounds, deadline=deadline)
    records = []
    for variant in VARIANTS:
        alone = statistics.median(times[f"{variant}/alone"])
        record: dict[str, Any] = {
            "model": f"packed {SIDE}×{SIDE} images",
            "shape": [batch_size, 3, SIDE, SIDE],
            "dtype": "uint8",
            "direction": "load",
            "variant": variant,
            "batches_ahead": VARIANTS[variant],
            "rounds": len(times[f"{variant}/alone"]),
            "images_per_second": round(batch_size / alone, 1),
            "step_us": round(1e6 * seconds, 1),
        }
        for kind in ("idle", "busy"):
            waits = visits[f"{variant}/{kind}"].waits
            record[f"wait_us_{kind}"] = round(1e6 * statistics.fmean(waits), 2)
            record[f"overhead_{kind}"] = round(statistics.fmean(waits) / seconds, 6)
        records.append({**record, "sources": list(SOURCES), "source_sha256": environment.source_hash(SOURCES)})
    for visit in visits.values():
        visit.fetch.close()
    return records


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks loader",
        description="Images/s that the loader of packed sets gives, and what share of a training step is spent waiting "
        "for it. The images are made up, in a temporary folder.",
    )
    parser.add_argument("--images", type=int, default=20_000, help="images of the set (default: 20000, 246 MB)")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a step (default: 128)")
    parser.add_argument("--rate", type=float, default=5000, help="images/s of the played step (default: 5000)")
    parser.add_argument("--rounds", type=int, default=7, help="visits of each variant (default: 7)")
    parser.add_argument("--steps", type=int, default=60, help="steps of a visit (default: 60)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after about this time, with fewer rounds")
    add_device(parser)
    parser.add_argument("--folder", type=Path, help="where to put the temporary set (default: the system's place)")
    add_out(parser, "loader")
    options = parser.parse_args(args)
    for name in ("images", "batch_size", "rounds", "steps"):
        check_range(f"--{name.replace('_', '-')}", getattr(options, name), low=1, integer=True)
    check_range("--rate", options.rate, low=0, low_open=True)
    check_seconds(options.seconds)
    deadline = time.perf_counter() + options.seconds
    device = device_of(options)
    where = environment.describe(device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        dataset = write_set(Path(folder) / "set", options.images)
        dataset.fetch(torch.arange(options.images))  # every page once
        records = measure(
            dataset,
            device,
            batch_size=options.batch_size,
            rate=options.rate,
            rounds=options.rounds,
            steps=options.steps,
            deadline=deadline,
        )
        del dataset
    settings = {"images": options.images, "rate": options.rate, "rounds": options.rounds, "steps": options.steps}
    result = {
        "environment": where,
        "settings": settings,
        "ceilings": environment.ceilings(device),
        "records": records,
    }
    path = result_path(options, where, "loader")
    write_json(path, result)
    screen = Screen(width=120)
    screen.print("\n".join(loader_table(result, environment.ROOT)))
    return finish(screen, [], path)

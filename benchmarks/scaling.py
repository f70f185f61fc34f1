"""``python -m benchmarks scaling``: one process with all threads against several processes with a part of them each.

On a CPU the processes have no more hardware than the one: what is measured is what sharing a step costs.
"""

import argparse
import dataclasses
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from benchmarks import environment
from benchmarks.command import add_out, finish, result_path
from benchmarks.report_scaling import scaling_table
from benchmarks.screen import Screen
from benchmarks.timing import rotate, round_speed_up, speed_up, summarize
from benchmarks.variants import COMMON_SOURCES, MODEL
from scalelong_fast.errors import UserError, check_range
from scalelong_fast.models import UViTConfig, model_config
from scalelong_fast.training.config import DataConfig, RunConfig, SampleConfig, TrainConfig
from scalelong_fast.training.files import write_json

SOURCES = (
    *COMMON_SOURCES,
    "benchmarks/scaling.py",
    "scalelong_fast/training/parallel.py",
    "scalelong_fast/training/ranks.py",
    "scalelong_fast/training/stop.py",
    "scalelong_fast/training/watch.py",
)

#: Models by label, with the batch of all processes together.
MODELS: dict[str, tuple[UViTConfig, int]] = {
    "digits U-ViT": (model_config("uvit_digits"), 64),
    "U-ViT/2, D 256, depth 6": (dataclasses.replace(MODEL, img_size=32), 32),
}

#: Ways to share a step, by name: the process group's, or None for one process.
KINDS = {"one process": None, "DDP": "ddp", "FSDP": "fsdp"}

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Team:
    """Processes that take steps together.

    Attributes:
        config: the run.
        world: number of processes.
        threads: of each.
    """

    config: RunConfig
    world: int
    threads: int


class Workers:
    """Context manager: the processes of a team, told over pipes to take steps."""

    def __init__(self, team: Team):
        self.team = team

    def __enter__(self) -> "Workers":
        team, context = self.team, multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(team.threads)
        self.pipes, self.processes = [], []
        try:
            for rank in range(team.world):
                mine, theirs = context.Pipe()
                process = context.Process(target=work, args=(team, rank, port, theirs), daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(mine)
                self.processes.append(process)
        finally:
            os.environ.pop("OMP_NUM_THREADS")
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
        self._hear()
        return self

    def take(self, steps: int) -> float:
        """Let all take ``steps`` steps; returns the seconds a step, from the first word to the last answer."""
        start = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(steps)
        self.losses = self._hear()
        return (time.perf_counter() - start) / steps

    def _hear(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError as error:
            raise UserError("scaling: a process of the benchmark died; its message is above.") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self.pipes:  # all are told before one is waited for: they take leave of each other
            with suppress(OSError):
                pipe.send(0)
        for process in self.processes:
            process.join(timeout=30)
            process.kill()


def work(team: Team, rank: int, port: int, pipe: Connection) -> None:
    """A process of a team: says that it is ready, takes steps when told how many, ends at 0."""
    from scalelong_fast.data import open_training_set
    from scalelong_fast.diffusion import create_schedule
    from scalelong_fast.models import build_model
    from scalelong_fast.training.batches import BatchSource
    from scalelong_fast.training.hardware import resolve_execution
    from scalelong_fast.training.ranks import connect
    from scalelong_fast.training.step import TrainStep
    from scalelong_fast.training.stop import StopVote

    torch.set_num_threads(team.threads)
    if team.world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(team.world), LOCAL_RANK=str(rank))
        os.environ.update(LOCAL_WORLD_SIZE=str(team.world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    config = team.config
    with connect(config.train) as ranks:
        torch.manual_seed(0)
        model = build_model(config.model)
        step_fn = TrainStep(model, create_schedule("vpsde"), config, resolve_execution(config.train), ranks)
        batches = BatchSource(open_training_set(config.data, config.model), config, torch.device("cpu"), ranks)
        vote, step = StopVote([], ranks), 0
        steps = WARM_UP_STEPS
        while steps:
            for _ in range(steps):
                ranks.beat(step)
                loss = step_fn(step, batches(step))
                vote()
                step += 1
            pipe.send(float(loss))
            with ranks.busy():  # the others' turn may take long
                steps = pipe.recv()
        vote.close()


def team_of(model: UViTConfig, batch_size: int, kind: str, world: int, threads: int) -> Team:
    """The team that shares a step in one of the ways of :data:`KINDS`, with ``threads`` threads in all."""
    parallel = KINDS[kind]
    digits = model.img_size == 8
    model = dataclasses.replace(model, num_classes=10 if digits else -1)
    train = TrainConfig(
        batch_size=batch_size,
        parallel=parallel or "auto",
        device="cpu",
        precision="fp32",
        compile="off",
        timeout=3600.0,
    )
    data = DataConfig(name="digits") if digits else DataConfig(name="synthetic", size=2048)
    config = RunConfig(model=model, data=data, train=train, sample=SampleConfig())
    return Team(config, world if parallel else 1, threads // world if parallel else threads)


def measure(
    label: str,
    model: UViTConfig,
    batch_size: int,
    *,
    world: int,
    threads: int,
    rounds: int,
    steps: int,
    kinds: Sequence[str] = tuple(KINDS),
) -> list[dict[str, Any]]:
    """Time one model's teams in turn; while one takes its steps, the others wait for their word.

    Args:
        label: of the model in the records.
        model: the network.
        batch_size: of all processes together.
        world: processes of the teams that are several.
        threads: of every team, shared equally among its processes.
        rounds: visits of each team.
        steps: timed steps of a visit.
        kinds: of :data:`KINDS`; the first is what the others are compared with.

    Returns:
        A record for each kind. ``ratio_to_one`` is its images/s over those of one process, ``round_ratio_to_one`` the
        median of the rounds' own ratios.
    """
    with ExitStack() as stack:
        teams = {kind: stack.enter_context(Workers(team_of(model, batch_size, kind, world, threads))) for kind in kinds}
        times = rotate({kind: lambda team=team: team.take(steps) for kind, team in teams.items()}, rounds=rounds)
    records = []
    for kind, found in times.items():
        summary = summarize(found)
        record = {
            "model": label,
            "shape": [batch_size, model.in_chans, model.img_size, model.img_size],
            "dtype": "fp32",
            "direction": "step",
            "variant": kind,
            "processes": teams[kind].team.world,
            "threads_each": teams[kind].team.threads,
            "median_us": round(summary.median * 1e6, 1),
            "p20_us": round(summary.p20 * 1e6, 1),
            "p80_us": round(summary.p80 * 1e6, 1),
            "images_per_second": round(batch_size / summary.median, 2),
            "ratio_to_one": round(speed_up(times[kinds[0]], found), 4),
            "round_ratio_to_one": round(round_speed_up(times[kinds[0]], found), 4),
        }
        records.append({**record, "sources": list(SOURCES), "source_sha256": environment.source_hash(SOURCES)})
    return records


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scaling",
        description="Training steps of one process with all threads against several processes (gloo) that share them, "
        "with the same batch altogether: what sharing costs. CPU only.",
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: all")
    parser.add_argument("--processes", type=int, default=2, help="of the teams that are several (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="of every team altogether (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="visits of each team (default: 9)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a visit (default: 10)")
    add_out(parser, "scaling")
    options = parser.parse_args(args)
    for name in ("processes", "threads", "rounds", "steps"):
        check_range(f"--{name}", getattr(options, name), low=1, integer=True)
    if options.threads % options.processes:
        raise UserError(
            f"--threads: got {options.threads}, expected a multiple of --processes ({options.processes}), which share "
            "them equally."
        )
    device, screen = torch.device("cpu"), Screen(width=120)
    where = {**environment.describe(device), "threads": options.threads}
    records = []
    for label in options.models:
        model, batch_size = MODELS[label]
        screen.print(f"{label}: {options.rounds} rounds of {options.steps} steps")
        records += measure(
            label,
            model,
            batch_size,
            world=options.processes,
            threads=options.threads,
            rounds=options.rounds,
            steps=options.steps,
        )
    result = {
        "environment": where,
        "settings": {"rounds": options.rounds, "steps_per_round": options.steps, "warm_up_steps": WARM_UP_STEPS},
        "ceilings": environment.ceilings(device),
        "records": records,
    }
    path = result_path(options, where, "scaling")
    write_json(path, result)
    screen.print("\n".join(scaling_table(result, environment.ROOT)))
    return finish(screen, [], path)

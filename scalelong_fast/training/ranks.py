"""The processes of a run: one, or those that torchrun started."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.training.config import TrainConfig
from scalelong_fast.training.watch import NotConnectedError, Watch

#: What torchrun tells a process. All of them, or this is a run of one process.
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

#: What to look at where processes that have met cannot talk to each other.
_NETWORK_ADVICE = (
    "See that the machines can reach each other; where they have several networks, or take their own names for "
    "127.0.1.1, name the right interface: GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0 (or as it is called)."
)


@dataclass
class Ranks:
    """This process among those of the run; without arguments, the only one.

    Attributes:
        rank: number of this process, 0 … world − 1.
        world: number of processes.
        local_rank: number of this process on its machine: the GPU it takes.
        local_world: number of processes on this machine.
        control: process group on the CPU (gloo) for flags and messages, or None in a run of one process.
        saving: another one, for checkpoints that are written while the training goes on.
        watch: notices processes that died or hang, or None.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    control: "dist.ProcessGroup | None" = None
    saving: "dist.ProcessGroup | None" = None
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints, and writes what is not written by all."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is anybody to agree with."""
        return self.control is not None

    def beat(self, reached: int | None = None) -> None:
        """Progress was made. Long work must call it more often than every ``train.timeout`` seconds.

        Args:
            reached: how far the run is, in numbers that grow and that all ranks reach; None in work of this one alone.
        """
        if self.watch is not None:
            self.watch.beat(reached)

    @property
    def reached(self) -> int:
        """How far the run is, as :meth:`beat` was told last."""
        return 0 if self.watch is None else self.watch.reached

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Work of unknown length, during which nobody gives up on this process."""
        if self.watch is None:
            yield
            return
        self.watch.busy = True
        try:
            yield
        finally:
            self.watch.busy = False

    @contextmanager
    def waiting_for(self, thread: threading.Thread) -> Iterator[None]:
        """Inside, where ``thread`` stands is what the others are told of this process."""
        if self.watch is None:
            yield
            return
        self.watch.follows = thread.ident
        try:
            yield
        finally:
            self.watch.follows = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place and in the tensor's own dtype; queues work on a GPU and returns."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    def least(self, tensor: Tensor) -> Tensor:
        """Minimum over the ranks, in place; queues work on a GPU and returns."""
        if self.several:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank; every rank must ask."""
        if not self.several:
            return flag
        shared = torch.tensor(int(flag), dtype=torch.int32)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return bool(shared)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.several:
            dist.barrier(group=self.control)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value`` (anything that can be pickled), on every rank."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.control)
        return box[0]

    def gather(self, value: Any, group: "dist.ProcessGroup | None" = None) -> list[Any]:
        """The ``value`` of every rank (anything that can be pickled), in order, on every rank."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=group or self.control)
        return values

    def device_name(self, name: str) -> str:
        """``train.device`` of this process: of several, each takes the GPU of its local rank.

        Raises:
            UserError: one GPU asked for by its number, or fewer GPUs than processes.
        """
        if not self.several or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise invalid("train.device", name, "auto, cpu or cuda in a run of several processes")
        if self.local_rank >= torch.cuda.device_count() == 1:
            raise UserError(
                f"train.device: {self.local_world} processes on this machine, but this one sees a single GPU, perhaps "
                "one that was set apart for it. Give every process sight of all GPUs of its machine (SLURM: "
                "--gpus-per-node instead of --gpus-per-task, and --gpu-bind=none; no CUDA_VISIBLE_DEVICES for each), "
                "start one process, or set --train.device cpu."
            )
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"train.device: {self.local_world} processes on this machine, but {torch.cuda.device_count()} GPUs are "
                "visible. Start as many processes as there are GPUs (torchrun --nproc-per-node), or set "
                "--train.device cpu."
            )
        return f"cuda:{self.local_rank}"


def environment() -> dict[str, int] | None:
    """Rank, world, local rank and local world from torchrun's environment, or None without one.

    Raises:
        UserError: only a part of it, or words that are no numbers.
    """
    given = [name for name in _ENVIRONMENT if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(given):
        return None
    missing = [name for name in _ENVIRONMENT if name not in given]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not set in the environment, although {' and '.join(given)} are. Start the run with "
            "torchrun, which sets them all, or unset them for a run of one process."
        )
    numbers = {}
    for name, default in (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", "RANK"), ("LOCAL_WORLD_SIZE", None)):
        text = os.environ.get(name, os.environ.get(default or "WORLD_SIZE", ""))
        if not text.isdigit():
            raise invalid(name, text, "a whole number, as torchrun sets it")
        numbers[name] = int(text)
    for name, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        total = numbers[of]
        if numbers[name] >= total:
            mend = "Start the run with torchrun, which sets them all, or unset them for a run of one process."
            raise invalid(name, numbers[name], f"a number below {of} = {total}", mend)
    port = os.environ["MASTER_PORT"]
    if not (port.isdigit() and 0 < int(port) < 65536):
        raise invalid("MASTER_PORT", port, "a port, 1 … 65535, as torchrun sets it")
    return numbers


def group_limit(train: TrainConfig) -> timedelta:
    """How long processes wait for each other in an exchange on the devices.

    The watch is what ends a run that hangs, after ``train.timeout``; the groups' own, less helpful end comes later.
    """
    return timedelta(seconds=2 * train.timeout + 60)


@contextmanager
def connect(train: TrainConfig) -> Iterator[Ranks]:
    """Join the other processes of the run, and leave them at the end.

    Made for a process that does nothing else: after an error among several processes it ignores SIGTERM and leaves no
    thread time to end (:meth:`Watch.end_with`).

    Args:
        train: ``device`` and ``timeout`` count.

    Yields:
        A plain :class:`Ranks` where torchrun's environment is missing; there is no process group then.

    Raises:
        UserError: an environment in parts, more processes than GPUs, or processes that did not come in time.
    """
    numbers = environment()
    if numbers is None:
        yield Ranks()
        return
    ranks = Ranks(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"])
    gpu = train.device != "cpu" and torch.cuda.is_available()
    if gpu and ranks.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local_rank)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=train.timeout)))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"RANK {ranks.rank}: the {ranks.world} processes of the run did not find each other within "
            f"{train.timeout:g} s ({error}). See that all of them were started with the same MASTER_ADDR and "
            "MASTER_PORT, and that the machines can reach each other."
        ) from error
    # torchrun may start the processes again and keep the store: what the last ones left there is not meant for these.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    ranks.watch = Watch(store.clone(), ranks.rank, ranks.world, train.timeout)
    ranks.watch.start()
    try:
        _form_groups(ranks, store, "cpu:gloo,cuda:nccl" if gpu else "gloo", train)
        yield ranks
        ranks.watch.stop()
        ranks.barrier()  # the process that keeps the store must not be the first to go
    except BaseException as error:
        if ranks.world > 1:
            ranks.watch.end_with(error)
        ranks.watch.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _form_groups(ranks: Ranks, store: dist.Store, backend: str, train: TrainConfig) -> None:
    """Connect the processes that have met.

    Raises:
        NotConnectedError: they cannot reach each other.
    """
    assert ranks.watch is not None
    ranks.watch.advice = _NETWORK_ADVICE
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("run", store),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=group_limit(train),
        )
        ranks.beat()
        ranks.control, ranks.saving = (dist.new_group(backend="gloo", timeout=timedelta(days=1)) for _ in range(2))
    except (RuntimeError, ValueError) as error:
        raise NotConnectedError(
            f"RANK {ranks.rank}: the {ranks.world} processes of the run have met, but could not be connected "
            f"({error}). {_NETWORK_ADVICE}"
        ) from error
    ranks.watch.advice = ""
    ranks.beat()

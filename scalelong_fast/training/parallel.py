"""How several processes share a step: copies of the model (DDP) or shares of it (FSDP2, and in two levels HSDP)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from scalelong_fast.errors import invalid
from scalelong_fast.training.blocks import repeated_blocks
from scalelong_fast.training.config import TrainConfig
from scalelong_fast.training.hardware import Execution
from scalelong_fast.training.ranks import Ranks, group_limit


def strategy(train: TrainConfig, ranks: Ranks) -> str:
    """``none``, ``ddp``, ``fsdp`` or ``hsdp``: what ``train.parallel`` means in a run of this many processes."""
    if not ranks.several:
        return "none"
    return "ddp" if train.parallel == "auto" else train.parallel


def place(model: nn.Module, train: TrainConfig, device: torch.device, ranks: Ranks) -> nn.Module:
    """Move ``model`` to ``device``, unless it is to be cut up: then it stays on the CPU.

    :class:`Parallel` moves it block by block, so that no device ever holds more than its share and one whole block.
    """
    return model if strategy(train, ranks) in ("fsdp", "hsdp") else model.to(device)


def check_batch(train: TrainConfig, ranks: Ranks) -> None:
    """Raise unless every process gets as many samples, in parts of equal size."""
    parts = ranks.world * train.accumulate
    if train.batch_size % parts:
        processes = f"{ranks.world} processes × {train.accumulate} parts (train.accumulate)"
        raise invalid(
            "train.batch_size",
            train.batch_size,
            f"a multiple of {parts} = {processes}, since the batch is that of all processes together",
        )


class Parallel:
    """The loss of a step, shared between processes.

    Args:
        loss_fn: the objective, compiled or not.
        model: the network inside, where :func:`place` put it; FSDP cuts it up in place, so that this comes before
            optimiser and average.
        train: the loop's settings.
        execution: device and precision.
        ranks: the processes.
    """

    def __init__(self, loss_fn: nn.Module, model: nn.Module, train: TrainConfig, execution: Execution, ranks: Ranks):
        self.kind, self.model, self.ranks = strategy(train, ranks), model, ranks
        self.loss_fn = loss_fn
        if self.kind == "ddp":
            self.loss_fn = _copies(loss_fn, train, execution)
        elif self.kind != "none":
            _shares(model, self.kind, train, execution, ranks)

    def describe(self) -> str:
        """For the line that says what is trained; empty in a run of one process."""
        return "" if self.kind == "none" else f", {self.kind} on {self.ranks.world} processes"

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a part of the batch: gradients are exchanged after the last one.

        FSDP exchanges after every part: whole gradients, kept until the last one, are what it is there to avoid. Only
        the copies of HSDP wait, each with its share.
        """
        if self.kind == "ddp" and not last:
            with self.loss_fn.no_sync():
                yield
            return
        if self.kind == "hsdp":
            self.model.set_requires_all_reduce(last)
        yield


def _copies(loss_fn: nn.Module, train: TrainConfig, execution: Execution) -> nn.Module:
    device = execution.device
    if train.compile not in ("whole", "on") or train.recompute != "none":
        # Dynamo would cut every graph inside DDP at its buckets. Of compiled blocks the gradients come block by block
        # anyway, and a recomputed part must not be cut.
        torch._dynamo.config.optimize_ddp = False
    copies = nn.parallel.DistributedDataParallel(
        loss_fn,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # With accumulation the first backward would exchange nothing, from which DDP would learn the wrong order.
        static_graph=train.accumulate == 1,
    )
    # The buffers are tables of the noise schedule, the same everywhere. (The constructor's argument warns in 2.13.)
    copies.broadcast_buffers = False
    return copies


def _shares(model: nn.Module, kind: str, train: TrainConfig, execution: Execution, ranks: Ranks) -> None:
    """Cut ``model`` up in place: every repeated block is gathered for its own forward and backward, the rest as one.

    What several blocks read (the shared gate of LS, the last norm) belongs to the rest, which stays whole from the
    beginning of the forward to the end of the backward: nothing is ever read in pieces. The rest stays in float32 as
    well, as embeddings and gates are under autocast; it is small.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.distributed_c10d import _set_pg_timeout
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape, names = (ranks.world,), ("shard",)
    if kind == "hsdp":
        if ranks.world % ranks.local_world:
            raise invalid(
                "train.parallel",
                "hsdp",
                "the same number of processes on every machine",
                f"There are {ranks.world} in all and {ranks.local_world} on this one.",
            )
        shape, names = (ranks.world // ranks.local_world, ranks.local_world), ("copy", "shard")
    mesh = init_device_mesh(execution.device.type, shape, mesh_dim_names=names)
    for name in names:
        _set_pg_timeout(group_limit(train), mesh.get_group(name))  # new groups have PyTorch's own, whatever ours was
    narrow = torch.bfloat16 if execution.autocast == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # It warns of additions in place to what a block returns; there are none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=rest, reshard_after_forward=False)

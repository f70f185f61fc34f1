"""Bytes on one GPU, by the way in which the GPUs share the model."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from scalelong_fast.models import ModelConfig, build_model
from scalelong_fast.planning.assumptions import Assumptions
from scalelong_fast.planning.tracing import Trace, example_batch
from scalelong_fast.training.batches import DEVICE_RESIDENT_BYTES
from scalelong_fast.training.blocks import repeated_blocks

#: Of a parameter, its gradient, a moment and an average.
FLOAT = 4


@dataclass(frozen=True)
class Sizes:
    """The real network's parameters, counted on the meta device.

    Attributes:
        shapes: of all parameters.
        blocks: parameters of each repeated block, in numbers.
        rest: parameters outside the blocks.
    """

    shapes: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    rest: int

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes))

    def share(self, shards: int) -> int:
        """Numbers of the largest share: FSDP cuts every parameter along its first dimension, rounding up."""
        return sum(-(-shape[0] // shards) * math.prod(shape[1:]) if shape else 1 for shape in self.shapes)


def count(config: ModelConfig) -> Sizes:
    """The parameters of a network."""
    with torch.device("meta"):
        model: nn.Module = build_model(config)
    shapes = tuple(tuple(p.shape) for p in model.parameters())
    blocks = tuple(sum(p.numel() for p in block.parameters()) for block in repeated_blocks(model))
    return Sizes(shapes, blocks, sum(map(math.prod, shapes)) - sum(blocks))


def state_bytes(sizes: Sizes, shards: int = 1, averages: int = 1) -> dict[str, int]:
    """Bytes that lie there all the time: parameters, AdamW's moments and step counts, averages.

    Args:
        sizes: the network's.
        shards: GPUs that share one copy of the model.
        averages: exponential moving averages that are followed.
    """
    share = FLOAT * sizes.share(shards)
    return {
        "parameters": share,
        "moments": 2 * share + FLOAT * len(sizes.shapes),
        "averages": averages * share,
    }


def memory(
    config: ModelConfig,
    sizes: Sizes,
    trace: Trace,
    *,
    parallel: str,
    shards: int,
    accumulate: int,
    precision: str,
    averages: int,
    assumptions: Assumptions,
    gpus: int = 1,
    whole: bool = False,
    data_bytes: int = 0,
) -> dict[str, int]:
    """Bytes on the first GPU at the worst moment of a step, by what they are for.

    Args:
        config, sizes: the network.
        trace: forward and backward of one micro-batch.
        parallel: ``none``, ``ddp``, ``fsdp`` or ``hsdp``.
        shards: GPUs that share one copy of the model; 1 but under FSDP.
        accumulate: micro-batches of a step.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        averages: exponential moving averages.
        assumptions: context and fragmentation.
        gpus: all of them.
        whole: whether forward and loss are compiled as one graph, which hands out all gradients at its end.
        data_bytes: of the training set where it lies on the GPU, see :func:`resident_bytes`.
    """
    items = state_bytes(sizes, shards, averages)
    items["data set"] = data_bytes
    items["batches"] = 2 * accumulate * _batch_bytes(config, trace.batch)
    sharded = parallel in ("fsdp", "hsdp")
    if sharded:
        narrow = 2 if precision == "bf16" else FLOAT
        block = max(sizes.blocks, default=0)
        # The rest stays gathered in float32; of the blocks one is at work and one on its way, each as it comes and as
        # it is read; and the gradients of two blocks wait to be exchanged, as they come and in float32.
        items["gathered parameters"] = FLOAT * sizes.rest + 2 * 2 * narrow * block
        items["gradients"] = FLOAT * sizes.share(shards)
        items["gradients on their way"] = FLOAT * sizes.rest + 2 * (narrow + FLOAT) * block
    gathered_narrow = sharded and precision == "bf16"
    steady = sharded or parallel == "ddp" or accumulate > 1
    if not sharded and steady:
        items["gradients"] = FLOAT * sizes.parameters  # DDP's buckets, or what the micro-batches before left
    points = [
        (0 if gathered_narrow else weights, 0 if steady and not whole else gradients, other)
        for weights, gradients, other in trace.timeline
    ]
    # Before the forward: the noise of all samples, of which every GPU then keeps its part (training/batches.py).
    points.append((0, 0, gpus * accumulate * noise_bytes(config, trace.batch) if gpus > 1 else 0))
    weights, gradients, other = max(points, key=sum)
    items["gradients of the graph" if steady else "gradients"] = gradients
    items["weights in autocast's dtype"] = weights
    items["activations and work"] = other
    items["fragmentation"] = int(assumptions.fragmentation * sum(items.values()))
    items["context and libraries"] = assumptions.context
    return {name: size for name, size in items.items() if size}


def noise_bytes(config: ModelConfig, samples: int) -> int:
    """Bytes of the noise of so many samples, float32."""
    return FLOAT * samples * config.in_chans * config.img_size**2


def resident_bytes(config: ModelConfig, images: int | None) -> int:
    """Bytes of a training set that lies on the GPU; 0 where it is too large, of latents, or with captions.

    Args:
        config: the network, whose images they are.
        images: their number; None: not known, 0 bytes.
    """
    if images is None or config.in_chans > 3 or config.clip_dim > 0:
        return 0
    size = images * (config.in_chans * config.img_size**2 + (8 if config.num_classes > 0 else 0))
    return size if size <= DEVICE_RESIDENT_BYTES else 0


def _batch_bytes(config: ModelConfig, batch: int) -> int:
    with torch.device("meta"):
        tensors = example_batch(config, batch)
    return sum(t.nbytes for t in tensors if t is not None)

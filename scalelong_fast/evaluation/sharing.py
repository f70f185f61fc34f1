"""How images are shared out over the processes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from scalelong_fast.training.ranks import Ranks


def own_batches(total: int, batch_size: int, ranks: Ranks) -> Iterator[Tensor]:
    """Indices of the batches that fall to this process: one of every ``ranks.world``, int64 on the CPU."""
    for start in range(ranks.rank * batch_size, total, ranks.world * batch_size):
        yield torch.arange(start, min(start + batch_size, total))

"""The features that are kept one by one, for what moments are not enough for: of so many images at most."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from scalelong_fast.training.ranks import Ranks

#: Images of each side whose features are kept at most: 400 MB of Inception's. The kernel distance draws its subsets of
#: 1000 from them, and neighbours are looked for among them.
KEPT = 50_000


def choose_kept(total: int) -> Tensor:
    """Which of ``total`` images have their features kept, ascending: all, or :data:`KEPT` of them at random; int64."""
    if total <= KEPT:
        return torch.arange(total)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(0)))
    return torch.from_numpy(np.sort(generator.permutation(total)[:KEPT]).astype(np.int64))


def bounded(features: Tensor) -> Tensor:
    """The features ``(N, F)`` that would have been kept."""
    return features if len(features) <= KEPT else features[choose_kept(len(features))]


class FeaturePool:
    """Collects the features that are kept, each process those of its share.

    Args:
        total: number of images of all processes together.

    Attributes:
        images: int64, which images these are.
    """

    def __init__(self, total: int) -> None:
        self.images = choose_kept(total)
        self._rows: list[Tensor] = []
        self._features: list[Tensor] = []

    def add(self, indices: Tensor, features: Tensor) -> None:
        """Take in the features ``(B, F)`` of images ``(B,)``."""
        rows = torch.searchsorted(self.images, indices).clamp_(max=len(self.images) - 1)
        kept = self.images[rows] == indices
        self._rows.append(rows[kept])
        self._features.append(features.cpu()[kept])

    def gather(self, ranks: Ranks) -> Tensor | None:
        """Features of all :attr:`images` in their order on the main process, None on the others; all must ask."""
        mine = torch.cat(self._features) if self._features else None
        rows = torch.cat([*self._rows, torch.empty(0, dtype=torch.int64)])
        shares = ranks.gather((rows.numpy(), 0 if mine is None else mine.shape[1]))
        width = max(width for _, width in shares)
        whole = torch.zeros(len(self.images), width) if ranks.is_main else None
        # One process after the other: nobody but the main one ever holds more than its own share.
        for rank, (places, _) in enumerate(shares):
            if rank == 0:
                part = mine
            elif ranks.rank == rank and len(places):
                dist.send(mine.contiguous(), 0, group=ranks.control)
                continue
            elif ranks.is_main and len(places):
                part = torch.empty(len(places), width)
                dist.recv(part, rank, group=ranks.control)
            if ranks.is_main and len(places):
                whole[torch.from_numpy(places)] = part
        return whole

"""The order in which images are visited: a pure function of the step, so a resumed run needs no state."""

import numpy as np
import torch
from torch import Tensor

from scalelong_fast.errors import check_range


class ShuffledOrder:
    """Shuffled batches in which every image comes exactly once per epoch.

    Sample ``k = step * batch_size + i`` of the run is entry ``k % n`` of the permutation of epoch
    ``k // n``, which follows from ``(seed, epoch)`` alone (NumPy's PCG64). Batches may straddle epochs and
    may be larger than the data set. No state is kept apart from a cache of two permutations, so steps can
    be asked for in any order.

    Args:
        num_images: n, number of images, at least 1.
        batch_size: B, number of images in a batch, at least 1.
        seed: whole number >= 0.

    Raises:
        UserError: when an argument is out of range.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        check_range("num_images", num_images, low=1, integer=True)
        check_range("batch_size", batch_size, low=1, integer=True)
        check_range("seed", seed, low=0, integer=True)
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self._cache: dict[int, np.ndarray] = {}

    def batch_indices(self, step: int) -> Tensor:
        """Indices of the images in batch ``step`` (from 0): int64 CPU tensor of shape (B,)."""
        check_range("step", step, low=0, integer=True)
        parts = []
        position, stop = step * self.batch_size, (step + 1) * self.batch_size
        while position < stop:
            epoch, start = divmod(position, self.num_images)
            count = min(stop - position, self.num_images - start)
            parts.append(self._permutation(epoch)[start : start + count])
            position += count
        # concatenate copies even a single part: a caller who writes into the batch cannot harm the cache.
        return torch.from_numpy(np.concatenate(parts))

    def epoch_of(self, step: int) -> int:
        """Epoch (from 0) of the first image in batch ``step``."""
        check_range("step", step, low=0, integer=True)
        return step * self.batch_size // self.num_images

    def _permutation(self, epoch: int) -> np.ndarray:
        cache = self._cache
        if epoch not in cache:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            fresh = generator.permutation(self.num_images).astype(np.int64, copy=False)
            # Two neighbouring epochs at most: a batch that straddles them needs both. The dictionary is
            # replaced rather than changed, so a prefetching thread may call at the same time.
            neighbour = {other: kept for other, kept in cache.items() if other == epoch - 1}
            cache = self._cache = {**neighbour, epoch: fresh}
        return cache[epoch]

"""Randomness of generated images: every image has its own seed and its own stream of noise."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scalelong_fast.errors import check_range


def image_seeds(seed: int, count: int, label: int | None = None) -> list[int]:
    """Return the seeds of the images 0..count-1 of a label.

    The seed of image j depends on (seed, label, j) only: neither on how many images are asked for nor on
    the other labels, so a set of samples can be extended or split over processes.

    Args:
        seed: seed of the whole set, >= 0.
        count: number of images, >= 0.
        label: class label >= 0, or None for unconditional images (which differ from those of label 0).

    Returns:
        ``count`` ints in [0, 2^63).
    """
    check_range("seed", seed, low=0, integer=True)
    check_range("count", count, low=0, integer=True)
    if label is not None:
        check_range("label", label, low=0, integer=True)
    group = 0 if label is None else label + 1
    return [_image_seed(seed, (group, j)) for j in range(count)]


def _image_seed(seed: int, key: tuple[int, int]) -> int:
    word = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]
    return int(word) >> 1  # 63 bits also fit a signed 64-bit integer


class NoiseStreams:
    """Standard normal noise for a batch, each image from its own generator.

    The generators live on the CPU, hence the same noise on every device, in every batch.

    Args:
        seeds: one seed per image, ints in [0, 2^63).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        # NumPy's, since PyTorch's CPU generator keeps 32 bits of a seed: of 50,000 images two might be equal.
        self._generators = [np.random.default_rng(int(seed)) for seed in seeds]

    def normal(self, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Draw the next noise of each image: (N, *shape) fp32 on ``device``."""
        noise = torch.empty(len(self._generators), *shape, dtype=torch.float32)
        for image, generator in zip(noise, self._generators, strict=True):
            image.copy_(torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32)))
        return noise.to(device)


def initial_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the noise x_T from which the images with these seeds start: (N, *shape) fp32 on ``device``."""
    return NoiseStreams(seeds).normal(shape, device)

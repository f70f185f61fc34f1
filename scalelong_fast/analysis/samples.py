"""Samples of a data set as a network sees them, for analyses that train nothing."""

from pathlib import Path

import torch
from torch import Tensor

from scalelong_fast.data import TrainingSet, list_datasets, load_images, to_network_range
from scalelong_fast.errors import UserError, invalid, unknown_name


def check_dataset(name: str, argument: str = "DATASET") -> None:
    """Raise :class:`UserError` about ``argument`` unless :func:`open_samples` knows the data set."""
    if name not in (known := [*list_datasets(), "packed"]):
        raise unknown_name(argument, name, known)


def open_samples(
    name: str, path: Path | None = None, img_size: int | None = None, progress: bool = False
) -> TrainingSet:
    """A data set by the name it has in training.

    Args:
        name: ``digits``, ``cifar10``, ``folder`` or ``packed``.
        path: where it lies; needed for ``folder`` and ``packed``.
        img_size: side in pixels that a ``folder`` is resized to.
        progress: show a bar while images are decoded.

    Raises:
        UserError: an unknown name, or data that cannot be read.
    """
    check_dataset(name)
    if name == "packed":
        from scalelong_fast.data.packed import PackedSet

        if path is None:
            raise invalid("--path", None, "the folder of a packed set", "Make one with scalelong-fast prepare.")
        return PackedSet(path)
    try:
        return load_images(name, path=path, img_size=img_size, progress=progress)
    except UserError as error:  # options of training lie one level deeper
        raise UserError(str(error).replace("--data.", "--")) from error


def draw_clean(dataset: TrainingSet, count: int, generator: torch.Generator) -> Tensor:
    """``count`` samples drawn with replacement, as the network sees them: float32 ``(count, C, H, W)``."""
    indices = torch.randint(len(dataset), (count,), generator=generator)
    noise = torch.randn((count, *dataset.image_shape), generator=generator) if dataset.latent else None
    return to_network_range(dataset.fetch(indices), noise=noise, scale=dataset.latent_scale)

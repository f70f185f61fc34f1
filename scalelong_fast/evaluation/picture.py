"""Generated images, each beside the reference images that are nearest to it: has the model learned them by heart?"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scalelong_fast.data.training_set import TrainingSet
from scalelong_fast.errors import UserError
from scalelong_fast.evaluation.reference import Reference
from scalelong_fast.training.figures import image_grid, save_png

#: Generated images shown, and neighbours of each.
SHOWN, NEIGHBOURS = 10, 5


def nearest(features: Tensor, reference: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """Indices ``(B, count)`` of the reference features nearest to each of ``features`` ``(B, F)``, nearest first."""
    distances = torch.cdist(features.double(), reference.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(min(count, len(reference)), largest=False).indices


def save_picture(
    path: Path, images: Tensor, features: Tensor, dataset: TrainingSet | None, reference: Reference
) -> None:
    """Write a grid: a row for each generated image, itself first, then its nearest neighbours in the reference.

    Args:
        path: of the PNG.
        images: uint8 ``(B, C, H, W)``, drawn.
        features: ``(B, F)``, theirs.
        dataset: what the reference was measured on, or None: the grid has the drawn images alone.
        reference: with the features that were kept.

    Raises:
        UserError: it cannot be written.
    """
    rows = _as_pixels(images)
    columns = len(rows)
    if dataset is not None and reference.features is not None and reference.kept is not None:
        found = nearest(features, reference.features)
        columns = 1 + found.shape[1]
        neighbours = dataset.fetch(reference.kept[found.flatten()]).images
        assert neighbours is not None
        beside = _as_pixels(neighbours).reshape(*found.shape, *rows.shape[1:])
        rows = np.concatenate([rows[:, None], beside], axis=1).reshape(-1, *rows.shape[1:])
    try:
        save_png(path, image_grid(rows, columns))
    except OSError as error:
        raise UserError(f"RUN: cannot write {path} ({error}). The result itself is stored.") from error


def _as_pixels(images: Tensor) -> np.ndarray:
    """``(N, H, W, 3)`` of ``(N, 1 or 3, H, W)``."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()

"""Pictures of a run: the loss curve and grids of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scalelong_fast.training.checkpoint import write_atomically

#: Small images are enlarged by a whole factor until they are about this wide.
_CELL_PIXELS = 48


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Tile images row by row.

    Args:
        images: ``(N, H, W, C)`` uint8, C = 1 or 3.
        columns: images per row.

    Returns:
        ``(H', W', 3)`` uint8 with thin white lines between the images; small ones are enlarged.
    """
    factor = max(1, _CELL_PIXELS // images.shape[2])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    n, height, width, channels = images.shape
    rows, gap = -(-n // columns), 2
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = np.broadcast_to(image, (height, width, max(channels, 3)))
    return canvas


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write an ``(H, W, 3)`` uint8 picture, atomically."""
    from PIL import Image

    write_atomically(path, lambda file: Image.fromarray(picture).save(file, format="png"))


def save_loss_curve(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the logged losses over the steps, log-scaled."""
    from matplotlib.figure import Figure  # not pyplot: no backend, no global state

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1.5)
    axes.set_xlabel("step")
    axes.set_ylabel("noise prediction loss (Eq. 2)")
    if rows:
        axes.set_yscale("log")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))

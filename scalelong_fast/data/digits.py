"""scikit-learn's handwritten digits: tiny, labelled and available without a network."""

from pathlib import Path

import numpy as np
import torch

from scalelong_fast.data.images import ImageDataset
from scalelong_fast.data.optional import import_optional
from scalelong_fast.errors import invalid

_SIDE = 8
_FULL_SCALE = 16  # the brightest value in scikit-learn's copy


def load_digits(path: Path | None, img_size: int | None, progress: bool) -> ImageDataset:
    """The 1797 digits as uint8 of shape (1797, 1, 8, 8), labels 0..9; 0..16 is scaled to 0..255.

    Raises:
        UserError: when a path or a size other than 8 is asked for, or scikit-learn is missing.
    """
    if path is not None:
        raise invalid("--data.path", str(path), "none for digits", "They come with scikit-learn; leave it out.")
    if img_size not in (None, _SIDE):
        raise invalid("--model.img-size", img_size, "8", "The digits are native 8x8; use --model.img-size 8.")
    raw = import_optional("sklearn.datasets").load_digits()
    pixels = np.rint(raw.images * (255 / _FULL_SCALE)).astype(np.uint8)
    return ImageDataset(
        name="digits",
        images=torch.from_numpy(pixels).unsqueeze(1).contiguous(),
        labels=torch.from_numpy(raw.target.astype(np.int64)),
        num_classes=10,
        class_names=tuple(str(digit) for digit in range(10)),
    )

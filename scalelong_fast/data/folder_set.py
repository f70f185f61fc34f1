"""A folder of images that are decoded when they are fetched: for going through it once, in any shares."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from scalelong_fast.data.decode import decode, read_header
from scalelong_fast.data.folder import scan
from scalelong_fast.data.training_set import HostBatch, check_indices
from scalelong_fast.errors import UserError


class FolderSet:
    """The :class:`TrainingSet` of a folder: the images of ``load_images("folder")``, always in colour.

    Args:
        path: the folder; its subfolders that hold images are the classes.
        img_size: side in pixels that images are brought to; None: they are squares of one size already.
        workers: threads that decode.
        argument: how messages call ``path``.

    Raises:
        UserError: no images, they lie both beside and inside class folders, or the first is no square.
    """

    name: ClassVar[str] = "folder"
    text_shape: ClassVar[None] = None
    num_captions: ClassVar[int] = 0
    null_text: ClassVar[None] = None
    latent: ClassVar[bool] = False
    latent_scale: ClassVar[float] = 1.0

    def __init__(self, path: Path, img_size: int | None = None, workers: int = 8, argument: str = "--data.path"):
        self.path, self.img_size, self.workers, self.argument = path, img_size, workers, argument
        self.class_names, self.files, labels = scan(path, argument)
        self.num_classes = len(self.class_names)
        self._labels = torch.tensor(labels, dtype=torch.int64) if self.class_names else None
        header = read_header(self.files[0], argument)
        side = header.width if img_size is None else img_size
        self.image_shape = (3, side, side)
        if img_size is None and header.height != side:
            raise self._misfit(self.files[0], header.width, header.height, "a square")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """Size of the decoded images in bytes."""
        return len(self) * int(np.prod(self.image_shape))

    def fingerprint(self) -> str:
        """Hash (16 hex digits) of the files' names and sizes and of the side that they are brought to."""
        digest = hashlib.blake2b(repr(self.img_size).encode(), digest_size=8)
        for file in self.files:
            digest.update(repr((file.relative_to(self.path).as_posix(), file.stat().st_size)).encode())
        return digest.hexdigest()

    def fetch(self, indices: Tensor, captions: np.ndarray | None = None) -> HostBatch:
        """Images and labels by index; see :meth:`TrainingSet.fetch`.

        Raises:
            UserError: a file cannot be read, or is of another size and none was asked for; it is named.
        """
        found = check_indices(indices, len(self))
        images = np.empty((len(found), *self.image_shape), np.uint8)

        def fill(row: int) -> None:
            images[row] = self._decode(self.files[found[row]])

        with ThreadPoolExecutor(self.workers) as pool:  # Pillow lets go of the interpreter lock while it decodes
            for _ in pool.map(fill, range(len(found))):
                pass
        return HostBatch(
            images=torch.from_numpy(images), labels=None if self._labels is None else self._labels[indices]
        )

    def _decode(self, file: Path) -> np.ndarray:
        pixels = decode(file, self.img_size, grey=False, argument=self.argument)
        if pixels.shape != self.image_shape:
            side = self.image_shape[-1]
            raise self._misfit(
                file, pixels.shape[2], pixels.shape[1], f"squares of one size, {side}x{side} as the first"
            )
        return pixels

    def _misfit(self, file: Path, width: int, height: int, expected: str) -> UserError:
        return UserError(
            f"{self.argument}: {str(file)!r} has {width}x{height} pixels, expected {expected}. Bring all images to one "
            "size with --img-size."
        )

"""The images behind a name or a folder."""

import os
from pathlib import Path

from scalelong_fast.data import TrainingSet, list_datasets, load_images
from scalelong_fast.data.folder_set import FolderSet
from scalelong_fast.data.packed import PackedSet
from scalelong_fast.data.packed.format import MANIFEST
from scalelong_fast.errors import UserError, unknown_name
from scalelong_fast.training.ranks import Ranks

#: Data sets that have a name of their own; ``folder`` is asked for by its path.
NAMES = [name for name in list_datasets() if name != "folder"]


def open_images(
    name: str,
    *,
    path: Path | None = None,
    img_size: int | None = None,
    progress: bool = False,
    workers: int = 8,
    argument: str = "--reference",
) -> TrainingSet:
    """Open a data set by its name, or a folder: a packed set, or image files.

    Args:
        name: ``digits``, ``cifar10``, or a folder.
        path: a local copy of a named set.
        img_size: side that files of a folder are resized and cropped to; None: they are of one size already.
        progress: show a progress bar while the images of a named set are decoded.
        workers: threads that decode the files of a folder, when they are fetched.
        argument: how messages call ``name``.

    Raises:
        UserError: neither, or data that cannot be read; files of a folder are read when they are fetched.
    """
    if name in NAMES:
        try:
            return load_images(name, path=path, progress=progress)
        except UserError as error:  # it names the option of a training
            raise UserError(str(error).replace("--data.path", "--path")) from error
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise unknown_name(argument, name, [*NAMES, "a folder of images or of a packed set"])
    if (folder / MANIFEST).is_file():
        return PackedSet(folder)
    return FolderSet(folder, img_size, workers, argument)


def decoding_threads(ranks: Ranks) -> int:
    """Threads of this process that decode: the machine's cores are shared by its processes."""
    return max(1, min(16, (os.cpu_count() or 1) // ranks.local_world))


def check_pixels(dataset: TrainingSet, argument: str, img_size: int | None = None) -> None:
    """Raise for a set of latents, whose images are not stored."""
    if dataset.latent:
        size = 256 if img_size is None else img_size
        raise UserError(
            f"{argument}: {dataset.name!r} holds latents, not images. Make statistics of the images with "
            f"scalelong-fast fid-stats FOLDER --img-size {size} --out stats.npz, and give --reference stats.npz."
        )

"""A folder of images, with subfolders as classes."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalelong_fast.data.decode import IMAGE_SUFFIXES, ImageHeader, decode, read_header
from scalelong_fast.data.images import ImageDataset
from scalelong_fast.data.optional import track
from scalelong_fast.errors import UserError, invalid

_BLOCK = 256


def load_folder(path: Path | None, img_size: int | None, progress: bool) -> ImageDataset:
    """All images below ``path`` as uint8 of shape (N, C, S, S), sorted by their path.

    Subfolders that hold images are the classes, sorted by name and searched recursively; a folder with images
    of its own and none below is unlabelled. Hidden files and folders are passed over. C is 1 when every file
    is a grey one, otherwise 3.

    Args:
        path: the folder; required.
        img_size: S in pixels, or ``None`` when all images are squares of one size already.
        progress: show a progress bar while decoding.

    Raises:
        UserError: when the path is missing, there are no images, they lie both beside and inside class
            folders, a class is empty, sizes differ without ``img_size``, a file cannot be read, or the images
            do not fit in memory.
    """
    if path is None:
        raise invalid("--data.path", None, "a folder of images", "Give it with --data.path FOLDER.")
    classes, files, labels = scan(path)
    headers = list(_in_threads(read_header, files, "Reading headers", progress))
    side = img_size if img_size is not None else _common_side(files, headers)
    grey = all(header.grey for header in headers)
    images = _allocate(len(files), 1 if grey else 3, side)
    decoded = _in_threads(lambda file: decode(file, img_size, grey), files, "Decoding images", progress)
    for index, pixels in enumerate(decoded):
        images[index] = pixels
    return ImageDataset(
        name="folder",
        images=torch.from_numpy(images),
        labels=torch.tensor(labels, dtype=torch.int64) if classes else None,
        num_classes=len(classes),
        class_names=classes,
    )


def _in_threads(function: Callable[[Path], Any], files: list[Path], description: str, progress: bool) -> Iterator[Any]:
    """``function`` of each file, in order; Pillow lets go of the interpreter lock while it decodes."""

    def results() -> Iterator[Any]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            # In blocks, since map would queue every file at once and results could pile up unread.
            for start in range(0, len(files), _BLOCK):
                yield from pool.map(function, files[start : start + _BLOCK])

    yield from track(results(), len(files), description, progress)


def scan(path: Path, argument: str = "--data.path") -> tuple[tuple[str, ...], list[Path], list[int]]:
    """Class names, files, and the class index of each file; no names and no indices when unlabelled.

    Raises:
        UserError: no images, images both beside and inside class folders, or an empty one; ``argument`` is what the
            message calls the folder.
    """
    loose = sorted(filter(_is_image, path.iterdir()), key=_by_name)
    folders = (entry for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
    found = {folder.name: sorted(_images_below(folder), key=_by_name) for folder in sorted(folders, key=_by_name)}
    if not any(found.values()):
        if not loose:
            kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
            raise invalid(argument, str(path), f"a folder that holds images ({kinds})")
        return (), loose, []
    if loose:
        raise UserError(
            f"{argument}: {str(path)!r} holds both images of its own (first: {loose[0].name!r}) and class "
            "folders. Move the loose images into a class folder, or all images into one flat folder."
        )
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise UserError(
            f"{argument}: the class folder {str(path / empty[0])!r} holds no images. Add some or remove it."
        )
    files = [file for members in found.values() for file in members]
    labels = [index for index, members in enumerate(found.values()) for _ in members]
    return tuple(found), files, labels


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        yield from (file for file in map(Path(parent).joinpath, names) if _is_image(file))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(file.name) and file.is_file()


def _by_name(file: Path) -> str:
    # Paths themselves compare differently on Windows, which would change the labels.
    return file.as_posix()


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _common_side(files: list[Path], headers: list[ImageHeader]) -> int:
    side = headers[0].width
    for file, header in zip(files, headers, strict=True):
        if (header.width, header.height) != (side, side):
            expected = f"squares of one size ({side}x{side} like the first)" if file != files[0] else "a square"
            raise UserError(
                f"--data.path: {str(file)!r} has {header.width}x{header.height} pixels, expected {expected}. "
                "Choose a size to resize and crop all images to with --model.img-size."
            )
    return side


def _allocate(count: int, channels: int, side: int) -> np.ndarray:
    try:
        return np.empty((count, channels, side, side), np.uint8)
    except MemoryError as error:
        gib = count * channels * side * side / 2**30
        raise UserError(
            f"--data.path: {count} images of {channels}x{side}x{side} need {gib:.1f} GiB of memory, "
            "more than there is. Choose a smaller --model.img-size or a smaller set."
        ) from error

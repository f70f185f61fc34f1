"""What is packed: encoded images by their index, with labels or captions."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from scalelong_fast.data.decode import IMAGE_SUFFIXES
from scalelong_fast.errors import UserError

#: Names of splits: folders called so are no classes.
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class UnreadableError(UserError):
    """One image of a source cannot be read; ``--skip-unreadable`` leaves it out."""


@dataclass(frozen=True)
class Source:
    """Images of any kind and size, in a fixed order.

    Attributes:
        names: of each image, for messages and for captions.
        read: bytes of the encoded image of an index; may be called by several threads at once.
        labels: int64 ``(N,)``; None: unlabelled.
        class_names: in label order; empty when unlabelled.
        captions: of each image, at least one each; None: no text.
        facts: what the manifest says of the source; JSON-ready.
        marks: of each image, what changes when it is replaced (its size or checksum); None: nothing is known of them.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    captions: Sequence[Sequence[str]] | None
    facts: dict[str, Any]
    marks: Sequence[Any] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.names)

    def mark(self, samples: range) -> str:
        """Fingerprint of the images of these indices; the source has marks."""
        assert self.marks is not None
        return fingerprint((self.names[index], self.marks[index]) for index in samples)

    def take(self, indices: np.ndarray) -> "Source":
        """The images of these indices, int64, in their order."""
        chosen, read, names, captions = indices.tolist(), self.read, self.names, self.captions
        marks = self.marks
        return replace(
            self,
            names=[names[index] for index in chosen],
            read=lambda index: read(chosen[index]),
            labels=None if self.labels is None else self.labels[indices],
            captions=None if captions is None else [captions[index] for index in chosen],
            marks=None if marks is None else [marks[index] for index in chosen],
        )


def is_image(name: str) -> bool:
    """Whether a path inside a source, with ``/``, is that of an image; hidden files and folders are not looked at."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder above it, is hidden, or what macOS adds to archives."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def classes_of(paths: Sequence[str], where: str) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Class names, and the label of each path; no names and None where the images lie in no class folders.

    Args:
        paths: of the images, relative, with ``/``; what lies above the first folder is named after is the class.
        where: the source, for messages.

    Raises:
        UserError: images beside class folders, or folders that are splits and not classes.
    """
    folders = [path.split("/", 1)[0] if "/" in path else None for path in paths]
    names = sorted({folder for folder in folders if folder is not None})
    if not names:
        return (), None
    if None in folders:
        loose = paths[folders.index(None)]
        raise UserError(
            f"--source: {where} holds both images of its own (first: {loose!r}) and class folders (first: {names[0]!r}"
            "). Move the loose images into a class folder, or all images into one flat folder."
        )
    if {name.lower() for name in names} <= SPLITS:
        raise UserError(
            f"--source: the folders in {where} are splits ({', '.join(names)}), expected class folders. Give the "
            f"folder of one split, e.g. --source {where}/{names[0]}."
        )
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(names), np.array([numbers[folder] for folder in folders], np.int64)


def without_common_folder(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them lie in, which archives often have one of."""
    rest = list(paths)
    while all("/" in path for path in rest) and len({path.split("/", 1)[0] for path in rest}) == 1:
        rest = [path.split("/", 1)[1] for path in rest]
    return rest


def fingerprint(items: Iterable[tuple[Any, ...]]) -> str:
    """16 hex digits that change with any of the items, or their order."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()

"""The data sets that can be asked for by name."""

from collections.abc import Callable
from pathlib import Path

from scalelong_fast.data.cifar10 import load_cifar10
from scalelong_fast.data.digits import load_digits
from scalelong_fast.data.folder import load_folder
from scalelong_fast.data.images import ImageDataset
from scalelong_fast.errors import UserError, check_range, invalid, unknown_name

_SOURCES: dict[str, Callable[[Path | None, int | None, bool], ImageDataset]] = {
    "cifar10": load_cifar10,
    "digits": load_digits,
    "folder": load_folder,
}


def list_datasets() -> list[str]:
    """Names that :func:`load_images` knows, sorted."""
    return sorted(_SOURCES)


def load_images(
    name: str,
    *,
    path: str | Path | None = None,
    img_size: int | None = None,
    progress: bool = False,
) -> ImageDataset:
    """Load a whole data set into memory.

    Args:
        name: ``digits`` (scikit-learn, 1797 grey images of 8x8), ``cifar10`` (50,000 colour images of 32x32)
            or ``folder`` (any folder of images).
        path: where the data lies. ``folder`` needs it; for ``cifar10`` it names a local copy to be read
            instead of downloading; ``digits`` takes none.
        img_size: side of the square images in pixels. ``folder`` resizes and crops to it; the other sets
            have a size of their own and refuse any other.
        progress: show a progress bar while images are decoded.

    Returns:
        uint8 images of shape (N, C, H, W) with their labels, on the CPU.

    Raises:
        UserError: on an unknown name, a bad path or size, an unreadable image, a missing package, or a
            failed download.
    """
    if name not in _SOURCES:
        raise unknown_name("data.name", name, _SOURCES)
    if img_size is not None:
        check_range("--model.img-size", img_size, low=1, integer=True)
    return _SOURCES[name](_existing(path), img_size, progress)


def _existing(path: str | Path | None) -> Path | None:
    if path is None:
        return None
    if not str(path):
        raise invalid("--data.path", str(path), "a folder")
    resolved = Path(path).expanduser()
    if not resolved.exists():
        raise UserError(f"--data.path: {str(path)!r} does not exist. Give a folder that does.")
    if not resolved.is_dir():
        raise invalid("--data.path", str(path), "a folder, not a file")
    return resolved

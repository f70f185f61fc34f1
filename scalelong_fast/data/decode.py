"""One image file to one uint8 array of the wanted size."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scalelong_fast.data.crop import halve_and_crop
from scalelong_fast.data.optional import import_optional
from scalelong_fast.errors import UserError

_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L")  # 16-bit grey
#: Endings of the files that are taken for images.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_GREY_MODES = ("1", "L", "LA", "La", *_DEEP_MODES)


class ImageHeader(NamedTuple):
    """What a file says of itself before its pixels are decoded; sizes in pixels, as stored."""

    width: int
    height: int
    grey: bool


def read_header(file: Path, argument: str = "--data.path") -> ImageHeader:
    """Size and kind of an image; colour files count as colour even if all their pixels are grey.

    ``argument`` is what messages call the folder.

    Raises:
        UserError: when the file is not a readable image.
    """
    with _open(file, argument) as image:
        return ImageHeader(image.width, image.height, image.mode in _GREY_MODES)


def decode(file: Path, img_size: int | None, grey: bool, argument: str = "--data.path") -> np.ndarray:
    """Pixels as uint8 of shape (C, H, W), C = 1 if ``grey`` else 3, turned upright by their EXIF mark.

    Transparent parts are laid over white. With ``img_size`` the result is that many pixels square: the
    shorter side is brought to it, then the centre is cut out. ``argument`` is what messages call the folder.

    Raises:
        UserError: when the file is not a readable image.
    """
    with _open(file, argument) as opened:
        image = flatten(import_optional("PIL.ImageOps").exif_transpose(opened))
        image = image.convert("L" if grey else "RGB")
        if img_size is not None:
            image = halve_and_crop(image, img_size)
        pixels = np.asarray(image)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


@contextmanager
def _open(file: Path, argument: str) -> Iterator[Any]:
    pil_image = import_optional("PIL.Image")
    try:
        with pil_image.open(file) as image:
            yield image
    except Exception as error:  # Pillow's readers let OSError, SyntaxError, ValueError and more through
        raise UserError(
            f"{argument}: {str(file)!r} cannot be read as an image ({type(error).__name__}: {error}). "
            "Mend or remove the file."
        ) from error


def flatten(image: Any) -> Any:
    """The image without transparency (white behind it) and with 8 bits per channel."""
    pil_image = import_optional("PIL.Image")
    if image.mode in _DEEP_MODES:
        # Pillow's own conversion cuts 16 bits off at 255 instead of scaling them.
        return pil_image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pil_image.new("RGBA", image.size, (255, 255, 255, 255))
        return pil_image.alpha_composite(white, image)
    return image

"""Encoded images to pixels of one size, and the shards of a set of pixels."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from scalelong_fast.data.crop import CropRule
from scalelong_fast.data.decode import flatten
from scalelong_fast.data.optional import import_optional
from scalelong_fast.data.packed.format import Field
from scalelong_fast.data.prepare.source import Source, UnreadableError
from scalelong_fast.errors import UserError


class PixelReader:
    """Decodes and crops images of a source in threads (Pillow lets go of the interpreter lock while it works).

    Args:
        source: the images.
        rule: how they are cropped.
        size: side in pixels.
        channels: 1 (grey) or 3 (RGB).
        workers: threads.
        skip_unreadable: leave out images that cannot be decoded.
    """

    def __init__(
        self, source: Source, rule: CropRule, size: int, channels: int, workers: int, skip_unreadable: bool = False
    ):
        self.source, self.rule, self.size, self.channels = source, rule, size, channels
        self.skip_unreadable = skip_unreadable
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def facts(self) -> dict[str, Any]:
        """What the pixels follow from, besides the source."""
        features = import_optional("PIL.features")
        return {
            "size": self.size,
            "channels": self.channels,
            "crop": {"name": self.rule.name, "rule": self.rule.description},
            "versions": {
                "pillow": import_optional("PIL").__version__,
                "libjpeg_turbo": features.version("libjpeg_turbo"),
                "zlib": features.version("zlib"),
                "webp": features.version("webp"),
            },
        }

    def read(self, samples: range, tick: Callable[[int], None]) -> tuple[np.ndarray, list[int]]:
        """Pixels of those ``samples`` that can be decoded, and which these are; ``tick(1)`` is called for each image.

        Returns:
            uint8 ``(n, C, S, S)``, and n of the ``samples``.

        Raises:
            UserError: images cannot be decoded and are not to be skipped; all are counted and the first are named.
            OSError: the source cannot be read.
        """
        images = np.empty((len(samples), self.channels, self.size, self.size), np.uint8)

        def fill(row: int) -> str | None:
            try:
                images[row] = self._decode(samples[row])
            except UnreadableError as error:
                return str(error)
            return None

        faults = {}
        for row, fault in enumerate(self._pool.map(fill, range(len(samples)))):
            tick(1)
            if fault is not None:
                faults[row] = fault
        if not faults:
            return images, list(samples)
        if not self.skip_unreadable:
            raise _unreadable(self.source, [(self.source.names[samples[row]], why) for row, why in faults.items()])
        rows = [row for row in range(len(samples)) if row not in faults]
        return images[rows], [samples[row] for row in rows]

    def skipped(self, samples: range, kept: Sequence[int]) -> list[str]:
        """Names of those of ``samples`` that are not among ``kept``.

        Raises:
            UserError: all of them were left out: more is wrong than single images.
        """
        if not kept:
            first, last = (self.source.names[index] for index in (samples[0], samples[-1]))
            raise UserError(
                f"--source: none of the {len(samples)} images from {first!r} to {last!r} can be read, so more is wrong "
                "with the source than --skip-unreadable is for. Look at these files."
            )
        return [self.source.names[index] for index in sorted(set(samples) - set(kept))]

    def _decode(self, index: int) -> np.ndarray:
        try:
            with import_optional("PIL.Image").open(io.BytesIO(self.source.read(index))) as opened:
                image = import_optional("PIL.ImageOps").exif_transpose(opened) if self.rule.upright else opened
                image = flatten(image).convert("L" if self.channels == 1 else "RGB")
                pixels = np.asarray(self.rule.apply(image, self.size))
        except UserError:
            raise
        except Exception as error:  # Pillow's readers let OSError, SyntaxError, ValueError and more through
            if isinstance(error, OSError) and error.errno:  # of the operating system: it is not this image's fault
                raise OSError(error.errno, error.strerror, self.source.names[index]) from error
            reason = str(error).partition(" <_io")[0]  # Pillow would name the buffer
            raise UnreadableError(f"{type(error).__name__}: {reason}") from error
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)


def _unreadable(source: Source, faults: list[tuple[str, str]]) -> UserError:
    """The error for images that cannot be decoded: the name of each, and why."""
    (first, reason), *others = faults
    listed = ", ".join([repr(name) for name, _ in others[:20]] + ["…"] * (len(others) > 20))
    more = f", nor can {len(others)} more ({listed})" if others else ""
    them = "them" if others else "it"
    # Of a table it is not known which rows a change touches.
    mend = "" if source.marks is None else f", or mend or remove {them}"
    return UserError(
        f"--source: {first!r} cannot be read as an image ({reason}){more}. Everything packed so far is kept. Leave "
        f"{them} out with --skip-unreadable{mend}, and run the same command again to go on."
    )


class PixelPacker:
    """Shards of pixels, with labels where the source has some.

    Attributes:
        fields: of a packed set.
        latent_scale: 1.
        null_text: None.
    """

    latent_scale = 1.0
    null_text = None

    def __init__(self, reader: PixelReader):
        self.reader, self.source = reader, reader.source
        self.fields = {"images": Field("uint8", (reader.channels, reader.size, reader.size))}
        if self.source.labels is not None:
            self.fields["labels"] = Field("int64", ())

    def facts(self) -> dict[str, Any]:
        """What the bytes follow from, besides the source."""
        return self.reader.facts()

    def sample_bytes(self) -> int:
        """Size of a sample in bytes."""
        return sum(field.row_bytes for field in self.fields.values())

    def pack(self, samples: range, tick: Callable[[int], None]) -> tuple[dict[str, np.ndarray], list[str]]:
        """The rows of each field for these samples, and the names of those that were left out."""
        images, kept = self.reader.read(samples, tick)
        arrays = {"images": images}
        if self.source.labels is not None:
            arrays["labels"] = self.source.labels[kept]
        return arrays, self.reader.skipped(samples, kept)

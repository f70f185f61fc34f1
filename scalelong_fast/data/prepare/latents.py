"""Shards of latents and text features."""

from collections.abc import Callable
from typing import Any

import numpy as np

from scalelong_fast.data.packed.format import Field
from scalelong_fast.data.prepare.encoders import ImageEncoder, TextEncoder
from scalelong_fast.data.prepare.pixels import PixelReader
from scalelong_fast.errors import invalid

#: Captions encoded at once for each image encoded at once.
_CAPTIONS = 5


class LatentPacker:
    """Shards of moments of a latent, text features of every caption, and how many captions each image has.

    The batches that go through the networks begin anew with each shard, so that a shard does not depend on where a
    preparation was interrupted.

    Args:
        reader: the pixels; RGB.
        images: the autoencoder.
        text: the text encoder.
        batch_size: images encoded at once.

    Attributes:
        fields: of a packed set.
        latent_scale: the autoencoder's.
        null_text: uint16 ``(L, D)``, features of the empty caption.

    Raises:
        UserError: a size that the autoencoder cannot halve often enough.
    """

    def __init__(self, reader: PixelReader, images: ImageEncoder, text: TextEncoder, batch_size: int):
        self.reader, self.images, self.text, self.batch_size = reader, images, text, batch_size
        assert reader.source.captions is not None
        self.captions = reader.source.captions
        if reader.size % images.factor:
            raise invalid(
                "--size", reader.size, f"a multiple of {images.factor}, by which the autoencoder shrinks images"
            )
        side = reader.size // images.factor
        self.fields = {
            "moments": Field("bfloat16", (images.channels, side, side)),
            "captions": Field("int32", ()),
            "text": Field("bfloat16", (text.length, text.dim)),
        }
        self.latent_scale = images.scale
        self.null_text = text.encode([""])[0]

    def facts(self) -> dict[str, Any]:
        """What the bytes follow from, besides the source."""
        import torch

        facts = self.reader.facts()
        facts["versions"]["torch"] = torch.__version__
        return {
            **facts,
            "autoencoder": self.images.facts(),
            "text_encoder": self.text.facts(),
            "batch_size": self.batch_size,
            "device": self.images.device.type,
        }

    def sample_bytes(self) -> int:
        """Mean size of a sample in bytes."""
        each = sum(map(len, self.captions)) / len(self.captions)
        return int(self.fields["moments"].row_bytes + 4 + each * self.fields["text"].row_bytes)

    def pack(self, samples: range, tick: Callable[[int], None]) -> tuple[dict[str, np.ndarray], list[str]]:
        """The rows of each field for these samples, and the names of those that were left out."""
        moments: list[np.ndarray] = []
        kept: list[int] = []
        for start in range(samples.start, samples.stop, self.batch_size):
            part = range(start, min(start + self.batch_size, samples.stop))
            pixels, readable = self.reader.read(part, tick)
            if readable:
                moments.append(self.images.encode(pixels))
                kept += readable
        skipped = self.reader.skipped(samples, kept)
        captions = [self.captions[index] for index in kept]
        every = [caption for listed in captions for caption in listed]
        size = self.batch_size * _CAPTIONS
        text = [self.text.encode(every[start : start + size]) for start in range(0, len(every), size)]
        return {
            "moments": np.concatenate(moments),
            "captions": np.array([len(listed) for listed in captions], np.int32),
            "text": np.concatenate(text),
        }, skipped

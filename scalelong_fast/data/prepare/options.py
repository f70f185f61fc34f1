"""What ``scalelong-fast prepare`` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scalelong_fast.data.crop import CROPS
from scalelong_fast.data.prepare.recipes import Recipe
from scalelong_fast.errors import check_range, invalid, unknown_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PrepareOptions:
    """Pack a data set into memory-mapped shards; the same command run again goes on where it was interrupted."""

    source: str | None = None
    """Folder, archive, table, or OWNER/NAME on the Hugging Face hub; default: the data set's own place on the hub."""
    captions: Path | None = None
    """coco256: COCO's annotations, e.g. captions_train2014.json; not needed for a table with a column of captions."""
    split: str | None = None
    """Split of a table that has several; default: train."""
    revision: str | None = None
    """Revision of a data set on the hub; default: the newest, or that which OUT was begun with. The manifest says which
    it was."""
    size: int | None = None
    """Side of the packed images in pixels; default: the data set's; folder needs it."""
    crop: str | None = None
    """adm, celeba, lanczos or upright; default: what the data set's published results were computed with."""
    channels: int = 3
    """3 (RGB) or 1 (grey)."""
    limit: int | None = None
    """Pack only so many images, spread over the whole source: for a try."""
    allow_partial: bool = False
    """Take a source with another number of images than the published data set has."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and name them in the manifest; default: stop at the first such shard."""
    workers: int | None = None
    """Threads that decode; default: one for each core, 32 at most."""
    shard_mib: int = 512
    """Size of a shard in MiB: what an interrupted preparation has to do again at most."""
    batch_size: int = 32
    """coco256: images that go through the autoencoder at once."""
    autoencoder: str = "stabilityai/sd-vae-ft-ema"
    """coco256: AutoencoderKL of diffusers, on the hub or in a local folder."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """coco256: CLIP of transformers, on the hub or in a local folder."""
    device: str = "auto"
    """coco256: where the encoders compute: auto, cpu, cuda, ..."""
    verify: bool = False
    """Read everything back that was packed before, and compare checksums: damaged shards are made again. Without
    --source a finished set is only checked."""

    def __post_init__(self) -> None:
        for name, value in (("batch-size", self.batch_size), ("shard-mib", self.shard_mib)):
            check_range(f"--{name}", value, low=1, integer=True)
        for name, number in (("size", self.size), ("limit", self.limit), ("workers", self.workers)):
            if number is not None:
                check_range(f"--{name}", number, low=1, integer=True)
        if self.channels not in (1, 3):
            raise invalid("--channels", self.channels, "1 (grey) or 3 (RGB)")
        if self.crop is not None and self.crop not in CROPS:
            raise unknown_name("--crop", self.crop, CROPS)


@dataclass(frozen=True)
class Request:
    """What to prepare.

    Attributes:
        recipe: of the data set.
        out: the folder.
        device: what ``options.device`` stands for.
        options: the rest.
    """

    recipe: Recipe
    out: Path
    device: "torch.device"
    options: PrepareOptions

    def __post_init__(self) -> None:
        recipe, options = self.recipe, self.options
        if options.size is None and recipe.size is None:
            raise invalid("--size", None, "the side of the packed images in pixels", "Give it, e.g. --size 64.")
        if recipe.condition == "captions" and options.channels != 3:
            raise invalid("--channels", options.channels, "3, since the autoencoder takes RGB images")
        if options.captions is not None and recipe.condition != "captions":
            raise invalid("--captions", str(options.captions), f"none for {recipe.name}", "Use coco256.")

    @property
    def size(self) -> int:
        """Side of the packed images in pixels."""
        size = self.options.size if self.options.size is not None else self.recipe.size
        assert size is not None
        return size

    @property
    def split(self) -> str:
        """The split asked for."""
        return self.options.split or self.recipe.split

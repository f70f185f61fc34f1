"""What is known of each published data set: where it lies, its size, its crop, and what it conditions on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """Defaults of ``scalelong-fast prepare NAME``.

    Attributes:
        name: of the data set.
        description: one line for the command's help.
        hub: name on the Hugging Face hub; None: a source must be given.
        size: side of the square images in pixels; None: must be given.
        crop: rule of :data:`scalelong_fast.data.crop.CROPS`.
        condition: what a sample has besides its image; ``found``: labels if the source has some.
        split: of a table with several.
        parts: where each split lies among the images of the whole set, sorted by name: for folders and archives that
            hold all of it.
        counts: images of each split as published.
    """

    name: str
    description: str
    hub: str | None
    size: int | None
    crop: str
    condition: Literal["labels", "captions", "none", "found"]
    split: str = "train"
    parts: Mapping[str, range] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


#: list_eval_partition.txt, which comes with CelebA.
_CELEBA = {"train": range(162_770), "valid": range(162_770, 182_637), "test": range(182_637, 202_599)}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "cifar10",
            "CIFAR-10, 50,000 images of 32x32, 10 classes",
            "uoft-cs/cifar10",
            32,
            "adm",
            "labels",
            counts={"train": 50_000, "test": 10_000},
        ),
        Recipe(
            "celeba64",
            "CelebA, 162,770 faces at 64x64, no labels",
            "flwrlabs/celeba",
            64,
            "celeba",
            "none",
            parts=_CELEBA,
            counts={split: len(part) for split, part in _CELEBA.items()},
        ),
        Recipe(
            "imagenet64",
            "ImageNet-1k, 1,281,167 images at 64x64, 1,000 classes",
            "ILSVRC/imagenet-1k",
            64,
            "adm",
            "labels",
            counts={"train": 1_281_167, "validation": 50_000, "test": 100_000},
        ),
        Recipe(
            "coco256",
            "MS-COCO 2014, 82,783 images at 256x256 as latents, 5 captions each as text features",
            None,
            256,
            "lanczos",
            "captions",
        ),
        Recipe("folder", "any folder, archive or table of images", None, None, "upright", "found"),
    )
}

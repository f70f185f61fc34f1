"""Training images: loading them, shuffling them, and moving between bytes and the model's range."""

from scalelong_fast.data.images import ImageDataset, to_uint8, to_unit_range
from scalelong_fast.data.order import ShuffledOrder
from scalelong_fast.data.sources import list_datasets, load_images

__all__ = [
    "ImageDataset",
    "ShuffledOrder",
    "list_datasets",
    "load_images",
    "to_uint8",
    "to_unit_range",
]

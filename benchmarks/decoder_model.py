"""A model of the time that a UNet's decoder concats take: bytes over the bandwidth of one GPU.

The chain is LS's pooling of the skip, κ ⊙ skip, concat, GroupNorm and SiLU under bf16 autocast, and its gradients,
joined with that of the raw concat, which a 1×1 shortcut reads; convolutions excluded. Bytes per pixel, with C the
channels of the concat and C2 those of the skip:

- eager, forward: cat 4C; cast to float32 6C; GroupNorm reads twice and writes, 12C; SiLU 8C; cast to bf16 6C; pooling
  2C2 and product 4C2. Backward: two casts 12C, SiLU 12C, GroupNorm 8C + 12C, joining with the shortcut's gradient 6C;
  of κ, the skip and the pooling 20C2.
- compiled, at best: a pass for the statistics 2C, one that writes concat and norm 6C, the pooling 2C2. Backward 18C +
  8C2.
- fused: :mod:`benchmarks.floors`. The encoder's norm has pooled the skip already.
"""

from benchmarks.floors import total_bytes
from benchmarks.op_cases import Case
from benchmarks.unet_skips import UNET_BATCH

#: Bytes a second: a device-to-device copy on an H200, reads and writes counted.
BANDWIDTH = 4.3e12

RECIPES = ("eager", "compile", "fused")

#: Bytes per pixel as multiples of (C, C2), by recipe and direction.
_PER_PIXEL = {
    ("eager", "fwd"): (36, 6),
    ("eager", "bwd"): (50, 20),
    ("compile", "fwd"): (8, 2),
    ("compile", "bwd"): (18, 8),
}


def modelled_bytes(case: Case, recipe: str, direction: str) -> int:
    """Bytes that a recipe moves.

    Args:
        case: one concat, of those that :func:`benchmarks.op_cases.decoder_cases` gives.
        recipe: of :data:`RECIPES`.
        direction: fwd, bwd or fwd_bwd.
    """
    if direction == "fwd_bwd":
        return modelled_bytes(case, recipe, "fwd") + modelled_bytes(case, recipe, "bwd")
    if recipe == "fused":
        return total_bytes(case, direction)
    batch, channels_x, channels_skip, height, width = case.shape
    of_all, of_skip = _PER_PIXEL[recipe, direction]
    return batch * height * width * (of_all * (channels_x + channels_skip) + of_skip * channels_skip)


def is_modelled(label: str) -> bool:
    """Whether a label of :func:`benchmarks.op_cases.decoder_cases` names one of the presets."""
    return label.split(",")[0] in UNET_BATCH

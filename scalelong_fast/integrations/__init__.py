"""Other people's weights and networks."""

from scalelong_fast.integrations.checkpoints import load_unet_checkpoint, load_uvit_checkpoint
from scalelong_fast.integrations.diffusers_unets import from_diffusers, to_diffusers
from scalelong_fast.integrations.patching import (
    Adapter,
    Finding,
    Site,
    apply_scalelong,
    load_scalelong,
    register_adapter,
    remove_scalelong,
    save_scalelong,
    scalelong_report,
)
from scalelong_fast.integrations.skip_concat import SkipConcat

__all__ = [
    "Adapter",
    "Finding",
    "Site",
    "SkipConcat",
    "apply_scalelong",
    "from_diffusers",
    "load_scalelong",
    "load_unet_checkpoint",
    "load_uvit_checkpoint",
    "register_adapter",
    "remove_scalelong",
    "save_scalelong",
    "scalelong_report",
    "to_diffusers",
]

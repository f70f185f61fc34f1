"""Other people's weights and networks."""

from scalelong_fast.integrations.checkpoints import load_unet_checkpoint, load_uvit_checkpoint

__all__ = ["load_unet_checkpoint", "load_uvit_checkpoint"]

"""A tiny U-ViT and a tiny UNet configuration of each kind, and inputs for them."""

import pytest
import torch

from scalelong_fast.models import UNetConfig, UViTConfig

KINDS = {
    "unconditional": {},
    "class": {"num_classes": 7},
    "text": {"clip_dim": 12, "num_clip_token": 5},
}


@pytest.fixture
def tiny():
    """``tiny(kind, **overrides)``: a config of two long skips, 8×8 images and 16 patches."""

    def make(kind="unconditional", **overrides):
        sizes = {"img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 32, "depth": 4, "num_heads": 4}
        return UViTConfig(**(sizes | {"reduction": 4} | KINDS[kind] | overrides))

    return make


@pytest.fixture
def tiny_unet():
    """``tiny_unet(kind, **overrides)``: a config of four long skips, 8×8 images and attention at 4×4."""

    def make(kind="unconditional", **overrides):
        sizes = {"img_size": 8, "in_chans": 3, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
        sizes |= {"attention_resolutions": (4,), "num_heads": 2, "num_groups": 4, "reduction": 4}
        return UNetConfig(**(sizes | KINDS[kind] | overrides))

    return make


@pytest.fixture
def randomised():
    """``randomised(model)``: the model with weights large enough that every part of it shows in the output."""

    def randomise(model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return model

    return randomise


@pytest.fixture
def batch_for():
    """``batch_for(config, size)``: images, times and the condition (or None)."""

    def make(config, size=3):
        x = torch.randn(size, config.in_chans, config.img_size, config.img_size)
        timesteps = torch.linspace(0.5, 999, size)
        y = None
        if config.clip_dim > 0:
            y = torch.randn(size, config.num_clip_token, config.clip_dim)
        elif config.num_classes > 0:
            y = torch.arange(size) % config.num_classes
        return x, timesteps, y

    return make

"""Backbones and their presets."""

from scalelong_fast.models.config import UViTConfig
from scalelong_fast.models.registry import (
    MODELS,
    ModelConfig,
    ModelSummary,
    build_model,
    create_model,
    list_models,
    model_config,
    summarize,
)
from scalelong_fast.models.unet import UNet
from scalelong_fast.models.unet_config import UNetConfig
from scalelong_fast.models.uvit import UViT

__all__ = [
    "MODELS",
    "ModelConfig",
    "ModelSummary",
    "UNet",
    "UNetConfig",
    "UViT",
    "UViTConfig",
    "build_model",
    "create_model",
    "list_models",
    "model_config",
    "summarize",
]

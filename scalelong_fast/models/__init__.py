"""Backbones and their presets."""

from scalelong_fast.models.config import UViTConfig
from scalelong_fast.models.registry import ModelSummary, create_model, list_models, model_config, summarize
from scalelong_fast.models.uvit import UViT

__all__ = ["ModelSummary", "UViT", "UViTConfig", "create_model", "list_models", "model_config", "summarize"]

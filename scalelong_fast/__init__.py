"""Diffusion models with scaled long skip connections (ScaleLong, NeurIPS 2023), fast."""

from scalelong_fast.models import create_model, list_models
from scalelong_fast.version import __version__

__all__ = ["__version__", "create_model", "list_models"]

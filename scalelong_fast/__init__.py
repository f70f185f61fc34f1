"""Diffusion models with scaled long skip connections (ScaleLong, NeurIPS 2023), fast."""

from scalelong_fast.integrations.patching import (
    apply_scalelong,
    load_scalelong,
    remove_scalelong,
    save_scalelong,
    scalelong_report,
)
from scalelong_fast.models import create_model, list_models
from scalelong_fast.version import __version__

__all__ = [
    "__version__",
    "apply_scalelong",
    "create_model",
    "list_models",
    "load_scalelong",
    "remove_scalelong",
    "save_scalelong",
    "scalelong_report",
]

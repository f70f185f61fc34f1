"""Model presets by name."""

import fnmatch
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from scalelong_fast.errors import unknown_name
from scalelong_fast.models.config import UViTConfig
from scalelong_fast.models.uvit import UViT

_S2 = UViTConfig(img_size=32, patch_size=2, in_chans=3, embed_dim=512, depth=12, num_heads=8)
_T2I_S2 = replace(_S2, in_chans=4, clip_dim=768, num_clip_token=77)

#: Presets: the configurations published with U-ViT (and used by ScaleLong), and a small one for digits.
PRESETS: dict[str, UViTConfig] = {
    "uvit_s2": _S2,
    "uvit_s2_deep": replace(_S2, depth=16),
    "uvit_s4_celeba64": replace(_S2, img_size=64, patch_size=4),
    "uvit_m4": replace(_S2, img_size=64, patch_size=4, embed_dim=768, depth=16, num_heads=12, num_classes=1000),
    "uvit_l4": replace(_S2, img_size=64, patch_size=4, embed_dim=1024, depth=20, num_heads=16, num_classes=1000),
    "uvit_h2": replace(_S2, in_chans=4, embed_dim=1152, depth=28, num_heads=16, num_classes=1001, conv=False),
    "uvit_t2i_s2": _T2I_S2,
    "uvit_t2i_s2_deep": replace(_T2I_S2, depth=16),
    "uvit_digits": UViTConfig(
        img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4, num_heads=4, num_classes=11, reduction=4
    ),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the presets that match a shell-style pattern, e.g. ``list_models("uvit*")``."""
    return [name for name in PRESETS if fnmatch.fnmatch(name, pattern)]


def model_config(name: str, **overrides: Any) -> UViTConfig:
    """The preset ``name`` with some fields replaced.

    Raises:
        UserError: unknown preset or field (nearest names offered), or values that do not fit together.
    """
    if name not in PRESETS:
        raise unknown_name("model", name, PRESETS)
    known = [field.name for field in fields(UViTConfig)]
    for key in overrides:
        if key not in known:
            raise unknown_name("model override", key, known)
    return replace(PRESETS[name], **overrides)


def create_model(name: str, scaling: str | None = None, kappa: float | None = None, **overrides: Any) -> UViT:
    """Build a model from a preset.

    Args:
        name: a preset, see :func:`list_models`.
        scaling: coefficients of the long skips: ``none``, ``uniform``, ``cs``, ``cs-reversed``, ``ls``,
            ``ls-individual`` or ``learnable``; None keeps the preset's (LS).
        kappa: κ > 0 of the constant scalings, start of the learnable one.
        **overrides: any field of :class:`UViTConfig`, e.g. ``img_size``, ``depth``, ``use_checkpoint``, ``reduction``.

    Returns:
        A freshly initialised :class:`UViT`, on the current default device (``with torch.device("meta")`` works).

    Raises:
        UserError: unknown preset, scaling or field (nearest names offered), or values that do not fit together.

    Example:
        >>> model = create_model("uvit_s2", scaling="cs", kappa=0.7)
        >>> model(torch.randn(2, 3, 32, 32), torch.tensor([0.0, 999.0])).shape
        torch.Size([2, 3, 32, 32])
    """
    if scaling is not None:
        overrides["scaling"] = scaling
    if kappa is not None:
        overrides["kappa"] = kappa
    return UViT(model_config(name, **overrides))


@dataclass(frozen=True)
class ModelSummary:
    """What ``scalelong-fast models`` prints of a preset."""

    name: str
    parameters: int
    skips: int
    tokens: int
    input_shape: tuple[int, int, int]
    condition: str


def summarize(name: str) -> ModelSummary:
    """Count parameters, long skips and tokens of a preset, without allocating it."""
    with torch.device("meta"):
        model = create_model(name)
    config = model.config
    condition = "text" if config.clip_dim else f"{config.num_classes} labels" if config.num_classes > 0 else "none"
    parameters = sum(p.numel() for p in model.parameters())
    return ModelSummary(name, parameters, config.num_skips, config.num_tokens, model.input_shape, condition)

"""Model presets by name."""

import fnmatch
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from scalelong_fast.errors import unknown_name
from scalelong_fast.models.config import UViTConfig
from scalelong_fast.models.unet import UNet
from scalelong_fast.models.unet_config import UNetConfig
from scalelong_fast.models.uvit import UViT

ModelConfig = UViTConfig | UNetConfig

#: Backbones by the class of their hyperparameters.
MODELS: dict[type[ModelConfig], type[UViT] | type[UNet]] = {UViTConfig: UViT, UNetConfig: UNet}

_S2 = UViTConfig(img_size=32, patch_size=2, in_chans=3, embed_dim=512, depth=12, num_heads=8)
_T2I_S2 = replace(_S2, in_chans=4, clip_dim=768, num_clip_token=77)

_IMAGENET64 = UNetConfig(
    img_size=64, channel_mult=(1, 2, 3, 4), attention_resolutions=(16, 8), use_scale_shift_norm=True, num_classes=1000
)

#: Presets: the configurations published with U-ViT and with DDPM, IDDPM, ADM and LDM (and used by ScaleLong), and a
#: small one of each kind for digits.
PRESETS: dict[str, ModelConfig] = {
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
    "unet_cifar10": UNetConfig(img_size=32, model_channels=128, dropout=0.1),
    "unet_imagenet64": replace(_IMAGENET64, model_channels=160, num_heads=4),
    "unet_imagenet64_large": replace(
        _IMAGENET64,
        model_channels=192,
        num_res_blocks=3,
        attention_resolutions=(32, 16, 8),
        num_head_channels=64,
        use_new_attention_order=True,
        resblock_updown=True,
        dropout=0.1,
    ),
    "unet_coco": UNetConfig(
        img_size=32, in_chans=4, model_channels=128, attention_resolutions=(16, 8), num_heads=8, clip_dim=768
    ),
    "unet_digits": UNetConfig(
        img_size=8,
        in_chans=1,
        model_channels=32,
        channel_mult=(1, 2),
        attention_resolutions=(4,),
        num_heads=4,
        num_groups=8,
        num_classes=11,
        reduction=4,
    ),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the presets that match a shell-style pattern, e.g. ``list_models("uvit*")``."""
    return [name for name in PRESETS if fnmatch.fnmatch(name, pattern)]


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The preset ``name`` with some fields replaced.

    Raises:
        UserError: unknown preset or field (nearest names offered), or values that do not fit together.
    """
    if name not in PRESETS:
        raise unknown_name("model", name, PRESETS)
    known = [field.name for field in fields(PRESETS[name])]
    for key in overrides:
        if key not in known:
            raise unknown_name("model override", key, known)
    return replace(PRESETS[name], **overrides)


def create_model(name: str, scaling: str | None = None, kappa: float | None = None, **overrides: Any) -> UViT | UNet:
    """Build a model from a preset.

    Args:
        name: a preset, see :func:`list_models`.
        scaling: coefficients of the long skips: ``none``, ``uniform``, ``cs``, ``cs-reversed``, ``ls``,
            ``ls-individual`` or ``learnable``; None keeps the preset's (LS).
        kappa: κ > 0 of the constant scalings, start of the learnable one.
        **overrides: any field of :class:`UViTConfig` or, for a UNet, :class:`UNetConfig`, e.g. ``img_size``, ``depth``,
            ``model_channels``, ``use_checkpoint``, ``reduction``, ``calibration``, ``block_scaling``.

    Returns:
        A freshly initialised :class:`UViT` or :class:`UNet`, on the current default device (``with
        torch.device("meta")`` works).

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
    return build_model(model_config(name, **overrides))


def build_model(config: ModelConfig) -> UViT | UNet:
    """A freshly initialised model with these hyperparameters."""
    return MODELS[type(config)](config)


@dataclass(frozen=True)
class ModelSummary:
    """What ``scalelong-fast models`` prints of a preset; ``tokens`` is None for a UNet."""

    name: str
    parameters: int
    skips: int
    tokens: int | None
    input_shape: tuple[int, int, int]
    condition: str


def summarize(name: str) -> ModelSummary:
    """Count parameters, long skips and tokens of a preset, without allocating it."""
    with torch.device("meta"):
        model = create_model(name)
    config = model.config
    condition = "text" if config.clip_dim else f"{config.num_classes} labels" if config.num_classes > 0 else "none"
    parameters = sum(p.numel() for p in model.parameters())
    tokens = config.num_tokens if isinstance(config, UViTConfig) else None
    return ModelSummary(name, parameters, config.num_skips, tokens, model.input_shape, condition)

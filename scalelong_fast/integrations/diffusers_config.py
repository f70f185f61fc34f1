"""Hyperparameters of our UNet in the words of diffusers, and back."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.models import UNetConfig

#: How blocks of diffusers resize, by class; None: as ``downsample_type`` and ``upsample_type`` say. Text-conditional
#: blocks with attention know convolutions only.
_PLAIN = {
    **{"DownBlock2D": "conv", "UpBlock2D": "conv"},
    **{"ResnetDownsampleBlock2D": "resnet", "ResnetUpsampleBlock2D": "resnet"},
}
_ATTENDING = {
    False: {"AttnDownBlock2D": None, "AttnUpBlock2D": None},
    True: {"CrossAttnDownBlock2D": "conv", "CrossAttnUpBlock2D": "conv"},
}

#: Options that are called and mean the same in both.
_SAME = ("norm_eps", "freq_shift", "downsample_padding")

#: Options that are looked at, or that have no influence on the function.
_READ = {
    *("sample_size", "in_channels", "out_channels", "flip_sin_to_cos", "down_block_types", "up_block_types"),
    *("block_out_channels", "layers_per_block", "downsample_type", "upsample_type", "dropout", "act_fn"),
    *("attention_head_dim", "num_attention_heads", "norm_num_groups", "attn_norm_num_groups", "time_embedding_dim"),
    *("resnet_time_scale_shift", "cross_attention_dim", "transformer_layers_per_block", "use_linear_projection"),
    *("upcast_attention", "num_train_timesteps", "norm_eps", "freq_shift", "downsample_padding"),
}


def _same(name: str, value: Any, expected: str = "the same number at every level") -> Any:
    """The one value of an option that may be given for every level."""
    values = list(value) if isinstance(value, Sequence) else [value]
    if any(other != values[0] for other in values):
        raise invalid(name, value, expected)
    return values[0]


def _check_defaults(cls: type, config: Mapping[str, Any], read: set[str]) -> None:
    """Raise where an option that is not read has another value than its default, which is what our UNet does."""
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name in read or name not in config or parameter.default is parameter.empty:
            continue
        value, default = config[name], parameter.default
        value, default = (tuple(v) if isinstance(v, list) else v for v in (value, default))
        if value != default:
            raise invalid(
                name, value, repr(default), f"Our UNet has no such option, which this {cls.__name__} was built with."
            )


def _levels(config: Mapping[str, Any], text: bool) -> tuple[list[bool], bool]:
    """Which levels attend, outermost first, and whether residual blocks resize.

    Raises:
        UserError: blocks of another kind, or an encoder and a decoder that differ.
    """
    kinds = _PLAIN | _ATTENDING[text]
    attends: dict[str, list[bool]] = {}
    resizing: set[str | None] = set()
    for side, option in (("down", "downsample_type"), ("up", "upsample_type")):
        field = f"{side}_block_types"
        types = list(config[field])
        for name in types:
            if name not in kinds or side.title() not in name:
                known = ", ".join(sorted(kind for kind in kinds if side.title() in kind))
                raise invalid(field, types, f"blocks of the classes {known}")
        attends[side] = [name in _ATTENDING[text] for name in types]
        # The innermost block of the encoder and the outermost of the decoder do not resize.
        resizing |= {kinds[name] or config.get(option) for name in types[:-1]}
    if attends["down"] != attends["up"][::-1]:
        raise invalid(
            "up_block_types",
            list(config["up_block_types"]),
            "attention at the levels where down_block_types has it",
        )
    if not resizing <= {"conv", "resnet"} or len(resizing) > 1:
        raise invalid(
            "down_block_types, up_block_types, downsample_type, upsample_type",
            sorted(str(kind) for kind in resizing),
            "convolutions that resize (conv), or residual blocks that do (resnet), everywhere",
        )
    return attends["down"], resizing == {"resnet"}


def _heads(config: Mapping[str, Any], text: bool, attends: Sequence[bool], widths: Sequence[int]) -> dict[str, int]:
    """``num_heads`` or ``num_head_channels``, of the levels that attend and of the middle."""
    given = config["attention_head_dim"]
    if not text:  # the width of a head, None: one head
        return {"num_heads": 1} if given is None else {"num_head_channels": given}
    given = config.get("num_attention_heads") or given  # their number, whatever the option is called
    per_level = list(given) if isinstance(given, Sequence) else [given] * len(widths)
    attending = [(w, n) for w, n, attended in zip(widths, per_level, attends, strict=True) if attended]
    attending.append((widths[-1], per_level[-1]))
    if len({heads for _, heads in attending}) == 1:
        return {"num_heads": per_level[-1]}
    sizes = {width // heads for width, heads in attending}
    if len(sizes) > 1:
        raise invalid("attention_head_dim", given, "as many heads, or heads as wide, at every level")
    return {"num_head_channels": sizes.pop()}


def unet_arguments(cls: type, config: Mapping[str, Any], text: bool, img_size: int | None = None) -> dict[str, Any]:
    """Hyperparameters of the :class:`UNetConfig` that describes a UNet of diffusers.

    Args:
        cls, config: its class and config.
        text: whether it is text-conditional.
        img_size: where its ``sample_size`` is not what is wanted.

    Raises:
        UserError: an option that our UNet has not; the message names it.
    """
    _check_defaults(cls, config, _READ if text else _READ | {"num_class_embeds"})
    widths = [int(width) for width in config["block_out_channels"]]
    attends, resblock_updown = _levels(config, text)
    size = img_size or config["sample_size"]
    if size is None:
        raise invalid("sample_size", None, "the side of the images in pixels", "Pass img_size=… beside the model.")
    size = _same("sample_size", size, "a square: one number")
    channels, out_channels = config["in_channels"], config["out_channels"]
    if out_channels not in (channels, 2 * channels):
        raise invalid("out_channels", out_channels, f"in_channels = {channels}, or twice as many")
    if config["act_fn"] not in ("silu", "swish"):
        raise invalid("act_fn", config["act_fn"], "'silu'")
    if config["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise invalid("time_embedding_dim", config["time_embedding_dim"], f"None or {4 * widths[0]}")
    uneven = [width for width in widths if width % widths[0]]
    if uneven:
        raise invalid("block_out_channels", tuple(widths), f"multiples of the first, {widths[0]}")
    groups, shift = config["norm_num_groups"], config["resnet_time_scale_shift"]
    if groups is None:
        raise invalid("norm_num_groups", None, "a number")
    if shift not in ("default", "scale_shift"):
        raise invalid("resnet_time_scale_shift", shift, "'default' or 'scale_shift'")
    middle = config.get("attn_norm_num_groups")
    if not text and middle != groups and (middle is not None or shift == "scale_shift"):
        raise invalid("attn_norm_num_groups", middle, f"norm_num_groups = {groups}")
    arguments = {
        "img_size": size,
        "in_chans": channels,
        "model_channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": _same("layers_per_block", config["layers_per_block"]),
        "attention_resolutions": tuple(size >> level for level, attended in enumerate(attends) if attended),
        "use_scale_shift_norm": shift == "scale_shift",
        "resblock_updown": resblock_updown,
        "num_groups": groups,
        **{name: config[name] for name in _SAME},
        "dropout": config["dropout"],
        "learn_sigma": out_channels == 2 * channels,
        **_heads(config, text, attends, widths),
    }
    if text:
        depths = _depths(config, attends)
        arguments["transformer_depth"] = _same("transformer_layers_per_block", depths)
        arguments["clip_dim"] = _same("cross_attention_dim", config["cross_attention_dim"])
    elif config["num_class_embeds"] is not None:
        arguments["num_classes"] = config["num_class_embeds"]
    return arguments


def _depths(config: Mapping[str, Any], attends: Sequence[bool]) -> list[Any]:
    """Transformer blocks of each level that attends, and of the middle."""
    given = config["transformer_layers_per_block"]
    if not isinstance(given, Sequence):
        return [given]
    return [depth for depth, attended in zip(given, attends, strict=True) if attended] + [given[-1]]


def diffusers_arguments(config: UNetConfig) -> dict[str, Any]:
    """Arguments of the diffusers model that has these hyperparameters.

    Raises:
        UserError: a hyperparameter that diffusers cannot express; the message names it.
    """
    attends = [config.img_size >> level in config.attention_resolutions for level in range(len(config.channel_mult))]
    text, resnet = config.clip_dim > 0, config.resblock_updown
    if config.block_scaling != "none":
        raise invalid("block_scaling", config.block_scaling, "none", "diffusers does not scale residual branches.")
    if config.channel_mult[0] != 1:
        raise invalid("channel_mult", config.channel_mult, "1 at the first level", "diffusers' stem is as wide as it.")
    if text and resnet and any(attends) and len(attends) > 1:
        raise UserError(
            "resblock_updown: got True, which diffusers has no text-conditional blocks for at levels with attention. "
            "Set it to False, or attention_resolutions to ()."
        )
    plain, attending = ("ResnetDownsample" if resnet else "Down"), ("CrossAttnDown" if text else "AttnDown")
    down = [f"{attending if attended else plain}Block2D" for attended in attends]
    arguments: dict[str, Any] = {
        "sample_size": config.img_size,
        "in_channels": config.in_chans,
        "out_channels": config.in_chans * (2 if config.learn_sigma else 1),
        "down_block_types": tuple(down),
        "up_block_types": tuple(_mirror(name) for name in reversed(down)),
        "block_out_channels": config.level_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.num_groups,
        **{name: getattr(config, name) for name in _SAME},
        "dropout": config.dropout,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
    }
    if text:
        per_level = tuple(config.heads_of(width) for width in config.level_channels)
        return arguments | {
            "cross_attention_dim": config.clip_dim,
            "attention_head_dim": per_level if len(set(per_level)) > 1 else per_level[0],
            "transformer_layers_per_block": config.transformer_depth,
        }
    kind = "resnet" if resnet else "conv"
    return arguments | {
        "downsample_type": kind,
        "upsample_type": kind,
        "attention_head_dim": _head_width(config, attends),
        # Without it a model with scale and shift lacks a norm in the middle.
        "attn_norm_num_groups": config.num_groups,
        "num_class_embeds": config.num_classes if config.num_classes > 0 else None,
    }


def _mirror(block: str) -> str:
    """The decoder's block beside one of the encoder."""
    return block.replace("Downsample", "Upsample") if "Downsample" in block else block.replace("Down", "Up")


def _head_width(config: UNetConfig, attends: Sequence[bool]) -> int | None:
    """Channels of a head, the same at every level as ``UNet2DModel`` has it; None: one head."""
    if config.num_head_channels is not None or config.num_heads == 1:
        return config.num_head_channels
    attending = {width for width, attended in zip(config.level_channels, attends, strict=True) if attended}
    widths = attending | {config.level_channels[-1]}
    if len(widths) > 1:
        raise invalid(
            "num_heads",
            config.num_heads,
            f"1 where {sorted(widths)} channels attend",
            "A UNet2DModel has heads of one width at every level: num_head_channels says that width.",
        )
    return widths.pop() // config.num_heads

"""Where the parameters of our UNet are in a UNet of diffusers: names, and the few that are stored in another form."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from scalelong_fast.errors import UserError
from scalelong_fast.models import UNetConfig

#: Layers of a residual block: ours and theirs.
_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def module_names(config: UNetConfig) -> dict[str, tuple[str, ...]]:
    """Our modules and those of diffusers that hold the same weights.

    The joint projection ``qkv`` is three modules there; every other one is one, which may hold more modules.
    """
    names = {ours: (theirs,) for ours, theirs in _ENDS.items()}

    def res(ours: str, theirs: str) -> None:
        names.update({f"{ours}.{a}": (f"{theirs}.{b}",) for a, b in _RES_BLOCK.items()})

    def attention(ours: str, theirs: str) -> None:
        if config.clip_dim > 0:
            same = ("norm", "proj_in", "proj_out", "transformer_blocks")
            names.update({f"{ours}.{name}": (f"{theirs}.{name}",) for name in same})
        else:
            names[f"{ours}.norm"] = (f"{theirs}.group_norm",)
            names[f"{ours}.qkv"] = tuple(f"{theirs}.{name}" for name in ("to_q", "to_k", "to_v"))
            names[f"{ours}.proj_out"] = (f"{theirs}.to_out.0",)

    def resizing(ours: str, theirs: str, layer: str) -> None:
        if config.resblock_updown:
            res(ours, theirs)
        else:
            names[f"{ours}.{layer}"] = (f"{theirs}.conv",)

    levels = len(config.channel_mult)
    attends = [config.img_size >> level in config.attention_resolutions for level in range(levels)]
    stage = 1  # 0 is the stem
    for level in range(levels):
        for block in range(config.num_res_blocks):
            res(f"input_blocks.{stage}.0", f"down_blocks.{level}.resnets.{block}")
            if attends[level]:
                attention(f"input_blocks.{stage}.1", f"down_blocks.{level}.attentions.{block}")
            stage += 1
        if level + 1 < levels:
            resizing(f"input_blocks.{stage}.0", f"down_blocks.{level}.downsamplers.0", "op")
            stage += 1
    res("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    res("middle_block.2", "mid_block.resnets.1")
    stage = 0
    for number, level in enumerate(reversed(range(levels))):
        for block in range(config.num_res_blocks + 1):
            res(f"output_blocks.{stage}.0", f"up_blocks.{number}.resnets.{block}")
            if attends[level]:
                attention(f"output_blocks.{stage}.1", f"up_blocks.{number}.attentions.{block}")
            if level > 0 and block == config.num_res_blocks:
                resizing(f"output_blocks.{stage}.{1 + attends[level]}", f"up_blocks.{number}.upsamplers.0", "conv")
            stage += 1
    return names


def parameter_names(config: UNetConfig, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Our parameters ``keys``, without those of the coefficients, and where diffusers has each."""
    modules = module_names(config)
    found = {}
    for key in keys:
        if key.startswith("scaling."):
            continue
        parts = key.split(".")
        ours = next(name for n in range(len(parts) - 1, 0, -1) if (name := ".".join(parts[:n])) in modules)
        found[key] = tuple(f"{theirs}{key[len(ours) :]}" for theirs in modules[ours])
    return found


def _head_order(config: UNetConfig, channels: int) -> tuple[tuple[int, int, int], int]:
    """How the rows of ``qkv`` are divided, and which of these dimensions is that of q, k and v."""
    heads = config.heads_of(channels)
    return ((3, heads, -1), 0) if config.use_new_attention_order else ((heads, 3, -1), 1)


def _reshaped(value: Tensor, shape: torch.Size) -> Tensor:
    """The weight of a 1×1 convolution as that of a Linear, or the other way round; anything else as it is."""
    same = value.dim() > 1 and value.flatten(1).shape == torch.empty(shape, device="meta").flatten(1).shape
    return value.reshape(shape) if same else value


def _halves_swapped(weight: Tensor) -> Tensor:
    """The first time layer's ``(E, C)`` weight for an embedding whose sines come first, or back again."""
    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def to_their_names(config: UNetConfig, ours: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict:
    """Our parameters in the names and shapes of diffusers.

    Args:
        config: of our model.
        ours: its state dict.
        shapes: of the parameters of the diffusers model.
    """
    theirs: dict[str, Tensor] = {}
    for key, names in parameter_names(config, ours).items():
        values = [ours[key]]
        if len(names) == 3:
            order, dim = _head_order(config, len(ours[key]) // 3)
            values = [part.flatten(0, 1) for part in ours[key].unflatten(0, order).unbind(dim)]
        for name, value in zip(names, values, strict=True):
            theirs[name] = _reshaped(value, shapes.get(name, value.shape))
    return theirs


def to_our_names(
    config: UNetConfig, theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], sines_first: bool = False
) -> dict[str, Tensor]:
    """Parameters of a diffusers model in our names and shapes.

    Args:
        config: of our model.
        theirs: state dict of the diffusers model.
        shapes: of our parameters.
        sines_first: its time embedding has the sines first (``flip_sin_to_cos=False``).

    Raises:
        UserError: it lacks parameters, or has some that ours has no place for.
    """
    wanted = parameter_names(config, shapes)
    expected = {name for group in wanted.values() for name in group}
    missing, unexpected = sorted(expected - theirs.keys()), sorted(theirs.keys() - expected)
    if missing or unexpected:
        missed, extra = (", ".join(names[:3]) or "none" for names in (missing, unexpected))
        raise UserError(
            f"model: its parameters are not those of the network that its config describes ({len(missing)} missing: "
            f"{missed}; {len(unexpected)} unexpected: {extra}). Merge or unload adapters, and remove patches, first."
        )
    ours = {}
    for key, group in wanted.items():
        values = [theirs[name] for name in group]
        value = values[0]
        if len(group) == 3:
            order, dim = _head_order(config, len(value))
            value = torch.stack([part.unflatten(0, (order[1 - dim], -1)) for part in values], dim).flatten(0, 2)
        if key == "time_embed.0.weight" and sines_first:
            value = _halves_swapped(value)
        ours[key] = _reshaped(value, shapes[key])
    return ours

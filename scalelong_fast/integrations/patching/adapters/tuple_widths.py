"""Widths of the skips of blocks that take them as a tuple, read off the layers without running anything."""

from collections.abc import Iterator

from torch import nn

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.adapters.tuple_blocks import UpBlock, site_of
from scalelong_fast.integrations.patching.site import Site, number_sites
from scalelong_fast.integrations.patching.state import named_parts, unwrapped

_Convolution = nn.modules.conv._ConvNd


def read_sites(model: nn.Module, blocks: list[UpBlock]) -> list[Site]:
    """The long skips of a decoder whose blocks concatenate before their ``resnets``.

    A resnet whose first convolution takes more channels than the stream brings receives a skip of the difference. The
    widths found that way must be those of the encoder's features, last in first out.

    Raises:
        UserError: the widths cannot be read, or decoder and encoder disagree.
    """
    parent = named_parts(model)[blocks[0].list_name.rpartition(".")[0]]
    encoder = encoder_blocks(parent, [block.module for block in blocks])
    sites, handed = [], []
    stream = stream_width(parent, encoder)
    for block in blocks:
        widths = []
        for layer in block.module._modules.get("resnets") or ():
            taken, given = in_width(layer), out_width(layer)
            if taken is None or given is None or stream is None or taken < stream:
                raise unreadable(model, f"the widths of the layers in {block.name!r} do not fit together")
            widths.append(taken - stream)
            stream = given
        for used, width in enumerate(widths):
            if width > 0:
                sites.append(site_of(block, -1 - used, width))
        handed.append(widths)
    if not sites:
        raise unreadable(model, "no layer of its up blocks takes more channels than the one before gives")
    check_against_encoder(model, parent, encoder, handed)
    return number_sites(sites)


def check_against_encoder(
    model: nn.Module, parent: nn.Module, encoder: list[nn.Module], handed: list[list[int]]
) -> None:
    """Compare with the features that encoders of this kind keep, innermost first.

    Kept are: the first convolution's output, then per block the outputs of the resnets and, or not, that of the
    downsampler, where every block is handed as many as it has resnets; or one feature per block.
    """
    first = [width for layer in parent.children() if isinstance(layer, _Convolution) and (width := out_width(layer))]
    all_features, no_downsamplers, one_each = first[:1], first[:1], []
    for block in encoder:
        resnets = [out_width(layer) for layer in block._modules["resnets"]]
        down = block._modules.get("downsamplers")
        all_features += resnets + ([out_width(down) or resnets[-1]] if down is not None else [])
        no_downsamplers += resnets
        one_each.append(resnets[-1])
    per_resnet = [width for widths in handed for width in widths]
    per_block = [widths[0] for widths in handed if not any(widths[1:])]
    seen = [(per_resnet, all_features), (per_resnet, no_downsamplers)]
    if len(per_block) == len(handed):
        seen.append((per_block, one_each))
    if not any(agree(used, features[::-1]) for used, features in seen):
        raise unreadable(
            model, f"the decoder takes skips of {per_resnet} channels, the encoder keeps {all_features[::-1]}"
        )


def agree(used: list[int], kept: list[int]) -> bool:
    """Whether the skips used, 0 for one that is handed over and not used, are the first of those kept."""
    return len(used) <= len(kept) and all(u in (0, k) for u, k in zip(used, kept, strict=False))


def encoder_blocks(parent: nn.Module, up: list[nn.Module]) -> list[nn.Module]:
    """The blocks of the list beside the decoder's whose elements have resnets."""
    for layer in parent.children():
        blocks = [unwrapped(block) for block in layer] if isinstance(layer, nn.ModuleList) else []
        if blocks and blocks[0] not in up and all("resnets" in block._modules for block in blocks):
            return blocks
    return []


def stream_width(parent: nn.Module, encoder: list[nn.Module]) -> int | None:
    """Channels of the stream where the decoder begins: what the last block of the encoder gives.

    The middle, where there is one, keeps the width; if it does not, the widths of the decoder do not fit.
    """
    middle = parent._modules.get("mid_block")
    layers = None if middle is None else unwrapped(middle)._modules.get("resnets")
    if layers:
        return out_width(layers[-1])
    return out_width(encoder[-1]) if encoder else None


def convolutions(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if isinstance(layer, _Convolution))


def in_width(module: nn.Module) -> int | None:
    """Channels that the first convolution takes; None where there is none."""
    return next((int(layer.in_channels) for layer in convolutions(module)), None)


def out_width(module: nn.Module) -> int | None:
    """Channels that the last convolution gives; None where there is none."""
    return next((int(layer.out_channels) for layer in reversed(list(convolutions(module)))), None)


def unreadable(model: nn.Module, reason: str) -> UserError:
    return UserError(
        f"example_inputs: the long skips of {type(model).__name__} cannot be read off its modules: {reason}. Pass a "
        "tuple of forward arguments; the network is then run once."
    )

"""Which blocks use a skip that they can be given as an argument, read off their layers without running anything."""

from collections.abc import Mapping

from torch import nn

from scalelong_fast.integrations.patching.adapters.signature import parameters_of
from scalelong_fast.integrations.patching.site import Site, number_sites
from scalelong_fast.integrations.patching.state import named_parts

_Convolution = nn.modules.conv._ConvNd


def read_sites(model: nn.Module, blocks: Mapping[str, list[str]]) -> tuple[list[Site], str]:
    """The long skips of a network of such blocks.

    A block is taken to use its skip if that is optional and one of its layers takes the stream and a feature beside it:
    a Linear 2D → D of its own (tokens, as in a U-ViT), or a first Linear that takes more channels than the depthwise
    convolution before it gives. These blocks must be a decoder: all of them after as many or more that use none.

    Args:
        model: the network.
        blocks: name of each block that takes a skip, and the names of those arguments.

    Returns:
        The sites, none where the modules do not say enough, and half a sentence on what was seen.
    """
    sites, places, parts = [], [], named_parts(model)
    for place, (name, arguments) in enumerate(blocks.items()):
        module = parts[name]
        optional = {name for name, parameter in parameters_of(module).items() if parameter.default is None}
        tokens, width = second_width(module)
        if width is None:
            continue
        if len(arguments) > 1 or arguments[0] not in optional:
            return [], f"{name!r} takes {', '.join(arguments)}, of which one optional argument was looked for"
        # A gate of tokens is as wide as the sequence is long, which no layer shows.
        gate = None if tokens else width
        extra = {"argument": arguments[0]}
        sites.append(Site(0, name, f"argument {arguments[0]}", gate, dim=-1 if tokens else 1, extra=extra))
        places.append(place)
    if not sites:
        return [], "none has a layer that is wide enough for both"
    before = [place for place in range(places[0]) if place not in places]
    alone = common_part([site.module for site in sites]) != common_part(list(blocks))
    if len(before) < len(sites) or not (alone or places == list(range(places[0], len(blocks)))):
        return [], f"{len(sites)} have a layer that is wide enough for both, but they are no decoder after an encoder"
    return number_sites(sites), f"{len(sites)} use it"


def second_width(module: nn.Module) -> tuple[bool, int | None]:
    """Whether the block works on tokens, and the width of the feature that a layer takes beside the stream, or None."""
    for layer in module.children():
        if isinstance(layer, nn.Linear) and layer.in_features == 2 * layer.out_features:
            return True, layer.out_features
    depthwise = [
        layer
        for layer in module.children()
        if isinstance(layer, _Convolution) and layer.groups == layer.in_channels == layer.out_channels > 1
    ]
    linear = next((layer for layer in module.modules() if isinstance(layer, nn.Linear)), None)
    if depthwise and linear is not None and linear.in_features > depthwise[0].out_channels:
        return False, linear.in_features - depthwise[0].out_channels
    return False, None


def common_part(names: list[str]) -> list[str]:
    """Qualified name, split at its dots, of the smallest part of the network that holds all of these modules."""
    common = []
    for parts in zip(*[name.split(".")[:-1] for name in names], strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common

"""Adapter for blocks that take the long skip as an argument beside the stream, as those of a U-ViT do."""

from typing import Any

from torch import Tensor, nn

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.adapters.argument_layers import read_sites
from scalelong_fast.integrations.patching.adapters.argument_trace import traced_sites
from scalelong_fast.integrations.patching.adapters.base import Adapter, ExampleInputs, Finding, Handle
from scalelong_fast.integrations.patching.adapters.signature import (
    get_argument,
    parameters_of,
    position_of,
    replace_argument,
)
from scalelong_fast.integrations.patching.lost_gradients import refuse_lost_gradients
from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.integrations.patching.state import ScaleLongState, named_parts

#: Words that the name of such an argument has, as in ``skip``, ``x_skip`` and ``res_x``.
WORDS = {"skip", "res", "residual"}


class SkipArgument(Adapter):
    """Blocks with an argument called ``skip``, ``x_skip`` or the like, which they concatenate with the stream.

    Without example inputs, the blocks that use the argument are those with a layer wide enough for both; with them,
    those that were seen to concatenate an older feature of the stream in one run of the network.
    """

    name = "skip-argument"
    looks_for = "blocks whose forward takes a feature called skip, res or residual beside the stream"

    def find(self, model: nn.Module, example_inputs: ExampleInputs | None) -> Finding:
        blocks = {}
        for name, module in named_parts(model).items():
            arguments = skip_arguments(module) if name else []
            if arguments:
                blocks[name] = arguments
        if not blocks:
            return Finding(seen="no module takes one")
        if example_inputs is None:
            sites, seen = read_sites(model, blocks)
        else:
            sites, seen = traced_sites(model, blocks, example_inputs)
        return Finding(sites, seen=f"blocks that take one: {len(blocks)}; {seen}")

    def attach(self, model: nn.Module, state: ScaleLongState, sites: list[Site]) -> list[Handle]:
        modules = named_parts(model)
        hooks = []
        for site in sites:
            position = position_of(modules.get(site.module), site.extra["argument"])
            if position is None:
                raise UserError(
                    f"model: {type(model).__name__} has no block {site.module!r} whose forward takes "
                    f"{site.extra['argument']!r}, but the patch has a long skip there. It was made for another network."
                )
            hook = ScaleArgument(state, site.module, site.extra["argument"], position, site.i)
            hooks.append((modules[site.module], hook))
        return [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]


class ScaleArgument:
    """Hook of a block: scales the argument that is the long skip.

    Args:
        state: the coefficients.
        block: qualified name of the block.
        argument, position: of the skip among the arguments of the block's forward.
        i: index of the long skip.
    """

    def __init__(self, state: ScaleLongState, block: str, argument: str, position: int, i: int):
        self.state, self.block, self.argument, self.position, self.i = state, block, argument, position, i

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        skip = get_argument(args, kwargs, self.argument, self.position)
        if not isinstance(skip, Tensor):
            return None
        refuse_lost_gradients(self.state, self.block)
        scaled = self.state(skip, self.i, module)
        return replace_argument(args, kwargs, self.argument, self.position, scaled)


def skip_arguments(module: nn.Module) -> list[str]:
    """Arguments of the module's forward that are called a skip; not the first, which is the stream, and no tuples."""
    names = [(name, set(name.lower().split("_"))) for name in list(parameters_of(module))[1:]]
    return [name for name, words in names if words & WORDS and "tuple" not in words]

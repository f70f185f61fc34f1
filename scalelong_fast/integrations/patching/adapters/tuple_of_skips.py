"""Adapter for decoder blocks that receive a tuple of skips, ``res_hidden_states_tuple``, as those of diffusers do."""

from typing import Any

from torch import nn

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.adapters.base import Adapter, ExampleInputs, Finding, Handle
from scalelong_fast.integrations.patching.adapters.signature import (
    get_argument,
    position_of,
    replace_argument,
)
from scalelong_fast.integrations.patching.adapters.tuple_blocks import UpBlock, up_blocks_of
from scalelong_fast.integrations.patching.adapters.tuple_trace import traced_sites
from scalelong_fast.integrations.patching.adapters.tuple_widths import read_sites
from scalelong_fast.integrations.patching.lost_gradients import refuse_lost_gradients
from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.integrations.patching.state import ScaleLongState, named_parts


class TupleOfSkips(Adapter):
    """Up blocks with an argument ``res_hidden_states_tuple``: entries are taken from its end, one per concat.

    Without example inputs, the widths of the entries and which of them are used follow from the widths of the blocks'
    layers; with them, from one run of the network.
    """

    name = "tuple-of-skips"
    looks_for = "blocks whose forward takes res_hidden_states_tuple"

    def find(self, model: nn.Module, example_inputs: ExampleInputs | None) -> Finding:
        blocks = up_blocks_of(model)
        if not blocks:
            return Finding(seen="no module takes it")
        refuse_several_networks(model, blocks)
        sites = read_sites(model, blocks) if example_inputs is None else traced_sites(model, blocks, example_inputs)
        seen = f"skips in use: {len(sites)}" if sites else "they take entries out of a list that they share"
        return Finding(sites, seen=f"blocks: {len(blocks)}; {seen}")

    def attach(self, model: nn.Module, state: ScaleLongState, sites: list[Site]) -> list[Handle]:
        entries: dict[str, list[Site]] = {}
        for site in sites:
            entries.setdefault(site.module, []).append(site)
        modules = named_parts(model)
        hooks = []
        for name, here in entries.items():
            argument = here[0].extra["argument"]
            position = position_of(modules.get(name), argument)
            if position is None:
                raise UserError(
                    f"model: {type(model).__name__} has no block {name!r} whose forward takes {argument!r}, but the "
                    "patch has a long skip there. It was made for another network."
                )
            used = tuple((site.extra["entry"], site.i) for site in here)
            hooks.append((modules[name], ScaleEntries(state, name, argument, position, used)))
        return [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]


class ScaleEntries:
    """Hook of a block: scales the entries of its tuple that are long skips, and hands the others on.

    Args:
        state: the coefficients.
        block: qualified name of the block.
        argument, position: of the tuple among the arguments of the block's forward.
        used: pairs (entry, i): entry −1 is the last of the tuple, i the index of that long skip.
    """

    def __init__(
        self, state: ScaleLongState, block: str, argument: str, position: int, used: tuple[tuple[int, int], ...]
    ):
        self.state, self.block, self.argument, self.position, self.used = state, block, argument, position, used

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        given = get_argument(args, kwargs, self.argument, self.position)
        if given is None:
            return None
        refuse_lost_gradients(self.state, self.block)
        features = list(given)
        for entry, i in self.used:
            if len(features) < -entry:
                raise UserError(
                    f"{self.argument}: got {len(features)} skips, expected at least {-entry}, as when the network was "
                    "patched. Call remove_scalelong and apply_scalelong again if its blocks were changed."
                )
            if features[entry] is not None:
                features[entry] = self.state(features[entry], i, module)
        # Never a list: a block that took entries out of it would do so unseen by the others.
        return replace_argument(args, kwargs, self.argument, self.position, tuple(features))


def refuse_several_networks(model: nn.Module, blocks: list[UpBlock]) -> None:
    """The up blocks of one network are siblings; those of several (a network and its average) are not."""
    parents = sorted({block.list_name for block in blocks})
    if len(parents) > 1:
        raise UserError(
            f"model: {type(model).__name__} holds up blocks in several places: {', '.join(map(repr, parents))}. Pass "
            "the part that is one network, or patch each part by itself."
        )

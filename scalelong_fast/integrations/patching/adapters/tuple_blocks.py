"""Which modules of a network take a tuple of skips."""

from typing import NamedTuple

from torch import nn

from scalelong_fast.integrations.patching.adapters.signature import position_of
from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.integrations.patching.state import named_parts

#: Names of the argument: that of nearly all blocks, and the one of the two tuples that ControlNet-XS concatenates.
ARGUMENTS = ("res_hidden_states_tuple", "res_hidden_states_tuple_base")


class UpBlock(NamedTuple):
    """A decoder block that takes a tuple of skips.

    Attributes:
        name: qualified name.
        module: the block.
        argument: name of the tuple in its forward.
        position: its position there.
    """

    name: str
    module: nn.Module
    argument: str
    position: int

    @property
    def list_name(self) -> str:
        """Qualified name of the list that the block stands in."""
        return self.name.rpartition(".")[0]


def up_blocks_of(model: nn.Module) -> list[UpBlock]:
    """The decoder blocks in the order of registration, which is the order in which a decoder runs its list."""
    blocks = []
    for name, module in named_parts(model).items():
        for argument in ARGUMENTS:
            position = position_of(module, argument)
            if position is not None:
                blocks.append(UpBlock(name, module, argument, position))
    return blocks


def site_of(block: UpBlock, entry: int, width: int) -> Site:
    """The site of one entry, −1 the last of the tuple; not numbered yet."""
    return Site(0, block.name, f"tuple[{entry}]", width, extra={"argument": block.argument, "entry": entry})

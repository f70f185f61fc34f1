"""Skips of blocks that take them as a tuple, seen in one run of the network."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.adapters.base import ExampleInputs
from scalelong_fast.integrations.patching.adapters.signature import get_argument, replace_argument
from scalelong_fast.integrations.patching.adapters.tuple_blocks import UpBlock, site_of
from scalelong_fast.integrations.patching.dry_run import dry_run
from scalelong_fast.integrations.patching.site import Site, number_sites
from scalelong_fast.integrations.patching.trace import CONCATS


def traced_sites(model: nn.Module, blocks: list[UpBlock], example_inputs: ExampleInputs) -> list[Site]:
    """The entries that the blocks concatenate, in the order they do; none where blocks empty a list they share.

    Raises:
        UserError: no block concatenates one, or a block is called more than once.
    """
    watch = WatchEntries()
    handles = []
    for block in blocks:
        handles.append(block.module.register_forward_pre_hook(watch.enter(block), with_kwargs=True))
        handles.append(block.module.register_forward_hook(watch.leave, always_call=True))
    try:
        with watch:
            dry_run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    if watch.emptied:
        return []  # lists that blocks take entries out of, for the others to see, must stay the network's own
    called = [block.name for block in watch.called]
    if len(set(called)) < len(called):
        raise UserError(f"model: {type(model).__name__} runs a block more than once: {', '.join(called)}.")
    if not watch.sites:
        raise UserError(
            f"model: {type(model).__name__} has blocks that take a tuple of skips, but concatenated none of its "
            "entries when it was run on example_inputs."
        )
    return number_sites(watch.sites)


class Entry(NamedTuple):
    """An entry of a block's tuple, or a tensor made from it."""

    block: UpBlock
    place: int
    width: int
    tensor: Tensor  # held, so that its id stays its own


class WatchEntries(TorchFunctionMode):
    """Follows the entries of a block's tuple to the concat that takes them, in the order of the concats.

    A block gets views of its own of the entries, so that a feature that is in use elsewhere is not mistaken for one.
    """

    def __init__(self):
        super().__init__()
        self.sites: list[Site] = []
        self.called: list[UpBlock] = []
        self.emptied = False
        self._given: tuple[list[Any], int] = ([], 0)
        self._open: dict[int, Entry] = {}

    def enter(self, block: UpBlock):
        """The pre-hook of ``block``."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
            given = get_argument(args, kwargs, block.argument, block.position)
            self.called.append(block)
            self._open = {}
            if given is None:
                return None
            views = [entry.view_as(entry) if isinstance(entry, Tensor) else entry for entry in given]
            for place, view in enumerate(views):
                if isinstance(view, Tensor):
                    self._open[id(view)] = Entry(block, place - len(views), view.shape[1], view)
            if isinstance(given, list):
                given[:] = views  # the network's own list, in case the block takes entries out of it
                self._given = given, len(given)
                return None
            return replace_argument(args, kwargs, block.argument, block.position, tuple(views))

        return hook

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The hook that closes a block."""
        given, number = self._given
        self.emptied |= len(given) != number
        self._given = [], 0
        self._open = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if not self._open:
            return output
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        taken = {entry.place: entry for tensor in tensors if (entry := self._open.get(id(tensor))) is not None}
        if len(taken) > 1:
            block = next(iter(taken.values())).block
            raise UserError(
                f"model: block {block.name!r} joins entries {sorted(taken)} of its tuple of skips in one call of "
                f"{getattr(function, '__name__', function)}. Which of them is a long skip of its own is not clear."
            )
        for entry in taken.values():
            if function in CONCATS:
                self.sites.append(site_of(entry.block, entry.place, entry.width))
                self._open = {key: other for key, other in self._open.items() if other.place != entry.place}
            else:
                results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                self._open.update({id(result): entry._replace(tensor=result) for result in results})
        return output

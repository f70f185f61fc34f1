"""What an adapter is: it knows one structure of network, finds its long skips and hooks them."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.integrations.patching.state import ScaleLongState

#: The forward arguments of a network: positional ones, or keyword ones.
ExampleInputs = tuple[Any, ...] | dict[str, Any]


class Handle(Protocol):
    """What undoes a hook, as ``torch.utils.hooks.RemovableHandle`` does."""

    def remove(self) -> None: ...


@dataclass
class Finding:
    """What an adapter saw in a network.

    Attributes:
        sites: the long skips, in any order, numbered; empty where the network is not of the adapter's structure.
        seen: half a sentence for the error of an unknown network, e.g. ``no module takes a tuple of features``.
    """

    sites: list[Site] = field(default_factory=list)
    seen: str = ""


class Adapter:
    """One structure of networks. Subclass it and hand an instance to :func:`register_adapter`.

    An adapter goes by structure (signatures, children, data flow), not by the names of classes or modules, so that the
    next release of a library, and the next library, need none of their own.

    Attributes:
        name: short and unique; it is saved with the patch.
        looks_for: half a sentence for the error of an unknown network.
        last_resort: asked only where no other adapter finds anything.
        opt_in: asked only where the user says how many sites he expects (``expect``), after all others.
    """

    name: str = ""
    looks_for: str = ""
    last_resort: bool = False
    opt_in: bool = False

    def find(self, model: nn.Module, example_inputs: ExampleInputs | None) -> Finding:
        """Find the long skips of ``model`` and leave it as it was.

        Args:
            model: the network.
            example_inputs: arguments of its forward, where the user gave them.

        Raises:
            UserError: the structure is the adapter's, but ambiguous or unreadable; says what was seen.
        """
        raise NotImplementedError

    def attach(self, model: nn.Module, state: ScaleLongState, sites: list[Site]) -> list[Handle]:
        """Hook the sites. They may come from a file: nothing but what they hold may be needed.

        Args:
            model: the network.
            state: what the hooks ask for κ; a hook is an object that refers to it (no closure, no reference to
                ``model``), so that a deep copy of the network has coefficients of its own.
            sites: as :meth:`find` gave them.

        Returns:
            One handle per hook.

        Raises:
            UserError: ``model`` has no such site.
        """
        raise NotImplementedError

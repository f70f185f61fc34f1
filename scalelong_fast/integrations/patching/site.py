"""One long skip connection of somebody else's network: where it is scaled, and how."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Site:
    """A place where a network uses a long skip. Plain data: from it the patch can be made again without a search.

    Attributes:
        i: index of the skip, 1 (outermost, next to the input) … N (innermost).
        module: qualified name of the module whose input is scaled, as in ``named_modules``; "" is the network itself.
        kind: what the module receives, in a few words, for the report.
        width: C_s, the number of channels or tokens that a gate has here (dim 1 of the skip); None where it is unknown,
            which is enough for scalings without a gate.
        dim: dimension of the concat.
        skip_first: the skip comes before the stream in the concat.
        plan: what is done here, for the report.
        taken: what was done here last where that was found out on the way; None where it is ``plan``.
        shapes: shape of the skip as it was last seen; None before the first forward.
        layout: memory layout of the skip as it was last seen, ``contiguous``, ``channels_last`` or ``strided``.
        extra: what the adapter needs to find the tensor again; values that JSON can hold.
    """

    i: int
    module: str
    kind: str
    width: int | None = None
    dim: int = 1
    skip_first: bool = False
    plan: str = "multiply"
    shapes: tuple[int, ...] | None = None
    layout: str | None = None
    taken: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict without what was noted on the way (``shapes``, ``layout``, ``taken``); JSON can hold it."""
        plain = asdict(self)
        del plain["shapes"], plain["layout"], plain["taken"]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Site":
        """The inverse of :meth:`to_dict`."""
        return cls(**plain)


def number_sites(sites: list[Site]) -> list[Site]:
    """Give sites that are listed in the order the network uses them their index: last in, first out, so i = N … 1."""
    for used, site in enumerate(sites):
        site.i = len(sites) - used
    return sites

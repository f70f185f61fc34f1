"""What the paper reports of its own ablations, as far as its numbers are known here.

Only what public text gives is entered, never what somebody remembers. The abstract and the README of the released code
could be read, the paper's tables could not: so far no number of theirs is known. ``scalelong-fast analyze ablation``
prints a dash for those, and each number that is entered below beside ours.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """A number of the paper.

    Attributes:
        value: as it is printed there.
        metric: what it is, and of which data set and network.
        source: where it was read.
    """

    value: str
    metric: str
    source: str


#: By reference and label of a row (:mod:`~scalelong_fast.analysis.ablation_tables`): ("ScaleLong Table 3", "rezero").
REPORTED: dict[tuple[str, str], Reported] = {}

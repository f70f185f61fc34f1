"""Which blocks concatenate a skip that they are given as an argument, seen in one run of the network."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from scalelong_fast.integrations.patching.adapters.base import ExampleInputs
from scalelong_fast.integrations.patching.adapters.signature import argument_at
from scalelong_fast.integrations.patching.concat_sides import DOUBTFUL, LONG, Judged
from scalelong_fast.integrations.patching.long_concats import in_order, judge
from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.integrations.patching.state import plain_name
from scalelong_fast.integrations.patching.trace import Call, Concat, Trace, trace


def traced_sites(
    model: nn.Module, blocks: Mapping[str, list[str]], example_inputs: ExampleInputs
) -> tuple[list[Site], str]:
    """The long skips of a network, if each of them arrives as an argument of a block.

    Args:
        model: the network.
        blocks: name of each block that takes a skip, and the names of those arguments.
        example_inputs: arguments of the network's forward.

    Returns:
        The sites, none unless every long skip is one, and half a sentence on what was seen.
    """
    seen = trace(model, example_inputs)
    arrivals = {concat.number: found for concat in seen.concats if (found := arrival_of(seen, concat, blocks))}
    # Judged among themselves: what else a network concatenates, such as keys and values, is no part of the question.
    judged = judge(replace(seen, concats=[concat for concat in seen.concats if concat.number in arrivals]))
    other = [concat for concat in judged if concat.verdict != LONG]
    if other:
        name = seen.calls[other[0].concat.call].name
        return [], f"what {name!r} gets is no long skip for sure ({other[0].reason})"
    missed = [concat for concat in judge(seen) if concat.concat.number not in arrivals and may_be_long(seen, concat)]
    if missed:
        return [], f"{len(judged)} concatenate it, but {len(missed)} long skips come another way"
    long = in_order(seen, judged)
    sites = [site_of(concat, i, *arrivals[concat.concat.number]) for i, concat in enumerate(long, start=1)]
    used = {(call.name, argument) for call, argument, _ in arrivals.values()}
    if len(used) < len(sites) or any(seen.calls_of(name) > 1 for name, _ in used):
        return [], "a block is used more than once"
    return sites, f"{len(sites)} concatenate it"


def may_be_long(trace: Trace, judged: Judged) -> bool:
    """Whether a concat is a long skip, or may be one that the network itself makes."""
    return judged.verdict == LONG or (judged.verdict == DOUBTFUL and trace.calls[judged.concat.call].parent < 0)


def arrival_of(trace: Trace, concat: Concat, blocks: Mapping[str, list[str]]) -> tuple[Call, str, int] | None:
    """The call of a block, its argument and the value there that one operand of a concat within the block came from."""
    for operand in concat.operands:
        value = operand
        while value is not None:
            for number in trace.callers(concat.call):
                call = trace.calls[number]
                argument = argument_of(call, value)
                if argument in blocks.get(plain_name(call.name), ()):
                    # Used for something else too: scaling the argument would change more than the concat.
                    uses = sum(number in trace.callers(by) for by in trace.values[value].used)
                    return (call, argument, value) if uses == 1 else None
            value = version_of(trace, value)
    return None


def site_of(judged: Judged, i: int, call: Call, argument: str, value: int) -> Site:
    """The site of a long skip that is the argument of a block."""
    concat = judged.concat
    shape, tokens = concat.shapes[judged.skip], concat.dim != 1
    # (B, H, W, C) has no dimension that a gate of channels or tokens belongs to; the shape lets the error say so.
    last = tokens and len(shape) != 3
    return Site(
        i,
        plain_name(call.name),
        f"argument {argument}",
        width=None if last else shape[1],
        dim=-1 if tokens else 1,
        skip_first=judged.skip == 0,
        shapes=tuple(shape) if last else None,
        extra={"argument": argument},
    )


def version_of(trace: Trace, value: int) -> int | None:
    """What a value was made from, where that is one value and κ may as well be applied before: no layer, no sum."""
    made = trace.values[value]
    return made.parents[0] if len(made.parents) == 1 and not made.learned else None


def argument_of(call: Call, value: int) -> str | None:
    """Name of the argument of a call that is this value, or None."""
    keys = [key for key, given in call.inputs.items() if given == value]
    if len(keys) != 1:
        return None
    return keys[0] if isinstance(keys[0], str) else argument_at(call.module, keys[0])

"""The two sides of a concat: which one is an older feature, and which one is the stream that came from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scalelong_fast.integrations.patching.trace import Concat, Trace, Value

LONG, OTHER, DOUBTFUL = "long skip", "no long skip", "doubtful"
SAME = "of two views of one feature"

#: Parts of the names of the functions of layers, by the dimension that has the channels of what they make. What another
#: function makes may be the same feature with dimensions exchanged, and says nothing of its resolution.
_LAYERS = {
    1: ("conv", "pool", "interpolate", "upsample", "batch_norm", "group_norm", "instance_norm"),
    -1: ("linear", "layer_norm", "rms_norm"),
}
_CONCATS = ("cat", "concat", "concatenate")


@dataclass
class Judged:
    """A concat, and what it is.

    Attributes:
        concat: the concat.
        verdict: ``long skip``, ``no long skip`` or ``doubtful``.
        reason: why, in half a sentence.
        skip: which of the two operands is the skip, 0 or 1; None where neither is.
        stream: value of the other operand.
        fork: the last value that both operands came from.
        direct: whether no parameter works between the fork and the concat on the skip's side.
        scaled: the operands that the network multiplies by a number of its own just before the concat.
    """

    concat: Concat
    verdict: str = OTHER
    reason: str = ""
    skip: int | None = None
    stream: int = -1
    fork: int = -1
    direct: bool = True
    scaled: tuple[int, ...] = ()


def sides_of(trace: Trace, concat: Concat) -> Judged:
    """Which operand is an older feature that the other one came from."""
    judged = Judged(concat)
    dims = len(concat.shapes[0])
    if len(concat.operands) != 2:
        judged.reason = f"{len(concat.operands)} features"
    elif None in concat.operands:
        judged.reason = "with something that does not depend on the network's inputs"
    elif dims < 3 or concat.dim not in (1, dims - 1):
        judged.reason = "not along the channels of features"
    else:
        judged.scaled = tuple(side for side in (0, 1) if _is_product(trace, concat.operands[side]))
        meet(trace, judged, *concat.operands)
    return judged


def meet(trace: Trace, judged: Judged, first: int, second: int) -> None:
    """Fill in skip, stream, fork and direct for these two values, or the reason why neither is a skip."""
    values = trace.values
    roots = [_root(trace, first), _root(trace, second)]
    common = values[roots[0]].ancestors & values[roots[1]].ancestors
    fork = values[common.bit_length() - 1] if common else None
    if fork is None or not any(value.learned for value in members(trace, common)):
        judged.reason = "with a condition or input of the network"
        return
    if len(fork.shape) != len(judged.concat.shapes[0]) or math.prod(fork.shape[2:]) == 1:
        judged.reason = "of features that share no feature they came from"
        return
    own = [values[root].ancestors & ~common for root in roots]
    work = [sum(value.learned for value in members(trace, mask)) for mask in own]
    if not any(work):
        judged.reason = SAME if roots[0] == roots[1] else "of two versions of one feature"
        return
    judged.direct = not all(work)
    skip = work.index(0) if judged.direct else _plainer(trace, judged.concat, fork.index, roots, own)
    if skip is None:
        judged.reason = "of parallel branches"
        return
    judged.skip, judged.stream, judged.fork = skip, roots[1 - skip], fork.index


def _plainer(trace: Trace, concat: Concat, fork: int, roots: list[int], own: list[int]) -> int | None:
    """Which of two operands, both with layers of their own since the fork, is the skip; None for branches of a block.

    The stream is the one that has been at a lower resolution, or through another concat.
    """
    crosses = [crosses_resolution(trace, fork, root, concat) for root in roots]
    if crosses[0] == crosses[1]:
        crosses = [any(value.function in _CONCATS for value in members(trace, mask)) for mask in own]
    if crosses[0] == crosses[1]:
        return None
    stream = crosses.index(True)
    leaves = any(concat.call not in trace.callers(value.call) for value in members(trace, own[stream]))
    return 1 - stream if leaves or trace.calls[concat.call].parent < 0 else None


def _root(trace: Trace, index: int) -> int:
    """The feature that a value is a version of: padded, activated, or times a gate made of it and of the stream."""
    while True:
        value = trace.values[index]
        parents = [trace.values[parent] for parent in value.parents]
        if not parents or value.learned or value.function in _CONCATS:
            return index
        # A gate or an embedding is broadcast; of two features of full size neither is the other's version.
        padded = len(parents) == 1 and value.function == "pad"
        full = parents if padded else [parent for parent in parents if parent.shape == value.shape]
        if len(full) != 1 or len(full[0].shape) != len(value.shape):
            return index
        if any(math.prod(p.shape) > math.prod(full[0].shape) for p in parents):
            return index
        index = full[0].index


def crosses_resolution(trace: Trace, fork: int, stream: int, concat: Concat) -> bool:
    """Whether every way from the fork to the stream passes a lower resolution than those of fork and concat."""
    values, dim = trace.values, concat.dim
    positions = min(_positions(values[index].shape, dim) for index in (fork, concat.result))
    stack, seen = [stream], set()
    while stack:
        value = values[stack.pop()]
        if value.index == fork:
            return False
        if _is_made_of_fewer(value, positions, tokens=dim != 1):
            continue
        for parent in value.parents:
            if parent not in seen and values[parent].ancestors >> fork & 1:
                seen.add(parent)
                stack.append(parent)
    return True


def _is_made_of_fewer(value: Value, positions: int, tokens: bool) -> bool:
    """Whether a layer made this value, of fewer positions.

    Where channels are concatenated, layers of tokens do not count: the concat may be one of tokens itself, as in
    attention, some of them pooled.
    """
    dims = [dim for dim, parts in _LAYERS.items() if any(part in value.function for part in parts)]
    counts = dims == [1] or (tokens and bool(dims))
    return counts and len(value.shape) > 2 and _positions(value.shape, dims[0]) < positions


def _is_product(trace: Trace, index: int) -> bool:
    """Whether a value is another one times a number, or a cast of that."""
    value = trace.values[index]
    while value.function in ("to", "type", "type_as", "half", "float", "bfloat16", "contiguous", "clone"):
        value = trace.values[value.parents[0]]
    return value.product


def _positions(shape: tuple[int, ...], dim: int) -> int:
    """Positions in space and time, or tokens, of a whole batch of features that have their channels in ``dim``.

    That is the same number whichever of these dimensions a network folds into the batch.
    """
    return math.prod(shape) // max(1, shape[dim])


def members(trace: Trace, mask: int) -> Iterator[Value]:
    """The values of a set of bits."""
    while mask:
        low = mask & -mask
        yield trace.values[low.bit_length() - 1]
        mask ^= low

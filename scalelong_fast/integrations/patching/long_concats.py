"""Which concats of a run are long skip connections, and which are something else.

A long skip is the concat of a stream with an older feature that the stream itself came from, along the channels (or the
features of tokens). That alone is also true of a dense block, x with f(x). What tells them apart is the way between the
two: the stream of a long skip has been at a lower resolution, or through the concat of another long skip. Long skips
lie inside one another, last in first out; the concats of dense blocks, attention and conditions do not.
"""

from scalelong_fast.integrations.patching.concat_sides import (
    DOUBTFUL,
    LONG,
    SAME,
    Judged,
    crosses_resolution,
    meet,
    members,
    sides_of,
)
from scalelong_fast.integrations.patching.trace import Trace


def judge(trace: Trace) -> list[Judged]:
    """Every concat of the run that has features on it, in the order they ran."""
    judged = [sides_of(trace, concat) for concat in trace.concats]
    candidates = [concat for concat in judged if concat.skip is not None]
    long = _long(trace, candidates)
    kinds = {_kind(trace, concat) for concat in long}
    for concat in candidates:
        if concat in long:
            concat.verdict, concat.reason = LONG, _how(trace, concat)
        elif concat.direct and _is_beside(trace, concat, long):
            concat.verdict = DOUBTFUL
            concat.reason = "a feature and what was made of it, outside the other long skips or beside them"
        else:
            concat.reason = "within a block, at one resolution"
    for concat in judged:
        if concat.reason == SAME and _kind(trace, concat) in kinds:
            concat.verdict = DOUBTFUL  # the innermost skip of a decoder that follows its encoder without a middle?
    for concat in long:
        if (len(kinds) > 1 or len(long) == 1) and _is_local(trace, concat):
            concat.verdict, concat.reason = DOUBTFUL, "a block that goes to a lower resolution and back by itself"
        elif len(concat.scaled) == 2:
            concat.verdict, concat.reason = DOUBTFUL, "both sides are scaled by the network (magnitude-preserving)"
    if not _is_chain(trace, [concat for concat in long if concat.verdict == LONG]):
        for concat in long:
            concat.verdict = DOUBTFUL
            concat.reason = "not last in, first out: several decoders, or one network in another"
    for concat in judged:
        of_kind = not kinds or _kind(trace, concat) in kinds
        if len(concat.concat.operands) > 2 and of_kind and _has_long(trace, concat):
            concat.verdict, concat.reason = DOUBTFUL, "more than two features, a long skip among them"
    return judged


def _is_beside(trace: Trace, judged: Judged, long: list[Judged]) -> bool:
    """Whether a concat that is none of the long skips looks like one: it is made where they are, or in their middle."""
    if not long:
        return False
    made_alike = any(_kind(trace, judged) is _kind(trace, other) for other in long)
    by_network = trace.calls[judged.concat.call].parent < 0
    in_middle = all(_encloses(trace, other, judged) for other in long)
    return made_alike or by_network or (in_middle and _comes_in(trace, judged))


def in_order(trace: Trace, judged: list[Judged]) -> list[Judged]:
    """The long skips, outermost first."""
    long = [concat for concat in judged if concat.verdict == LONG]
    return sorted(long, key=lambda a: sum(_encloses(trace, b, a) for b in long))


def table(trace: Trace, judged: list[Judged]) -> str:
    """One line for each concat: where, of what, and the verdict."""
    lines = []
    for number, concat in enumerate(judged, start=1):
        call = trace.calls[concat.concat.call]
        where = f"{call.name!r} ({type(call.module).__name__})" if call.name else type(call.module).__name__
        shapes = " and ".join(str(shape) for shape in concat.concat.shapes)
        reason = f", {concat.reason}" if concat.reason else ""
        lines.append(f"- concat {number} in {where}: {shapes} along dim {concat.concat.dim}: {concat.verdict}{reason}")
    return "\n".join(lines)


def _long(trace: Trace, candidates: list[Judged]) -> list[Judged]:
    """The candidates that are long skips by the way their stream has gone."""
    long = [concat for concat in candidates if crosses_resolution(trace, concat.fork, concat.stream, concat.concat)]
    if not long:
        # One resolution throughout, as in a U-ViT: only lying inside one another is left.
        kind = {id(concat): _kind(trace, concat) for concat in candidates}
        long = [
            a
            for a in candidates
            if a.direct and any(_encloses(trace, a, b) and kind[id(a)] == kind[id(b)] for b in candidates)
        ]
    long += [a for a in candidates if a not in long and any(_encloses(trace, a, b) for b in long)]
    kinds = {_kind(trace, concat) for concat in long}
    # Around the middle a network may have several at one resolution: concatenated as the others are, or in blocks that
    # the skip comes into and the stream came out of, of another class (with attention, say).
    within = [
        b
        for b in candidates
        if b not in long
        and b.direct
        and (_kind(trace, b) in kinds or _comes_in(trace, b))
        and all(_encloses(trace, a, b) for a in long)
    ]
    return long + within if _is_chain(trace, within) else long


def _comes_in(trace: Trace, judged: Judged) -> bool:
    """Whether a block, not the network, concatenates what came from outside of it with what became of that outside."""
    return trace.calls[judged.concat.call].parent >= 0 and not _is_local(trace, judged)


def _encloses(trace: Trace, outer: Judged, inner: Judged) -> bool:
    """Whether the inner skip begins after the outer one, and the outer one's stream comes out of the inner concat."""
    values = trace.values
    begins = values[inner.fork].ancestors >> outer.fork & 1
    ends = values[outer.stream].ancestors >> inner.concat.result & 1
    return outer is not inner and bool(begins and ends)


def _is_chain(trace: Trace, long: list[Judged]) -> bool:
    """Whether of every two one lies inside the other."""
    return all(
        _encloses(trace, a, b) or _encloses(trace, b, a) for place, a in enumerate(long) for b in long[place + 1 :]
    )


def _has_long(trace: Trace, judged: Judged) -> bool:
    """Whether a concat of several features holds one that another came from at a lower resolution."""
    concat = judged.concat
    operands = [operand for operand in concat.operands if operand is not None]
    for place, first in enumerate(operands):
        for second in operands[place + 1 :]:
            pair = Judged(concat)
            meet(trace, pair, first, second)
            if pair.skip is not None and pair.direct and crosses_resolution(trace, pair.fork, pair.stream, concat):
                return True
    return False


def _is_local(trace: Trace, judged: Judged) -> bool:
    """Whether the stream never leaves the module that concatenates, and that is not the network."""
    inside = judged.concat.call
    values = trace.values
    own = values[judged.stream].ancestors & ~values[judged.fork].ancestors
    begun = [value for value in members(trace, own) if value.ancestors >> judged.fork & 1]
    return trace.calls[inside].parent >= 0 and all(inside in trace.callers(value.call) for value in begun)


def _how(trace: Trace, judged: Judged) -> str:
    if judged.scaled:
        side = "skip" if judged.scaled == (judged.skip,) else "stream"
        return f"whose {side} the network multiplies by a number of its own"
    return "" if judged.direct else "through layers of its own"


def _kind(trace: Trace, judged: Judged) -> type:
    """Class of the module in whose forward the concat stands: the decoder's blocks, or the network."""
    return type(trace.calls[judged.concat.call].module)

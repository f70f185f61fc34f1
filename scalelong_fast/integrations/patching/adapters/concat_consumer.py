"""Adapter for networks that concatenate in a forward of their own: the module that receives the concat is hooked."""

from typing import Any

import torch
from torch import Tensor, nn

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.adapters.base import Adapter, ExampleInputs, Finding, Handle
from scalelong_fast.integrations.patching.concat_sides import DOUBTFUL, Judged
from scalelong_fast.integrations.patching.long_concats import in_order, judge, table
from scalelong_fast.integrations.patching.lost_gradients import refuse_lost_gradients
from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.integrations.patching.state import ScaleLongState
from scalelong_fast.integrations.patching.trace import Trace, trace


class ConcatConsumer(Adapter):
    """Stacks of features, decoder loops, recursion: found in one run of the network, see :mod:`.long_concats`.

    A hook of the module that receives a concat scales the slice of its input that is the skip. Where a function
    receives it, but the skip came as an argument of the module that concatenates, that argument is scaled. Both are
    right under activation checkpointing too, which runs the hooks again.
    """

    name = "concat-consumer"
    looks_for = "torch.cat of the stream with an older feature it came from, handed to a module"
    last_resort = True

    def find(self, model: nn.Module, example_inputs: ExampleInputs | None) -> Finding:
        if example_inputs is None:
            return Finding(seen="not looked for, since that takes example_inputs")
        seen, judged = run_and_judge(model, example_inputs)
        long = in_order(seen, judged)
        if not long:
            listed = f"\n{table(seen, judged)}" if judged else ""
            return Finding(seen=f"{len(judged)} concats, none of them a long skip{listed}")
        sites = []
        for i, concat in enumerate(long, start=1):
            receivers, obstacle = receivers_of(seen, concat.concat.result)
            argument = argument_of(seen, concat) if obstacle else None
            if argument is not None:
                sites.append(site_of(seen, concat, i, [argument], whole=True))
                continue
            if obstacle:
                raise UserError(
                    f"model: {type(model).__name__} has {len(long)} long skips, but concat {judged.index(concat) + 1} "
                    f"{obstacle}, so that no module's input can be scaled.\n{table(seen, judged)}\n"
                    f"Pass expect={len(long)} to have the concats themselves intercepted, or put "
                    "scalelong_fast.integrations.SkipConcat into the network's code."
                )
            sites.append(site_of(seen, concat, i, receivers))
        return Finding(sites, seen=f"{len(judged)} concats, {len(sites)} of them long skips")

    def attach(self, model: nn.Module, state: ScaleLongState, sites: list[Site]) -> list[Handle]:
        modules = dict(model.named_modules())
        hooks = []
        for site in sites:
            for name, argument in site.extra["receivers"]:
                if name not in modules:
                    raise UserError(
                        f"model: {type(model).__name__} has no module {name!r}, but the patch has a long skip there. "
                        "It was made for another network."
                    )
                hooks.append((modules[name], ScaleSlice(state, site, argument)))
        # First: what others hook on sees the scaled feature, as it would if the network had scaled it.
        return [module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for module, hook in hooks]


class ScaleSlice:
    """Hook of a module that receives a concat: scales the part of it that is the long skip, or an argument as a whole.

    Args:
        state: the coefficients.
        site: the long skip; ``extra`` has the sizes of the slice, see :func:`site_of`.
        argument: position or keyword of the concat among the arguments of the module's forward.
    """

    def __init__(self, state: ScaleLongState, site: Site, argument: int | str):
        self.state, self.argument = state, argument
        self.i, self.dim, self.skip_first, self.module = site.i, site.dim, site.skip_first, site.module
        self.channels: tuple[int, ...] = tuple(site.extra["channels"])

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
        concat = self._given(args, kwargs)
        refuse_lost_gradients(self.state, self.module)
        if len(self.channels) == 1:
            return self._replaced(args, kwargs, self.state(concat, self.i, module))
        first, second = concat.split(self.channels, self.dim)
        skip = first if self.skip_first else second
        scaled = self.state(skip, self.i)
        if scaled is skip:
            return None
        halves = (scaled, second) if self.skip_first else (first, scaled)
        return self._replaced(args, kwargs, torch.cat(halves, self.dim))

    def _replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> tuple:
        if isinstance(self.argument, str):
            return args, {**kwargs, self.argument: out}
        return (*args[: self.argument], out, *args[self.argument + 1 :]), kwargs

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The concat, where it is what it was when the network was patched."""
        argument, dim = self.argument, self.dim
        by_name = isinstance(argument, str)
        there = argument in kwargs if by_name else argument < len(args)
        value = (kwargs[argument] if by_name else args[argument]) if there else None
        if not isinstance(value, Tensor) or value.dim() < 3 or value.shape[dim] != sum(self.channels):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"argument {argument!r} of {self.module!r}: got {got}, expected "
                f"{' and '.join(map(str, self.channels))} channels, as it received when the network was patched. Call "
                "remove_scalelong, and apply_scalelong with example_inputs of the present kind."
            )
        return value


def run_and_judge(model: nn.Module, example_inputs: ExampleInputs) -> tuple[Trace, list[Judged]]:
    """Run the network once and say of each concat what it is.

    Raises:
        UserError: one of them may or may not be a long skip; says which.
    """
    refuse_lazy(model)
    seen = trace(model, example_inputs)
    judged = judge(seen)
    if any(concat.verdict == DOUBTFUL for concat in judged):
        raise UserError(
            f"model: which concats of {type(model).__name__} are long skips is not clear, and nothing is patched by "
            f"guess.\n{table(seen, judged)}\nPut scalelong_fast.integrations.SkipConcat into the network's code, pass "
            "the part of it that is one network, or write an adapter (scalelong_fast.integrations.register_adapter)."
        )
    return seen, judged


def receivers_of(trace: Trace, concat: int) -> tuple[list[tuple[str, int | str]], str]:
    """The modules that a concat is handed to, each with the position or keyword; or why hooking them is not enough."""
    takers = [number for number, call in enumerate(trace.calls) if concat in call.inputs.values()]
    if any(concat in call.inside for call in trace.calls):
        return [], "is handed over inside a list, tuple or dict"
    if concat in trace.calls[0].outputs:
        return [], "is returned by the network"
    if any(not set(trace.callers(by)) & set(takers) for by in trace.values[concat].used) or not takers:
        return [], "is not handed to a module first, but to a function"
    receivers = []
    for number in takers:
        call = trace.calls[number]
        if set(trace.callers(call.parent)) & set(takers):
            continue  # inside another one
        places = [key for key, value in call.inputs.items() if value == concat]
        if trace.calls_of(call.name) > 1 or len(places) > 1:
            return [], f"is handed to {call.name!r}, which is used more than once"
        receivers.append((call.name, places[0]))
    return receivers, ""


def argument_of(trace: Trace, judged: Judged) -> tuple[str, int | str] | None:
    """The module around a concat that was given the skip as an argument and uses it for nothing else, and its place."""
    skip = judged.concat.operands[judged.skip]
    for number in trace.callers(judged.concat.call):
        call = trace.calls[number]
        uses = [by for by in trace.values[skip].used if number in trace.callers(by)]
        places = [key for key, value in call.inputs.items() if value == skip]
        if len(places) == 1 and len(uses) == 1 and call.parent >= 0 and trace.calls_of(call.name) == 1:
            return call.name, places[0]
    return None


def site_of(trace: Trace, judged: Judged, i: int, receivers: list[tuple[str, int | str]], whole: bool = False) -> Site:
    """The site of a long skip.

    ``extra`` has ``receivers``, pairs (module, argument), and ``channels``, the sizes of the concat's two sides, or
    that of the skip where the argument is the skip as a ``whole``.
    """
    concat, side = judged.concat, judged.skip
    shape = concat.shapes[side]
    tokens = concat.dim != 1
    # (B, H, W, C) has no dimension that a gate of channels or tokens belongs to; the shape lets the error say so.
    last = tokens and len(shape) != 3
    sides = [shape] if whole else concat.shapes
    kind = "skip as an argument" if whole else "concat"
    if judged.scaled == (side,):
        kind = "concat with the network's own factor on the skip"
    return Site(
        i,
        receivers[0][0],
        kind,
        width=None if last else shape[1],
        dim=-1 if tokens else 1,
        skip_first=side == 0,
        shapes=tuple(shape) if last else None,
        extra={
            "receivers": [list(receiver) for receiver in receivers],
            "channels": [size[concat.dim] for size in sides],
        },
    )


def refuse_lazy(model: nn.Module) -> None:
    """A run would give lazy modules their shapes for good."""
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedTensorMixin)]
    if lazy:
        raise UserError(
            f"model: {type(model).__name__} has lazy parameters without a shape, such as {lazy[0]!r}. Run it once "
            "before it is patched."
        )

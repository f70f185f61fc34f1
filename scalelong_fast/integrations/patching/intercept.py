"""Adapter of last resort: the network's calls of ``torch.cat`` themselves are intercepted, where the user says so."""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.adapters.base import Adapter, ExampleInputs, Finding, Handle
from scalelong_fast.integrations.patching.adapters.concat_consumer import run_and_judge, site_of
from scalelong_fast.integrations.patching.long_concats import in_order, table
from scalelong_fast.integrations.patching.lost_gradients import frames, runs_function
from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.integrations.patching.state import ScaleLongState
from scalelong_fast.integrations.patching.trace import CONCATS, concat_arguments, eagerly


class InterceptedConcats(Adapter):
    """Long skips whose concat goes to functions, so that no module's input could be scaled.

    Every forward counts its concats; those that were long skips in the run on ``example_inputs`` are scaled on their
    way into ``torch.cat``. A forward that concatenates otherwise raises, as does activation checkpointing around a long
    skip: there the second run would go by unscaled, and the gradients with it. A compiled network raises; compiled
    parts of one run eagerly.
    """

    name = "intercepted-concats"
    looks_for = "torch.cat of the stream with an older feature it came from"
    opt_in = True

    def find(self, model: nn.Module, example_inputs: ExampleInputs | None) -> Finding:
        if example_inputs is None:
            return Finding(seen="not looked for, since that takes example_inputs")
        trace, judged = run_and_judge(model, example_inputs)
        listed = table(trace, judged)
        sites = []
        for i, concat in enumerate(in_order(trace, judged), start=1):
            where = trace.calls[concat.concat.call].name
            site = site_of(trace, concat, i, [(where, "")])
            site.kind, site.plan = "intercepted concat", "multiply, on the way into torch.cat"
            site.extra = {
                "concat": concat.concat.number,
                "concats": trace.num_concats,
                "channels": site.extra["channels"],
            }
            sites.append(site)
        print(f"{type(model).__name__}: intercepting {len(sites)} of {trace.num_concats} concats.\n{listed}")
        return Finding(sites, seen=f"{len(judged)} concats, {len(sites)} of them long skips\n{listed}")

    def attach(self, model: nn.Module, state: ScaleLongState, sites: list[Site]) -> list[Handle]:
        modes: list[_ScaleConcats] = []
        enter, leave = _Enter(state, sites, modes), _Leave(modes)
        return [
            model.register_forward_pre_hook(enter, prepend=True),
            model.register_forward_hook(leave, always_call=True),
        ]


class _Enter:
    """The hook before the network: interception begins."""

    def __init__(self, state: ScaleLongState, sites: list[Site], modes: list["_ScaleConcats"]):
        self.state, self.sites, self.modes = state, sites, modes

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_compiled():
            raise UserError(
                "model: its long skips are intercepted (expect=...), which torch.compile and torch.export cannot "
                "follow. Run it eagerly, or put scalelong_fast.integrations.SkipConcat into the network's code."
            )
        mode = _ScaleConcats(self.state, self.sites, sys._getframe(1))
        mode.begin()
        self.modes.append(mode)


class _Leave:
    """The hook after the network, also where it failed: interception ends."""

    def __init__(self, modes: list["_ScaleConcats"]):
        self.modes = modes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.modes:
            self.modes.pop().end(finished=output is not None)


class _ScaleConcats(TorchFunctionMode):
    """Scales the long skips of one forward on their way into ``torch.cat``.

    Args:
        state: the coefficients.
        sites: by ``extra["concat"]`` the number of their concat, among ``extra["concats"]`` in a forward.
        root: the frame that calls the network.
    """

    def __init__(self, state: ScaleLongState, sites: list[Site], root: FrameType):
        super().__init__()
        self.state, self.root = state, root
        self.sites = {site.extra["concat"]: site for site in sites}
        self.expected = sites[0].extra["concats"]
        self.count = 0
        self.training = torch.is_grad_enabled()
        self.eager = eagerly()

    def begin(self) -> None:
        """Intercept from here on."""
        self.eager.__enter__()
        self.__enter__()

    def end(self, finished: bool) -> None:
        """Intercept no more; raise where a forward that has finished made another number of concats."""
        self.__exit__(None, None, None)
        self.eager.__exit__(None, None, None)
        self.root = None
        if finished and self.count != self.expected:
            raise UserError(
                f"model: this forward made {self.count} concats, and {self.expected} when its long skips were found; "
                "which of them are long skips is not known. Call remove_scalelong, and apply_scalelong with "
                "example_inputs of the present kind."
            )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in CONCATS:
            return function(*args, **kwargs)
        site = self.sites.get(self.count)
        self.count += 1
        if site is None:
            return function(*args, **kwargs)
        tensors, dim = concat_arguments(args, kwargs)
        self._check(site, tensors, dim)
        side = 0 if site.skip_first else 1
        tensors[side] = self.state(tensors[side], site.i)
        return function(tensors, dim)

    def _check(self, site: Site, tensors: list[Tensor], dim: int) -> None:
        dims = tensors[0].dim()
        channels = [tensor.shape[site.dim] for tensor in tensors if tensor.dim() >= 3]
        if channels != list(site.extra["channels"]) or dim % dims != site.dim % dims:
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise UserError(
                f"model: concat {self.count} of this forward is of {shapes} along dim {dim}, expected "
                f"{' and '.join(map(str, site.extra['channels']))} channels as when its long skips were found. Call "
                "remove_scalelong, and apply_scalelong with example_inputs of the present kind."
            )
        if self.training and any(is_checkpoint(frame) for frame in frames(until=self.root)):
            raise UserError(
                f"model: concat {self.count} of this forward runs under activation checkpointing. Its long skip is "
                "intercepted (expect=...), and the second run in the backward would go by unscaled, with wrong "
                "gradients. Switch checkpointing off, or put scalelong_fast.integrations.SkipConcat into the network's "
                "code."
            )


def is_checkpoint(frame: FrameType) -> bool:
    """Whether a frame runs something that will be run again in the backward."""
    return frame.f_code.co_filename == checkpoint.__file__ or runs_function(frame, "forward")


def is_compiled() -> bool:
    """Whether the compiler looks at the code that runs, or will at the functions it calls."""
    if torch.compiler.is_compiling():
        return True
    # Where the compiler gives up on a function it runs it as it is, and tries again on those inside.
    compiler = sys.modules.get("torch._C._dynamo.eval_frame")
    return compiler is not None and compiler.get_eval_frame_callback() not in (None, False)

"""What a patch adds to a network: one child module that holds the coefficients and the sites they belong to."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.deferred import defer_skip
from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.ops.differentiable import under_functorch
from scalelong_fast.scaling.base import Kappa, LongSkipScaling, scale_skip

#: Name of the child module, and so the prefix of the gates in the network's ``state_dict``.
NAME = "scalelong"


class ScaleLongState(nn.Module):
    """The coefficients κ_i of a patched network, its child ``scalelong``.

    Being a child it takes part in ``parameters()``, ``state_dict()``, ``to()``, ``deepcopy``, DDP and FSDP.

    Args:
        scaling: κ_1 … κ_N.
        sites: one per long skip, any order.
        settings: what :func:`apply_scalelong` was asked for, in its canonical form; see :func:`canonical_settings`.

    Attributes:
        handles: of the hooks, each with ``remove()``.
        before: attributes of the network that the patch has replaced, for when it is removed.
        last_kappas: i to the κ_i of the last forward that was not compiled, detached.
    """

    def __init__(self, scaling: LongSkipScaling, sites: list[Site], settings: dict[str, Any]):
        super().__init__()
        self.scaling = scaling
        self.sites = sorted(sites, key=lambda site: site.i)
        self.settings = dict(settings)
        self.handles: list[Any] = []
        self.before: dict[str, Any] = {}
        self.last_kappas: dict[int, Kappa] = {}

    @property
    def fused(self) -> bool:
        """Whether the fused plan may be taken where it gains."""
        return self.settings["fused"]

    def forward(self, skip: Tensor, i: int | None = None, reader: nn.Module | None = None) -> Tensor:
        """κ_i ⊙ skip, shape and dtype of ``skip``: ``(B, N_i, ...)``; ``skip`` itself for a κ of exactly 1.

        Args:
            skip: the feature.
            i: its index; without one ``skip`` is handed on, as it must be where the network runs all its children one
                after the other (``nn.Sequential``).
            reader: the module that will concatenate it, where one is known: the product may then be put off until it is
                known what follows (:mod:`scalelong_fast.integrations.patching.deferred`).
        """
        if i is None:
            return skip
        kappa = self.kappa(skip, i)
        if reader is None or not self.fused or torch.compiler.is_compiling():  # the compiler fuses by itself
            return scale_skip(skip, kappa)
        return defer_skip(skip, kappa, reader, partial(setattr, self.sites[i - 1], "taken"))

    def kappa(self, skip: Tensor, i: int, pooled: Tensor | None = None) -> Kappa:
        """κ_i for a caller that makes the product itself: float, 0-dim tensor or ``(B, N_i)``."""
        kappa = self.scaling.kappa(i, skip, pooled)
        self.note(skip, i, kappa)
        return kappa

    def note(self, skip: Tensor, i: int, kappa: Kappa) -> None:
        """Keep the skip's shape and layout and κ for the report.

        Not inside a compiled network, which would guard them, nor under ``torch.func``, whose tensors must not get out.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or under_functorch():
            return
        site = self.sites[i - 1]
        site.shapes, site.layout = tuple(skip.shape), layout_of(skip)
        if not isinstance(kappa, Tensor):
            self.last_kappas[i] = kappa
        elif type(kappa) is Tensor:  # others, such as fake tensors, belong to a mode that ends
            self.last_kappas[i] = kappa.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScaleLongState":
        """A copy as a part of the network's copy, whose hooks are copied with it.

        Raises:
            UserError: it is copied by itself. The network's hooks would go on asking the original, and a copy that
                somebody trains in its place (PEFT) would learn nothing.
        """
        if not memo:
            raise UserError(
                f"model: its child {NAME!r} is copied by itself, without the hooks that ask it. Copy the network, or "
                f"{NAME}.scaling, which holds the gates; of PEFT's options that is modules_to_save=['scaling']."
            )
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def record(self) -> dict[str, Any]:
        """Settings and sites as plain data: enough for :func:`apply_record` to patch such a network again."""
        return {**self.settings, "sites": [site.to_dict() for site in self.sites]}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.settings.items() if value is not None)


def state_of(model: nn.Module) -> ScaleLongState | None:
    """The patch of ``model``, or None; looks through ``torch.compile``'s wrapper."""
    state = unwrapped(model)._modules.get(NAME)
    return state if isinstance(state, ScaleLongState) else None


def patched_parts(model: nn.Module) -> list[str]:
    """Qualified names of the parts of ``model`` that are patched by themselves, as inside DDP, PEFT or an average."""
    own = state_of(model)
    states = [name for name, part in model.named_modules() if isinstance(part, ScaleLongState) and part is not own]
    return [name.rpartition(".")[0] for name in states]


def named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` by the qualified names they have where no part of it is compiled."""
    return {plain_name(name): unwrapped(part) for name, part in model.named_modules()}


def plain_name(name: str) -> str:
    """A qualified name without the wrappers that ``torch.compile`` puts around modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``'s wrapper; any other is returned as it is."""
    # Asked by structure: importing the compiler only to name its class takes a second.
    while "_orig_mod" in model._modules:
        model = model._modules["_orig_mod"]
    return model


def layout_of(tensor: Tensor) -> str:
    """``contiguous``, ``channels_last`` or ``strided``."""
    if tensor.is_contiguous():
        return "contiguous"
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if channels_last is not None and tensor.is_contiguous(memory_format=channels_last):
        return "channels_last"
    return "strided"

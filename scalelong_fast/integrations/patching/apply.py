"""Put scaled long skip connections into a network that exists, and take them out again."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.adapters import ExampleInputs, find_sites, get_adapter
from scalelong_fast.integrations.patching.check import (
    RECORD_VERSION,
    canonical_settings,
    check_module,
    check_patchable,
    check_record,
    check_same,
    refuse_patched_part,
)
from scalelong_fast.integrations.patching.pretrained import clear_config, write_config
from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.integrations.patching.state import NAME, ScaleLongState, state_of, unwrapped
from scalelong_fast.scaling import SCALINGS, LearnableScaling, LongSkipScaling, create_scaling


def apply_scalelong(
    model: nn.Module,
    scaling: str = "ls",
    kappa: float = 0.7,
    shared: bool = False,
    fused: bool = True,
    init: str = "identity",
    example_inputs: ExampleInputs | None = None,
    expect: int | None = None,
) -> nn.Module:
    """Scale the long skip connections of ``model``, in place.

    The network gets a child module ``scalelong`` with the coefficients, and hooks that ask it; no forward is replaced.
    Calling it again with the same settings changes nothing. All code that ``torch.compile`` made in this process is
    dropped (``torch.compiler.reset()``) and made again at the next call: patch before you compile.

    Args:
        model: a network with long skip connections.
        scaling: ``ls`` (learnable gates, ScaleLong Eq. 9–13), ``cs`` (κ^(i−1), Eq. 8), or another name that
            :func:`~scalelong_fast.scaling.create_scaling` knows.
        kappa: κ of the constants, and the value that ``learnable`` starts from; without a meaning for gates and
            ``none``.
        shared: of ``ls``: one gate for all skips, with adapters where they differ in width, instead of a gate per skip.
        fused: take kernels that scale and concatenate, or more, in one pass, where they gain.
        init: of gates: ``identity`` starts at κ = 0.9975, so that a trained network is left nearly as it was; ``paper``
            starts near 0.5.
        example_inputs: a tuple of forward arguments (or a dict of keyword arguments) with which the network may be run
            once. Needed only where the modules do not show what the skips are; the error says so.
        expect: the number of long skips; another number raises. It also allows interception of the concats, the last
            way where the network's structure is unknown.

    Returns:
        ``model``.

    Raises:
        UserError: a bad argument; a network whose long skips are unknown or ambiguous, with what was seen; a network
            that is patched with other settings, or wrapped for parallel training already. Nothing is changed then.
    """
    settings = canonical_settings(scaling, kappa, shared, fused, init, expect)
    check_patchable(model)
    state = state_of(model)
    if state is not None:
        check_same(state, settings)
        return model
    network = unwrapped(model)
    adapter, finding = find_sites(network, example_inputs, expect)
    if expect is not None and len(finding.sites) != expect:
        raise UserError(
            f"expect: got {expect}, but {adapter.name} found {len(finding.sites)}:\n{listed(finding.sites)}"
        )
    patch(network, {**settings, "version": RECORD_VERSION, "adapter": adapter.name}, finding.sites)
    forget_compiled(model)
    return model


def apply_record(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Patch ``model`` as another network of its kind was patched; nothing is searched, no inputs are needed.

    Args:
        model: a network that is not patched.
        record: what :meth:`ScaleLongState.record` gave, e.g. read from a file.

    Returns:
        ``model``; its gates are new.

    Raises:
        UserError: the network is patched already, or has no such sites; a record that is damaged or of another version.
            Nothing is changed then.
    """
    check_patchable(model)
    if state_of(model) is not None:
        raise UserError("model: it is patched already. Call remove_scalelong(model) first; that drops its gates.")
    sites = check_record(record)
    try:
        patch(unwrapped(model), {key: value for key, value in record.items() if key != "sites"}, sites)
    except KeyError as error:  # adapters read what their sites have in extra before they hook anything
        raise UserError(f"patch: its sites are damaged: they have no {error}. Save it again.") from error
    forget_compiled(model)
    return model


def remove_scalelong(model: nn.Module) -> nn.Module:
    """Take the patch out of ``model``, bit for bit; a network without one is left as it is.

    The gates are dropped with what they learned: save them first (``save_scalelong``). Compiled code is dropped too, as
    by :func:`apply_scalelong`.

    Returns:
        ``model``.

    Raises:
        UserError: not ``model`` is patched, but a part of it.
    """
    check_module(model)
    refuse_patched_part(model)
    state = state_of(model)
    if state is None:
        return model
    for handle in state.handles:
        handle.remove()
    del unwrapped(model)._modules[NAME]
    clear_config(unwrapped(model), state.before)
    forget_compiled(model)
    return model


def patch(network: nn.Module, settings: dict[str, Any], sites: Sequence[Site]) -> ScaleLongState:
    """Create the coefficients, register them and hook the sites."""
    adapter = get_adapter(settings["adapter"])
    sites = sorted(sites, key=lambda site: site.i)
    state = ScaleLongState(make_scaling(settings, sites), list(sites), settings)
    place(state, network)
    state.handles = adapter.attach(network, state, state.sites)
    network.add_module(NAME, state)
    write_config(network, state)
    return state


def make_scaling(settings: dict[str, Any], sites: Sequence[Site]) -> LongSkipScaling:
    """κ_1 … κ_N for these sites, new."""
    name = settings["scaling"]
    if issubclass(SCALINGS[name], LearnableScaling):
        unknown = [site.module for site in sites if site.width is None]
        last = next((site.shapes for site in sites if site.width is None and site.shapes), None)
        if last is not None:
            raise UserError(
                f"scaling: got {name!r}, but {', '.join(repr(module) for module in unknown)} concatenates features "
                f"{last} with the channels last. Gates take (B, C, ...) or tokens (B, L, D). Scalings without gates, "
                "such as 'cs', take any."
            )
        if unknown:
            raise UserError(
                f"example_inputs: the gates of scaling {name!r} need the width of every long skip, which the modules "
                f"do not show at {', '.join(repr(module) for module in unknown)}. Pass a tuple of forward arguments; "
                "the network is then run once. Scalings without gates, such as 'cs', need none."
            )
    options = {} if settings["init"] is None else {"init": settings["init"]}
    return create_scaling(
        name,
        num_skips=len(sites),
        widths=[site.width or 1 for site in sites],
        kappa=settings["kappa"],
        **options,
    )


def place(state: ScaleLongState, network: nn.Module) -> None:
    """Move the coefficients to the network's device and floating dtype, and into its mode."""
    parameter = next((p for p in network.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        # Storage formats (8 bits and less) are no dtypes to train in.
        wide = parameter.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        state.to(parameter.device, parameter.dtype if wide else torch.float32)
    state.train(network.training)


def forget_compiled(model: nn.Module) -> None:
    """Drop code that was compiled for the network without the patch (or with it): hooks are no guard of its reuse.

    All compiled code goes, since a function or network around this one does not show that it was compiled, and one that
    was compiled for another network of the class is reused for a new one. A warning is given where the network itself
    or a part of it was.
    """
    if "torch._dynamo" not in sys.modules:
        return  # the compiler was never imported, so nothing is compiled
    torch.compiler.reset()
    if unwrapped(model) is not model or any(
        getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
        for module in model.modules()
    ):
        warnings.warn(
            "The network was compiled before its long skips were changed: compiled code was dropped "
            "(torch.compiler.reset()), and the next call compiles again.",
            stacklevel=3,
        )


def listed(sites: Sequence[Site]) -> str:
    """One line per site, outermost first."""
    ordered = sorted(sites, key=lambda site: site.i)
    return "\n".join(f"- skip {site.i}: {site.kind} of {site.module or 'the network'!r}" for site in ordered)

"""What :func:`apply_scalelong` refuses before it looks at a network's structure."""

from typing import Any

import torch
from torch import nn

from scalelong_fast.errors import UserError, check_bool, check_range, invalid, unknown_name
from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.integrations.patching.state import NAME, ScaleLongState, patched_parts, state_of, unwrapped
from scalelong_fast.models.hub import Backbone
from scalelong_fast.scaling import SCALINGS, LearnableScaling, NoScaling, resolve_scaling
from scalelong_fast.scaling.constant import check_kappa
from scalelong_fast.scaling.gates import INITS

#: Version of the plain data that :meth:`ScaleLongState.record` gives.
RECORD_VERSION = 1

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")


def canonical_settings(
    scaling: str, kappa: float, shared: bool, fused: bool, init: str, expect: int | None
) -> dict[str, Any]:
    """The settings with names resolved and None for what has no meaning, so that equal patches have equal ones.

    Raises:
        UserError: a bad value.
    """
    check_bool("shared", shared)
    check_bool("fused", fused)
    name = resolve_scaling(scaling)
    if name == "ls":
        name = "ls" if shared else "ls-individual"
    elif shared:
        raise invalid("shared", shared, f"False with scaling {name!r}", "Only 'ls' has a gate that skips can share.")
    if init not in INITS:
        raise unknown_name("init", init, INITS)
    if expect is not None:
        check_range("expect", expect, low=1, integer=True)
    gated = issubclass(SCALINGS[name], LearnableScaling)
    has_kappa = not gated and not issubclass(SCALINGS[name], NoScaling)
    return {
        "scaling": name,
        "kappa": check_kappa(kappa) if has_kappa else None,
        "shared": name == "ls",
        "fused": fused,
        "init": init if gated else None,
        "expect": expect,
    }


def check_module(model: Any) -> None:
    """Refuse what is no network, such as a pipeline, and say which of its parts is one."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("model: it is TorchScript, which takes no hooks. Patch the network it was made from.")
    if isinstance(model, nn.Module):
        return
    parts = [name for name in ("unet", "transformer", "decoder") if isinstance(getattr(model, name, None), nn.Module)]
    mend = f"Pass its network, {parts[0]!r}." if parts else ""
    raise invalid("model", type(model).__name__, "a torch.nn.Module", mend)


def check_patchable(model: Any) -> None:
    """Refuse what cannot take a patch now.

    Raises:
        UserError: no network; one of our own; wrapped for parallel training already; the patch's name is taken; a part
            is patched.
    """
    check_module(model)
    network = unwrapped(model)
    for name, module in network.named_modules():
        if isinstance(module, Backbone):
            where = f"its part {name!r}" if name else "it"
            raise UserError(
                f"model: {where} is a {type(module).__name__} of scalelong_fast, which scales its long skips itself. "
                "Choose the scaling where it is made: create_model(name, scaling=...)."
            )
    if state_of(network) is None:
        refuse_parallel(network)
    taken = network._modules.get(NAME, getattr(network, NAME, None))
    if taken is not None and not isinstance(taken, ScaleLongState):
        raise UserError(
            f"model: {type(network).__name__} has an attribute {NAME!r} of its own, where the patch would belong."
        )
    refuse_patched_part(model)


def refuse_parallel(network: nn.Module) -> None:
    """The network, or a part of it, has its parameters synchronised between processes: gates would not be."""
    for name, module in network.named_modules():
        # By name: importing FSDP takes a second.
        found = [cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS]
        if not found:
            continue
        where = f"its part {name!r}" if name else "it"
        if "FSDP" in found[0] or "Fully" in found[0]:
            raise UserError(f"model: {where} is sharded (FSDP) already. Patch the network first, then shard it.")
        raise UserError(
            f"model: {where} is wrapped. {found[0]} has collected its parameters already, and gates added now would "
            "not be trained together. Patch the network first, then wrap it."
        )


def check_record(record: Any) -> list[Site]:
    """The sites in the plain data of a patch, e.g. read from a file.

    Raises:
        UserError: data of another version, or from which no patch can be made.
    """
    if not isinstance(record, dict):
        raise invalid("patch", record, "a dict, as save_scalelong or save_pretrained writes it")
    if record.get("version") != RECORD_VERSION:
        raise invalid("version of the patch", record.get("version"), f"{RECORD_VERSION}", "Update scalelong_fast.")
    needed = ("scaling", "kappa", "shared", "fused", "init", "expect", "adapter", "sites")
    absent = [key for key in needed if key not in record]
    if absent:
        raise UserError(f"patch: it is damaged: it has no {', '.join(absent)}. Save it again.")
    if str(record["scaling"]) not in SCALINGS:
        raise unknown_name("scaling of the patch", record["scaling"], SCALINGS)
    try:
        sites = [Site.from_dict(site) for site in record["sites"]]
        numbers = sorted(site.i for site in sites)
    except TypeError as error:
        raise UserError(f"patch: its sites are damaged ({error}). Save it again.") from error
    if not sites or numbers != list(range(1, len(sites) + 1)):
        raise UserError(f"patch: its sites are damaged: got skips {numbers}, expected 1 … N. Save it again.")
    return sites


def refuse_patched_part(model: nn.Module) -> None:
    """What is patched is a part of ``model``, not ``model``."""
    parts = patched_parts(model)
    if parts:
        raise UserError(
            f"model: its part {parts[0]!r} is patched, not the whole {type(model).__name__}. Pass that part."
        )


def check_same(state: ScaleLongState, settings: dict[str, Any]) -> None:
    """Refuse settings other than those a network is patched with."""
    changed = [key for key, value in settings.items() if state.settings.get(key) != value]
    # Without a statement of the number any number is as expected; the right number is no change either.
    if "expect" in changed and settings["expect"] in (None, len(state.sites)):
        changed.remove("expect")
    if changed:
        differences = ", ".join(f"{key} = {state.settings.get(key)!r} (asked: {settings[key]!r})" for key in changed)
        raise UserError(
            f"model: it is patched already, with {differences}. Call remove_scalelong(model) first; that drops its "
            "gates with what they learned."
        )

"""Scaled long skip connections in other people's networks."""

from scalelong_fast.integrations.patching.adapters import Adapter, Finding, list_adapters, register_adapter
from scalelong_fast.integrations.patching.apply import apply_record, apply_scalelong, remove_scalelong
from scalelong_fast.integrations.patching.pretrained import follow_diffusers
from scalelong_fast.integrations.patching.report import SiteReport, scalelong_report
from scalelong_fast.integrations.patching.saving import load_scalelong, save_scalelong
from scalelong_fast.integrations.patching.site import Site
from scalelong_fast.integrations.patching.state import ScaleLongState, state_of

__all__ = [
    "Adapter",
    "Finding",
    "ScaleLongState",
    "Site",
    "SiteReport",
    "apply_record",
    "apply_scalelong",
    "list_adapters",
    "load_scalelong",
    "register_adapter",
    "remove_scalelong",
    "save_scalelong",
    "scalelong_report",
    "state_of",
]

follow_diffusers()

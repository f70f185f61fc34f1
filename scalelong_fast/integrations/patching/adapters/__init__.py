"""Structures of networks that can be patched, and the registry of adapters that know them."""

from scalelong_fast.integrations.patching.adapters.base import Adapter, ExampleInputs, Finding, Handle
from scalelong_fast.integrations.patching.adapters.concat_consumer import ConcatConsumer
from scalelong_fast.integrations.patching.adapters.registry import (
    find_sites,
    get_adapter,
    list_adapters,
    register_adapter,
)
from scalelong_fast.integrations.patching.adapters.skip_argument import SkipArgument
from scalelong_fast.integrations.patching.adapters.tuple_of_skips import TupleOfSkips
from scalelong_fast.integrations.patching.intercept import InterceptedConcats

# In the order they are asked.
for _adapter in (TupleOfSkips(), SkipArgument(), ConcatConsumer(), InterceptedConcats()):
    register_adapter(_adapter)

__all__ = [
    "Adapter",
    "ExampleInputs",
    "Finding",
    "Handle",
    "find_sites",
    "get_adapter",
    "list_adapters",
    "register_adapter",
]

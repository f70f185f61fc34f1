"""The adapters that :func:`apply_scalelong` asks, and how it chooses."""

from torch import nn

from scalelong_fast.errors import UserError, unknown_name
from scalelong_fast.integrations.patching.adapters.base import Adapter, ExampleInputs, Finding

_adapters: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> Adapter:
    """Let :func:`apply_scalelong` know another structure of networks.

    Args:
        adapter: an instance; one of the same name is replaced.

    Returns:
        ``adapter``.

    Raises:
        UserError: not an :class:`Adapter`, or without a name.
    """
    if not isinstance(adapter, Adapter):
        raise UserError(
            f"adapter: got {adapter!r}, expected an instance of Adapter. Subclass scalelong_fast.integrations.Adapter."
        )
    if not adapter.name:
        raise UserError(f"adapter: {type(adapter).__name__} has no name. Set the class attribute 'name'.")
    _adapters[adapter.name] = adapter
    return adapter


def list_adapters() -> list[str]:
    """Names of the adapters, in the order they are asked."""
    return list(_adapters)


def get_adapter(name: str) -> Adapter:
    """The adapter of this name; an unknown one raises with the nearest names."""
    if name not in _adapters:
        raise unknown_name("adapter", name, _adapters)
    return _adapters[name]


def find_sites(
    model: nn.Module, example_inputs: ExampleInputs | None, expect: int | None = None
) -> tuple[Adapter, Finding]:
    """The one adapter that knows the structure of ``model``, and what it found.

    Adapters that read modules come first, those of last resort next, those to opt in to last; within each of the three
    exactly one must find sites.

    Raises:
        UserError: none of them or several do; says what each looked for and saw.
    """
    seen = []
    stages = [
        [a for a in _adapters.values() if not a.last_resort and not a.opt_in],
        [a for a in _adapters.values() if a.last_resort and not a.opt_in],
        [a for a in _adapters.values() if a.opt_in and expect is not None],
    ]
    for stage, adapters in enumerate(stages):
        found = []
        for adapter in adapters:
            try:
                finding = adapter.find(model, example_inputs)
            except UserError as error:
                # A structure that was known but not readable goes to the interception that the user asked for.
                if expect is None or stage == 2:
                    raise
                finding = Finding(seen=str(error))
            seen.append(f"- {adapter.name} looks for {adapter.looks_for}: {finding.seen or 'nothing'}")
            if finding.sites:
                found.append((adapter, finding))
        if len(found) > 1:
            raise UserError(
                f"model: {type(model).__name__} is ambiguous, since several adapters find long skips in it.\n"
                + "\n".join(seen)
                + "\nPass the part of it that is one network."
            )
        if found:
            return found[0]
    raise UserError(unknown_network(model, example_inputs, seen))


def unknown_network(model: nn.Module, example_inputs: ExampleInputs | None, seen: list[str]) -> str:
    """The message for a network in which no adapter finds a long skip."""
    lines = [f"model: no long skip connections were found in {type(model).__name__}; nothing was changed.", *seen]
    if example_inputs is None:
        lines.append(
            "Pass example_inputs, a tuple of arguments for its forward: the network is then run once, and its data "
            "flow shows where it concatenates."
        )
    else:
        lines.append(
            "Use scalelong_fast.integrations.SkipConcat in the network's code instead of torch.cat, or write an "
            "adapter (scalelong_fast.integrations.register_adapter)."
        )
    return "\n".join(lines)

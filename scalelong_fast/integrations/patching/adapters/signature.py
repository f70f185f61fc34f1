"""Arguments of a module's forward by name, whichever way they are passed."""

import inspect
import sys
from typing import Any

from torch import nn

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

#: Position of an argument that is passed by keyword only: beyond all others.
KEYWORD_ONLY = sys.maxsize


def parameters_of(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Named parameters of the forward of the module's class, without ``self``; those with a position come first.

    The class is asked, not the instance: libraries that wrap ``module.forward`` keep what it is called with.
    """
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError, AttributeError):  # the last of a scripted module, which has no forward in Python
        return {}
    return {p.name: p for p in parameters if p.kind in _BY_POSITION or p.kind is inspect.Parameter.KEYWORD_ONLY}


def position_of(module: nn.Module | None, argument: str) -> int | None:
    """Position of the argument in the module's forward; None where there is no module or no such argument."""
    parameters = {} if module is None else parameters_of(module)
    if argument not in parameters:
        return None
    by_position = parameters[argument].kind in _BY_POSITION
    return list(parameters).index(argument) if by_position else KEYWORD_ONLY


def argument_at(module: nn.Module, position: int) -> str | None:
    """Name of the argument at this position; None where there is none."""
    names = [p.name for p in parameters_of(module).values() if p.kind in _BY_POSITION]
    return names[position] if position < len(names) else None


def get_argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, position: int) -> Any:
    """The argument; None where it was not passed."""
    if name in kwargs:
        return kwargs[name]
    return args[position] if position < len(args) else None


def replace_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str, position: int, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Both, with the argument replaced by ``value``."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    return (*args[:position], value, *args[position + 1 :]), kwargs

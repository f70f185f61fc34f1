"""The data flow of one run of a network: which feature came from which, and where two were concatenated."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from scalelong_fast.integrations.patching.adapters.base import ExampleInputs
from scalelong_fast.integrations.patching.dry_run import dry_run

#: Functions that concatenate.
CONCATS = (torch.cat, torch.concat, torch.concatenate)

_PRODUCTS = {"mul", "multiply", "rmul", "imul", "div", "divide", "true_divide", "truediv", "itruediv"}


@dataclass
class Value:
    """A tensor that depends on the network's inputs, as one function made it.

    Attributes:
        index: its place in :attr:`Trace.values`; what it was made from has lower ones.
        shape: shape.
        function: name of the function that made it, without underscores; ``input`` for what the network was given.
        parents: indices of the values it was made from.
        ancestors: set of bits, its own and those of all values it depends on.
        learned: whether parameters took part.
        product: whether it is a value times or divided by something that depends on no input, other than the number 1.
        call: the module in whose forward it was made, as an index into :attr:`Trace.calls`.
        used: functions that took it, as the index of the call in whose forward each ran.
    """

    index: int
    shape: tuple[int, ...]
    function: str
    parents: tuple[int, ...]
    ancestors: int
    learned: bool
    product: bool
    call: int
    used: list[int] = field(default_factory=list)


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: qualified name, "" for the network.
        module: the module.
        parent: the call from which it was made, −1 for the network's own.
        inputs: values among its direct arguments, by position or keyword.
        inside: values deeper inside its arguments, in tuples, lists and dicts.
        outputs: values it returned.
    """

    name: str
    module: nn.Module
    parent: int
    inputs: dict[int | str, int]
    inside: set[int]
    outputs: set[int] = field(default_factory=set)


@dataclass
class Concat:
    """One concat, number ``number`` of the run, from 0; ``operands`` are None where they depend on no input."""

    number: int
    result: int
    operands: list[int | None]
    shapes: list[tuple[int, ...]]
    dim: int
    call: int


@dataclass
class Trace:
    """What :func:`trace` saw; ``num_concats`` counts those of constants too, which :attr:`concats` leaves out."""

    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    concats: list[Concat] = field(default_factory=list)
    num_concats: int = 0

    def callers(self, call: int) -> Iterator[int]:
        """``call``, the call it was made from, and so on to the network's own."""
        while call >= 0:
            yield call
            call = self.calls[call].parent

    def calls_of(self, name: str) -> int:
        """How often the module of this name was called."""
        return Counter(call.name for call in self.calls)[name]


def trace(model: nn.Module, example_inputs: ExampleInputs) -> Trace:
    """Run ``model`` once and follow its features; the network and the inputs are left as they were.

    Raises:
        UserError: see :func:`~scalelong_fast.integrations.patching.dry_run.dry_run`.
    """
    inputs = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, example_inputs)
    recorder = _Recorder(model, tree_leaves(inputs))
    with _hooked(model, recorder), recorder, eagerly():
        dry_run(model, inputs)
    return recorder.trace


def eagerly() -> AbstractContextManager:
    """Compiled networks and parts run as they are written."""
    # Where the compiler was never imported nothing is compiled, and importing it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _hooked(model: nn.Module, recorder: "_Recorder") -> Iterator[None]:
    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks, and its functions go unseen
            enter = _Enter(recorder, name)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(recorder.leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Enter:
    """The hook before a module of this name."""

    def __init__(self, recorder: "_Recorder", name: str):
        self.recorder, self.name = recorder, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.recorder.enter(self.name, module, args, kwargs)


class _Recorder(TorchFunctionMode):
    """Sees every function of torch that runs, and with the hooks every module."""

    def __init__(self, model: nn.Module, inputs: Iterable[Any]):
        super().__init__()
        self.trace = Trace()
        self._stack = [-1]
        # A tensor and the index of what it holds; None for what depends on no input. Holding the tensor keeps its id.
        self._known: dict[int, tuple[Tensor, int | None]] = {}
        self._learned: set[int] = set()
        for tensor in [*model.parameters(), *model.buffers()]:
            self._known[id(tensor)] = (tensor, None)
        self._learned.update(id(parameter) for parameter in model.parameters())
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                self._make(tensor, "input", ())

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""
        direct, inside = {}, set()
        for key, argument in [*enumerate(args), *kwargs.items()]:
            for tensor in _tensors(argument):
                index = self._index(tensor)
                if argument is tensor and index is not None:
                    direct[key] = index
                elif index is not None:
                    inside.add(index)
        self.trace.calls.append(Call(name, module, self._stack[-1], direct, inside))
        self._stack.append(len(self.trace.calls) - 1)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A module returns, or raises. What it hands on as it came in gets an identity of its own."""
        number = self._stack[-1]
        call = self.trace.calls[number]
        given = {*call.inputs.values(), *call.inside}
        outputs = [(tensor, self._index(tensor)) for tensor in _tensors(output)]
        self._stack.pop()
        aliases = {id(tensor): self._alias(tensor, number) for tensor, index in outputs if index in given}
        if aliases:
            output = tree_map(lambda leaf: aliases.get(id(leaf), leaf), output)
        call.outputs.update({self._index(tensor) for tensor in _tensors(output)} - {None})
        return output if aliases else None

    def _alias(self, tensor: Tensor, by: int) -> Tensor:
        """The same feature as another value, handed on in the forward of call ``by``."""
        alias, index = tensor.view_as(tensor), self._index(tensor)
        self.trace.values[index].used.append(by)
        self._make(alias, "alias", (index,))
        return alias

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _tensors([args, kwargs])
        versions = [_version(tensor) for tensor in given]
        output = function(*args, **kwargs)
        self.trace.num_concats += function in CONCATS
        results = [tensor for tensor in _tensors(output) if all(tensor is not other for other in given)]
        results += [
            tensor for tensor, before in zip(given, versions, strict=True) if _version(tensor) != before
        ]  # changed in place: the same tensor, another value
        if not results:
            # Dropout in eval mode hands on what it got, and in training it does not.
            passed = isinstance(output, Tensor) and "dropout" in getattr(function, "__name__", "")
            return self._alias(output, self._stack[-1]) if passed and self._index(output) is not None else output
        parents = [self._index(tensor) for tensor in given]
        learned = any(id(tensor) in self._learned for tensor in given)
        features = tuple(dict.fromkeys(parent for parent in parents if parent is not None))
        name = getattr(function, "__name__", str(function)).strip("_")
        if name.startswith("new_") or name.endswith("_like"):
            features, learned = (), False  # takes the shape and no values
        for parent in features:
            self.trace.values[parent].used.append(self._stack[-1])
        for tensor in results:
            if features:
                operands = _operands(args, kwargs)
                product = name in _PRODUCTS and len(features) == 1 and len(operands) == 2 and not _has_one(operands)
                self._make(tensor, name, features, learned, product)
            else:
                self._known[id(tensor)] = (tensor, None)
                if learned:
                    self._learned.add(id(tensor))
        if features and function in CONCATS:
            self._concat(output, args, kwargs)
        return output

    def _concat(self, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors, dim = concat_arguments(args, kwargs)
        operands = [self._index(tensor) for tensor in tensors]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        number = self.trace.num_concats - 1
        at = dim % result.dim() if isinstance(dim, int) else -1
        self.trace.concats.append(Concat(number, self._index(result), operands, shapes, at, self._stack[-1]))

    def _index(self, tensor: Tensor) -> int | None:
        """The value a tensor holds, or None where it depends on no input."""
        if id(tensor) not in self._known:
            # Made out of sight (a custom kernel, another library): of all that the module had, to be careful.
            here = self._stack[-1]
            had = {value.index for value in self.trace.values if here in self.trace.callers(value.call)}
            if here >= 0:
                had.update(self.trace.calls[here].inputs.values(), self.trace.calls[here].inside)
            self._make(tensor, "unseen", tuple(sorted(had)), learned=True)
        return self._known[id(tensor)][1]

    def _make(
        self, tensor: Tensor, function: str, parents: tuple[int, ...], learned: bool = False, product: bool = False
    ) -> None:
        values = self.trace.values
        index = len(values)
        ancestors = 1 << index
        for parent in parents:
            ancestors |= values[parent].ancestors
        shape, call = tuple(tensor.shape), self._stack[-1]
        values.append(Value(index, shape, function, parents, ancestors, learned, product, call))
        self._known[id(tensor)] = (tensor, index)


def concat_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], int]:
    """Tensors and dimension of a call of ``torch.cat``, however they are passed."""
    tensors = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    return list(tensors), dim


def _has_one(operands: list[Any]) -> bool:
    """Whether the number of a product or quotient is 1, as a switched-off scale factor is."""
    return any(isinstance(operand, (int, float)) and operand == 1 for operand in operands)


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [*args, *(value for key, value in kwargs.items() if key in ("other", "input"))]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _version(tensor: Tensor) -> int:
    """Counts changes in place."""
    return 0 if tensor.is_inference() else tensor._version

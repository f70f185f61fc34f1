"""Tensors that are computed when somebody reads them, and take their place in autograd's graph before that."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import _disable_current_modes

from scalelong_fast.errors import UserError
from scalelong_fast.ops.autocast import no_autocast


def region() -> tuple:
    """Where in a program we are, as far as autograd tells: a checkpointed function is a region of its own.

    What was made in one region and is read in another is read by a function that may run again in the backward.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    top = None if hooks is None else weakref.ref(hooks[0])
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), top


@contextmanager
def isolated(kind: str) -> Iterator[None]:
    """Gradients on, and nobody who changes dtypes or watches what is called and saved, on devices of a kind."""
    with ExitStack() as stack:
        # Entered where needed only: each takes some microseconds.
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        if torch._C._len_torch_dispatch_stack():
            # Such as selective checkpointing, which counts the calls that it will see again in the backward.
            stack.enter_context(_disable_current_modes())
        stack.enter_context(no_autocast(kind))
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _identity(tensor: Tensor) -> tuple[int, int]:
    """What changes with the values: memory that is swapped or freed leaves the version as it was."""
    return tensor._version, tensor.data_ptr()


class Promise:
    """How the values of a deferred tensor are computed, and their gradients. It holds no values itself.

    Subclasses say in :meth:`compute` how they follow from ``tensors``, and in ``readers`` which functions take the
    tensor unfinished.

    Args:
        tensors: what it is computed from; plain tensors. They must stay as they are until then.
        shape, strides, dtype: of the result.
    """

    #: Functions of PyTorch that can do without the result: each with a method (promise, *args, **kwargs) that returns
    #: NotImplemented where it cannot.
    readers: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {}

    def __init__(self, tensors: tuple[Tensor, ...], shape: Any, strides: Any, dtype: torch.dtype):
        # Where no gradient is recorded the result is a constant, whatever it is made of.
        self.tensors = tensors if torch.is_grad_enabled() else tuple(t.detach() for t in tensors)
        self.seen = [_identity(t) for t in self.tensors]
        self.shape, self.strides, self.dtype, self.device = shape, strides, dtype, tensors[0].device
        self.region = region()
        # The graph from the result to the tensors: its two ends. Neither keeps a tensor that no gradient needs.
        self.end: GradientEdge | None = None
        self.inlets: list[GradientEdge | None] = []

    def compute(self, *tensors: Tensor) -> Tensor:
        """The result, differentiable in ``tensors``."""
        raise NotImplementedError

    def unchanged(self) -> tuple[Tensor, ...]:
        """``tensors``, which nobody has changed in place or taken the memory of.

        Raises:
            UserError: somebody has.
        """
        if [_identity(t) for t in self.tensors] != self.seen:
            raise UserError(
                "fused: got a network that changes a feature or a weight, in place or by other memory, between its "
                "concatenation and the layer that reads the concat, expected all as it was. Patch the network with "
                "fused=False."
            )
        return self.tensors

    def values(self, record: bool) -> Tensor:
        """The result, without a gradient of its own.

        Args:
            record: keep what the backward needs, and no more. Below autograd, where nothing can be recorded, the
                tensors are kept, and it is computed again.
        """
        tensors = self.unchanged()
        if not any(t.requires_grad for t in tensors):
            return self._compute(tensors).detach()
        if not record:
            return self._compute(tuple(t.detach() for t in tensors))
        out = self._record(tensors)
        self.tensors = ()
        return out.detach()

    def _record(self, tensors: tuple[Tensor, ...]) -> Tensor:
        with isolated(self.device.type):
            root = torch.zeros((), requires_grad=True)
            inputs = [_Inlet.apply(root, t.detach()) if t.requires_grad else t for t in tensors]
        self.inlets = [get_gradient_edge(t) if t.requires_grad else None for t in inputs]
        out = self._compute(tuple(inputs))
        self.end = get_gradient_edge(out)
        return out

    def _compute(self, tensors: tuple[Tensor, ...]) -> Tensor:
        with isolated(self.device.type):
            out = self.compute(*tensors)
            if tuple(out.stride()) != tuple(self.strides):
                dense = torch.empty_strided(self.shape, self.strides, dtype=out.dtype, device=out.device)
                out = dense.copy_(out)
        return out

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients of ``tensors``, for that of the result.

        Raises:
            NotImplementedError: they are to be differentiated again.
        """
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "fused: got a second derivative (backward through a backward) of a scaled long skip, which the fused "
                "ops do not support. Patch the network with fused=False."
            )
        if self.end is None:
            if not self.tensors:
                raise RuntimeError("Trying to backward through a scaled long skip a second time: use retain_graph.")
            self._record(self.unchanged())
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        wanted = [edge for edge in self.inlets if edge is not None]
        found = iter(torch.autograd.grad(self.end, wanted, grad, retain_graph=keep))
        grads = [None if edge is None else next(found) for edge in self.inlets]
        if not keep:
            self.end, self.inlets = None, []
        return grads


class _Inlet(torch.autograd.Function):
    """A tensor as the start of a graph, which a leaf would be too, but that the graph keeps it alive."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class _Node(torch.autograd.Function):
    """The promise's place in the graph: whoever reads the result, by whatever way, sends its gradient through here."""

    @staticmethod
    def forward(ctx: Any, promise: Promise, *tensors: Tensor) -> Tensor:
        ctx.promise = promise
        return Deferred(promise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, *ctx.promise.gradients(grad)


class Deferred(Tensor):
    """A tensor that holds a :class:`Promise`; made by :func:`defer`.

    A function of PyTorch that is called on it takes it unfinished where the promise knows how. For all others it is an
    ordinary tensor: it has its node in the graph, and its values are computed when the first of them is called, also
    where that happens in C++.
    """

    promise: Promise
    node: Any
    #: The values, from the first reader on.
    value: Tensor | None
    #: The same tensor with a graph of its own, where some reader made it along the way.
    written: Tensor | None

    @staticmethod
    def __new__(cls, promise: Promise) -> Deferred:
        self = Tensor._make_wrapper_subclass(
            cls, promise.shape, strides=promise.strides, dtype=promise.dtype, device=promise.device
        )
        self.promise, self.node, self.value, self.written = promise, None, None, None
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        deferred: list[Deferred] = []
        _replace((args, kwargs), lambda tensor: deferred.append(tensor))
        if len(deferred) == 1 and (reader := deferred[0].promise.readers.get(func)) and deferred[0].is_open():
            out = reader(deferred[0].promise, *args, **kwargs)
            if out is not NotImplemented:
                return out
        for tensor in deferred:
            tensor.settle()
        with torch._C.DisableTorchFunctionSubclass():
            if func in _NEED_MEMORY:
                args, kwargs = _replace((args, kwargs), torch.ops.aten.alias)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        owners: dict[int, Deferred] = {}

        def value_of(tensor: Deferred) -> Tensor:
            value = tensor.settle(record=False)
            owners[id(value)] = tensor
            return value

        args, kwargs = _replace((args, kwargs or {}), value_of)
        out = func(*args, **kwargs)
        for owner in owners.values():
            promise = owner.promise
            if owner.value.shape != promise.shape or owner.value.stride() != promise.strides:
                raise UserError(
                    f"fused: got {func}, which changes the shape of a concat in place, expected a function that leaves "
                    "its argument alone. Patch the network with fused=False."
                )
        # What was changed in place is returned as itself.
        if isinstance(out, (tuple, list)):
            return type(out)(owners.get(id(item), item) for item in out)
        return owners.get(id(out), out)

    def is_open(self) -> bool:
        """Whether it may be taken unfinished: nobody has read or changed it, and we are where it was promised."""
        if self.value is not None or self.promise.region != region():
            return False
        with torch._C.DisableTorchFunctionSubclass():
            same = self.grad_fn is self.node and self.requires_grad == (self.node is not None)
            return same and self._version == 0

    def settle(self, record: bool = True) -> Tensor:
        """The values, computed at the first call; ``record`` as :meth:`Promise.values` takes it."""
        if self.value is None:
            # The gradient of those who read what was written for somebody else is worked out when it is there.
            self.value = self.promise.values(record) if self.written is None else self.written.detach()
        return self.value


def _replace(value: Any, change: Callable[[Deferred], Any]) -> Any:
    """``value`` with every deferred tensor in its tuples, lists and dicts changed."""
    if isinstance(value, Deferred):
        return change(value)
    # PyTorch's own walk over such trees takes ten times as long.
    if type(value) in (tuple, list):
        return type(value)([_replace(item, change) for item in value])
    if type(value) is dict:
        return {key: _replace(item, change) for key, item in value.items()}
    return value


def defer(promise: Promise) -> Deferred:
    """A tensor that will hold what ``promise`` computes."""
    out = _Node.apply(promise, *promise.tensors)
    with torch._C.DisableTorchFunctionSubclass():
        out.node = out.grad_fn
    return out


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


#: Functions that ask for what is known without the values.
_FACTS = {
    Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.nelement, Tensor.is_contiguous, Tensor.element_size,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__, Tensor.get_device, Tensor.ndimension,
    torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor,
    *_getters("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_leaf",
              "is_sparse", "is_quantized", "is_meta", "is_nested", "itemsize", "nbytes"),
}  # fmt: skip

#: Functions that look for memory, which a deferred tensor has none of.
_NEED_MEMORY = {
    Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.storage_offset, Tensor.numpy, Tensor.__array__,
    Tensor.__dlpack__, Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.tolist, Tensor.__repr__, Tensor.data.__get__,
}  # fmt: skip

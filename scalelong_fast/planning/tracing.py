"""Forward and backward of a real network on tensors without storage: what lies in memory when, and what is computed.

PyTorch's FakeTensorMode runs every operator on shapes alone. A dispatch mode on top of it sees each operator, notes the
storages it makes and when they are given back, and its matrix products and bytes.
"""

import dataclasses
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from scalelong_fast.diffusion import create_schedule, diffusion_loss
from scalelong_fast.models import ModelConfig, build_model
from scalelong_fast.ops.problem import assume_architecture
from scalelong_fast.training.recompute import set_recomputation

#: What an operator is, for the time it takes.
Kind = Literal["product", "fused", "pointwise"]


@dataclass(frozen=True)
class Work:
    """One operator: multiply-adds counted as two FLOPs, bytes of what it reads and writes."""

    kind: Kind
    flops: int
    bytes: int
    dtype: torch.dtype
    backward: bool


@dataclass(frozen=True)
class Trace:
    """Forward and backward of one micro-batch.

    Attributes:
        batch: samples in it.
        activations: bytes kept between forward and backward, copies of the weights in autocast's dtype left out.
        weight_copies: bytes of those copies.
        timeline: ``(weight copies, parameter gradients, all else)`` in bytes after every operator.
        work: the operators in order; those recomputed in the backward come twice.
    """

    batch: int
    activations: int
    weight_copies: int
    timeline: tuple[tuple[int, int, int], ...]
    work: tuple[Work, ...]

    @property
    def peak(self) -> int:
        """Most bytes at any time, parameters and input not counted."""
        return max(sum(point) for point in self.timeline)

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.work)


@dataclass
class _Storages:
    """Storages that came and went, in order."""

    known: dict[int, Any] = field(default_factory=dict)
    #: (operator, storage, bytes); bytes negative where it was given back.
    events: list[tuple[int, int, int]] = field(default_factory=list)
    weights: set[int] = field(default_factory=set)
    operator: int = 0
    _next: int = 0

    def number(self, tensor: Tensor) -> int | None:
        """The storage's number, or None where it was never seen."""
        entry = self.known.get(id(tensor.untyped_storage()))
        return None if entry is None else entry[0]

    def add(self, tensor: Tensor, counted: bool = True) -> int:
        storage = tensor.untyped_storage()
        key = id(storage)  # PyTorch keeps the Python object as long as the storage lives
        if key in self.known:
            return self.known[key][0]
        number, size = self._next, storage.nbytes() if counted else 0
        self._next += 1

        def gone(_: Any) -> None:
            self.known.pop(key, None)
            self.events.append((self.operator, number, -size))

        self.known[key] = (number, weakref.ref(storage, gone))
        self.events.append((self.operator, number, size))
        return number


class _Watch(TorchDispatchMode):
    """Notes storages and work of every operator."""

    def __init__(self, parameters: list[Tensor], inputs: list[Tensor]):
        super().__init__()
        self.storages, self.work, self.backward = _Storages(), [], False
        self.parameters = {self.storages.add(p, counted=False) for p in parameters}
        for tensor in inputs:
            self.storages.add(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        read = {number for t in tensors if (number := self.storages.number(t)) is not None}
        self.storages.operator += 1
        written = [self.storages.add(t) for t in outputs]
        if func is torch.ops.aten._to_copy.default and read and read <= self.parameters:
            self.storages.weights.update(written)
        if outputs and not (_is_view(func) or (set(written) <= read and not func._schema.is_mutable)):
            self._note(func, args, kwargs or {}, out, tensors, outputs)
        return out

    def _note(
        self, func: Any, args: tuple, kwargs: dict, out: Any, tensors: list[Tensor], outputs: list[Tensor]
    ) -> None:
        flops = _flops(func, args, kwargs, out)
        ours = func.namespace == "scalelong_fast"
        kind: Kind = "product" if flops else "fused" if ours else "pointwise"
        size = sum(t.numel() * t.element_size() for t in (*tensors, *outputs))
        if func in _NO_READ:
            size = sum(t.numel() * t.element_size() for t in outputs)
        self.work.append(Work(kind, flops, size, outputs[0].dtype, self.backward))


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """FLOPs of an operator as PyTorch counts them, which leaves out the operators that only CPUs have."""
    if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
        return sdpa_flop_count(*(t.shape for t in args[:3]))
    if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return sdpa_backward_flop_count(*(t.shape for t in args[:4]))
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


_NO_READ = {torch.ops.aten.empty_like.default, torch.ops.aten.zeros_like.default, torch.ops.aten.new_empty.default}


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def without_storage(model: nn.Module) -> nn.Module:
    """``model`` (of the meta device) with its tensors replaced by fake ones, in place; within a FakeTensorMode."""
    done: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            empty = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            done[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return done[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
    return model


def example_batch(config: ModelConfig, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Images ``(B, C, H, W)``, noise, uniforms ``(B,)`` and condition, uninitialised."""
    shape = (batch, config.in_chans, config.img_size, config.img_size)
    y = None
    if config.clip_dim > 0:
        y = torch.empty(batch, config.num_clip_token, config.clip_dim, dtype=torch.bfloat16)
    elif config.num_classes > 0:
        y = torch.empty(batch, dtype=torch.int64)
    return torch.empty(shape), torch.empty(shape), torch.empty(batch), y


def trace(
    config: ModelConfig,
    batch: int,
    *,
    recompute: str = "none",
    precision: str = "bf16",
    arch: str = "sm_90",
    schedule: str = "vpsde",
) -> Trace:
    """Run forward, loss and backward of the network at ``batch`` samples without any storage.

    Args:
        config: the network.
        batch: samples of one micro-batch.
        recompute: ``none``, ``block`` or ``selective``.
        precision: ``bf16``, ``fp16`` or ``fp32``.
        arch: whose plans the fused ops take (``sm_90`` …); ``cpu``: as on a CPU, where networks are not fused.
        schedule: the noise process.
    """
    with torch.device("meta"):
        model = build_model(dataclasses.replace(config, fused=arch != "cpu" if config.fused is None else config.fused))
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        without_storage(model)
        set_recomputation(model, recompute)
        return _traced(model, config, batch, precision, arch, create_schedule(schedule))


def _traced(
    model: nn.Module,
    config: ModelConfig,
    batch: int,
    precision: str,
    arch: str,
    schedule: nn.Module,
) -> Trace:
    x0, noise, u, y = example_batch(config, batch)
    parameters = list(model.parameters())
    watch = _Watch([*parameters, *model.buffers()], [t for t in (x0, noise, u, y) if t is not None])
    with ExitStack() as stack:
        if arch != "cpu":
            stack.enter_context(assume_architecture(arch))
        stack.enter_context(watch)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = diffusion_loss(model, schedule, x0, noise, u, y)
        forward = watch.storages.operator
        watch.backward = True
        loss.backward()
        del loss
    gradients = {watch.storages.number(p.grad) for p in parameters if p.grad is not None}
    timeline = _timeline(watch.storages, gradients)
    weights, _, other = timeline[forward]
    return Trace(batch, other, weights, tuple(timeline), tuple(watch.work))


def _timeline(storages: _Storages, gradients: set[int | None]) -> list[tuple[int, int, int]]:
    live, points = [0, 0, 0], [(0, 0, 0)] * (storages.operator + 1)
    position = 0
    for operator, number, size in storages.events:
        for index in range(position, operator):
            points[index] = (live[0], live[1], live[2])
        position = operator
        live[0 if number in storages.weights else 1 if number in gradients else 2] += size
    for index in range(position, len(points)):
        points[index] = (live[0], live[1], live[2])
    return points

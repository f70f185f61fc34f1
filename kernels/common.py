"""What the kernels share: arithmetic that behaves alike compiled and interpreted, and the host side of a launch."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalelong_fast.kernels.configs import LaunchConfig, launch_config

# The interpreter's tl.dot returns garbage for bf16 operands (Triton 3.6 to 3.9), so there they are raised to fp32.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

#: Activations of the SE gate by name; kernels take the number.
ACTIVATION_IDS = {"relu": 0, "elu": 1, "mish": 2}


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Round an fp32 value to the dtype it is stored in; the interpreter alone would truncate bf16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        # Adding to a NaN's bits could carry it over to infinity or zero.
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with fp32 accumulation; PRECISION matters for fp32 operands only."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """ψ(z) in fp32: 0 ReLU, 1 ELU, 2 Mish."""
    if ACTIVATION == 0:
        # Not tl.maximum: a NaN must come through.
        return tl.where(z < 0.0, 0.0, z)
    if ACTIVATION == 1:
        # z <= 0.0 is false for a NaN, which the first branch then hands through.
        return tl.where(z <= 0.0, tl.exp(tl.minimum(z, 0.0)) - 1.0, z)
    return z * _tanh_softplus(z)


@triton.jit
def activate_derivative(z, ACTIVATION: tl.constexpr):
    """ψ'(z) in fp32."""
    if ACTIVATION == 0:
        return tl.where(z > 0.0, 1.0, 0.0)
    if ACTIVATION == 1:
        return tl.where(z > 0.0, 1.0, tl.exp(tl.minimum(z, 0.0)))
    t = _tanh_softplus(z)
    return t + z * tl.sigmoid(z) * (1.0 - t * t)


@triton.jit
def _tanh_softplus(z):
    # tanh(ln(1 + e^z)) = e^z (e^z + 2) / (e^z (e^z + 2) + 2): 1 in fp32 from z = 20 on, where e^z must not overflow.
    e = tl.exp(tl.minimum(z, 20.0))
    n = e * (e + 2.0)
    return n / (n + 2.0)


def arch_of(tensor: Tensor) -> str:
    """The table that serves a tensor's device; ``cpu`` is the interpreter."""
    from scalelong_fast.ops.problem import architecture

    return architecture(tensor.device)


def config_for(kernel: str, tensor: Tensor, width: int) -> LaunchConfig:
    """Launch configuration of a kernel for features like ``tensor``."""
    return launch_config(kernel, arch_of(tensor), str(tensor.dtype).removeprefix("torch."), width)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where contiguous, else a contiguous copy: gradients may come expanded, with strides of 0."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def on_device(tensor: Tensor):
    """Context in which launches go to the tensor's GPU; Triton otherwise takes the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _NOTHING


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


_NOTHING = _Nothing()

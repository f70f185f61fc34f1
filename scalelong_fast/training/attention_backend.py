"""Which of PyTorch's attention kernels a run uses on a GPU: the first that is seen to compute what it should."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scalelong_fast.models import ModelConfig, UNetConfig
from scalelong_fast.models.attention import attend_jointly
from scalelong_fast.training.hardware import Execution

#: Times the error of the explicit products in the same dtype that a kernel may have.
TOLERANCE = 4.0

#: Words for the user.
NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "explicit products",
}


def candidates(device: torch.device) -> tuple[SDPBackend, ...]:
    """Kernels to try, fastest first: cuDNN's are ahead from Hopper on, flash before."""
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return (*((cudnn, flash) if hopper else (flash, cudnn)), SDPBackend.EFFICIENT_ATTENTION)


def attention_shapes(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(tokens, heads, width of a head) of every self-attention of a network, each once."""
    if not isinstance(config, UNetConfig):
        return [(config.num_tokens, config.num_heads, config.embed_dim // config.num_heads)]
    shapes = {}
    levels = [*enumerate(config.level_channels), (len(config.level_channels) - 1, config.level_channels[-1])]
    for number, (level, channels) in enumerate(levels):
        size = config.img_size >> level
        middle = number == len(levels) - 1
        if middle or size in config.attention_resolutions:
            heads = config.heads_of(channels)
            shapes[size * size, heads, channels // heads] = None
    return list(shapes)


def first_sound(
    backends: Sequence[SDPBackend], is_sound: Callable[[SDPBackend], bool], otherwise: SDPBackend = SDPBackend.MATH
) -> SDPBackend:
    """The first of ``backends`` that passes; ``otherwise`` where none does."""
    return next((backend for backend in backends if is_sound(backend)), otherwise)


def is_sound(
    backend: SDPBackend,
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
    attend: Callable[[Tensor, float, str], Tensor] = attend_jointly,
) -> bool:
    """Whether a kernel runs, and its result and gradient are finite and near those of explicit products in float64.

    Args:
        backend: the kernel.
        shapes: (tokens, heads, width) to try it at; see :func:`attention_shapes`.
        dtype: of q, k and v.
        device: where.
        attend: what to call, see :func:`~scalelong_fast.models.attention.attend_jointly`.
    """
    generator = torch.Generator(device).manual_seed(0)
    for tokens, heads, width in shapes:
        # Logits of a few tens, as trained networks have: a kernel that overflows shows it.
        qkv = torch.randn(2, tokens, 3, heads, width, generator=generator, device=device) * 3
        qkv = qkv.to(dtype)
        grad = torch.randn(2, tokens, heads * width, generator=generator, device=device).to(dtype)
        scale = width**-0.5
        exact = _run(attend, qkv.double(), grad.double(), scale, "math")
        plain = _run(attend, qkv, grad, scale, "math")
        try:
            with sdpa_kernel(backend):
                got = _run(attend, qkv, grad, scale, "sdpa")
        except RuntimeError:  # not for this shape, dtype, device or build
            return False
        for result, yardstick, truth in zip(got, plain, exact, strict=True):
            floor = torch.finfo(dtype).eps * truth.norm()
            allowed = TOLERANCE * torch.maximum((yardstick - truth).norm(), floor)
            if not bool((result - truth).norm() <= allowed):  # NaN is not
                return False
    return True


def _run(
    attend: Callable[[Tensor, float, str], Tensor], qkv: Tensor, grad: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Output and gradient of the joint projection."""
    qkv = qkv.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(qkv.device.type, enabled=False):
        out = attend(qkv, scale, backend)
        return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


@contextmanager
def sound_attention(config: ModelConfig, execution: Execution) -> Iterator[str | None]:
    """Prefer, inside, the first kernel that passes :func:`is_sound` at the network's shapes; others stand in for it.

    A compiled step keeps the kernel that was preferred when its first call was traced: that call belongs inside.

    Yields:
        A line that names it; None on a CPU and for networks that do not use PyTorch's attention.
    """
    device = execution.device
    if device.type != "cuda" or config.attention != "sdpa":
        yield None
        return
    shapes, dtype = attention_shapes(config), execution.autocast or torch.float32
    chosen = first_sound(candidates(device), lambda backend: is_sound(backend, shapes, dtype, device))
    order = list(dict.fromkeys([chosen, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]))
    if chosen == SDPBackend.MATH:
        order = [SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield f"Attention: {NAMES[chosen]} kernels."

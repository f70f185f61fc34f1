"""bf16 self-attention for CPUs, by explicit products.

PyTorch's flash kernel for CPUs has a slow bf16 backward. Where the weights of the softmax are few they are kept for the
backward, as autograd does; else a few images at a time are worked on, so that the logits never leave the cache, and the
backward makes them anew. ``python -m benchmarks attention`` compares.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

#: Logits that :func:`recomputed_attention` works on at a time, in bytes: two images of 8 heads and 257 tokens. One
#: image at a time pays for more calls, four at a time leave the second-level caches.
CHUNK_BYTES = 5 << 19
#: Weights of one softmax that may be kept for the backward, in bytes.
KEPT_BYTES = 1 << 26


def _chunks(qkv: Tensor, scale: float) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (images, scaled q, k, v), the tensors ``(images · H, L, d)`` and contiguous."""
    batch, length, _, heads, width = qkv.shape
    size = max(1, CHUNK_BYTES // (heads * length * length * qkv.element_size()))
    for start in range(0, batch, size):
        part = slice(start, min(start + size, batch))
        q, k, v = qkv[part].permute(2, 0, 3, 1, 4).unbind(0)
        yield part, (q * scale).reshape(-1, length, width), k.reshape(-1, length, width), v.reshape(-1, length, width)


def _merge(x: Tensor, heads: int) -> Tensor:
    """``(n · H, L, d)`` to ``(n, L, H, d)``."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


@torch.library.custom_op("scalelong_fast::cpu_attention", mutates_args=())
def recomputed_attention(qkv: Tensor, scale: float) -> Tensor:
    """Softmax attention of the joint projection.

    Args:
        qkv: ``(B, L, 3, H, d)``, on a CPU; any floating dtype, made for bf16.
        scale: factor of the logits.

    Returns:
        ``(B, L, H · d)`` in the dtype of ``qkv``. The backward computes the logits anew, so that nothing of size L² is
        kept; it cannot be differentiated again.
    """
    batch, length, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, length, heads, width)
    with torch.autocast("cpu", enabled=False):
        for part, q, k, v in _chunks(qkv, scale):
            out[part] = _merge(torch.bmm(torch.bmm(q, k.mT).softmax(-1), v), heads)
    return out.view(batch, length, heads * width)


@recomputed_attention.register_fake
def _(qkv: Tensor, scale: float) -> Tensor:
    batch, length, _, heads, width = qkv.shape
    return qkv.new_empty(batch, length, heads * width)


@torch.library.custom_op("scalelong_fast::cpu_attention_backward", mutates_args=())
def cpu_attention_backward(grad: Tensor, qkv: Tensor, scale: float) -> Tensor:
    """Gradient of :func:`recomputed_attention` with respect to ``qkv``, given that of its output ``(B, L, H · d)``."""
    batch, length, _, heads, width = qkv.shape
    grad = grad.reshape(batch, length, heads, width)
    out = torch.empty(qkv.shape, dtype=qkv.dtype)
    with torch.autocast("cpu", enabled=False):
        for part, q, k, v in _chunks(qkv, scale):
            g = grad[part].transpose(1, 2).reshape(-1, length, width)
            weights = torch.bmm(q, k.mT).softmax(-1)
            d_logits = torch._softmax_backward_data(torch.bmm(g, v.mT), weights, -1, weights.dtype)
            out[part, :, 0] = _merge(torch.bmm(d_logits, k).mul_(scale), heads)
            out[part, :, 1] = _merge(torch.bmm(d_logits.mT, q), heads)
            out[part, :, 2] = _merge(torch.bmm(weights.mT, g), heads)
    return out


@cpu_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, scale: float) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _setup(ctx, inputs, output) -> None:
    qkv, ctx.scale = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (qkv,) = ctx.saved_tensors
    return cpu_attention_backward(grad, qkv, ctx.scale), None


recomputed_attention.register_autograd(_backward, setup_context=_setup)


def kept_attention(qkv: Tensor, scale: float) -> Tensor:
    """:func:`recomputed_attention` whose backward is autograd's, from the weights of the softmax, ``(B, H, L, L)``."""
    batch, length, _, heads, width = qkv.shape
    with torch.autocast("cpu", enabled=False):
        q, k, v = (part.reshape(-1, length, width) for part in qkv.permute(2, 0, 3, 1, 4).unbind(0))
        out = torch.bmm(torch.bmm(q * scale, k.mT).softmax(-1), v)
        return _merge(out, heads).reshape(batch, length, heads * width)


def cpu_attention(qkv: Tensor, scale: float) -> Tensor:
    """Softmax attention by :func:`kept_attention` or :func:`recomputed_attention`; arguments and result are theirs."""
    batch, length, _, heads, _ = qkv.shape
    differentiated = torch.is_grad_enabled() and qkv.requires_grad
    if differentiated and batch * heads * length**2 * qkv.element_size() <= KEPT_BYTES:
        return kept_attention(qkv, scale)
    return recomputed_attention(qkv, scale)

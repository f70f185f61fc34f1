"""Multi-head self-attention with a choice of backend."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalelong_fast.errors import UserError, invalid
from scalelong_fast.models.cpu_attention import cpu_attention
from scalelong_fast.models.cpu_linear import project
from scalelong_fast.ops.problem import on_cpu


def require_backend(name: str) -> None:
    """Raise :class:`UserError` where an attention backend cannot be used on this machine."""
    if name == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except Exception as error:  # a build for another torch fails in many ways, not only ImportError
            raise UserError(
                f"attention: got 'xformers', which cannot be imported here ({type(error).__name__}: {error}). Install "
                'it with: pip install "scalelong_fast[xformers]", or use attention "sdpa".'
            ) from error


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    logits = (q @ k.transpose(-2, -1)) * scale
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    """Softmax attention.

    Args:
        q: ``(B, L, H, d)``.
        k, v: ``(B, M, H, d)`` of the same dtype.
        scale: factor of the logits.
        backend: ``sdpa``, ``xformers`` or ``math``.

    Returns:
        ``(B, L, H · d)``.
    """
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        if q.device.type == "cpu":
            raise invalid("attention", "xformers", "'sdpa' or 'math' for tensors on the CPU")
        return memory_efficient_attention(q, k, v, scale=scale).flatten(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale) if backend == "sdpa" else _math(q, k, v, scale)
    return out.transpose(1, 2).flatten(2)


def attend_jointly(qkv: Tensor, scale: float, backend: str) -> Tensor:
    """:func:`attend` of a joint projection ``(B, L, 3, H, d)``; ``(B, L, H · d)``."""
    if backend == "sdpa" and qkv.dtype == torch.bfloat16 and on_cpu(qkv):
        return cpu_attention(qkv, scale)
    return attend(*qkv.unbind(2), scale, backend)


class Attention(nn.Module):
    """Self-attention over tokens, ``(B, L, D) → (B, L, D)``.

    Args:
        dim: D.
        num_heads: H, a divisor of D.
        qkv_bias: bias in the joint projection.
        qk_scale: factor of the logits; None: (D/H)^-1/2.
        backend: ``sdpa`` (PyTorch picks flash, memory-efficient or math; :mod:`.cpu_attention` for bf16 on a CPU),
            ``xformers`` or ``math`` (explicit products and softmax).

    Unlike the authors' released code, q, k and v keep their dtype under autocast instead of being raised to float32.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        backend: str = "sdpa",
    ):
        super().__init__()
        require_backend(backend)
        self.num_heads, self.backend = num_heads, backend
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the tokens ``x`` ``(B, L, D)``; the result has the same shape."""
        batch, length, dim = x.shape
        qkv = project(self.qkv, x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        return project(self.proj, attend_jointly(qkv, self.scale, self.backend))

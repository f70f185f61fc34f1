"""Multi-head self-attention with a choice of backend."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalelong_fast.errors import UserError, invalid


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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # PyTorch's flash kernel for CPUs has a slow bf16 backward: torch 2.13, one core of an AMD EPYC (Zen 4), forward
        # and backward of (B, H, L, d) = (64, 4, 18, 16) 25 ms against 2.3 ms of explicit products, and of (32, 8, 257,
        # 32) 318 against 229 ms.
        return _math(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _math(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    logits = (q @ k.transpose(-2, -1)) * scale
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype) @ v


class Attention(nn.Module):
    """Self-attention over tokens, ``(B, L, D) → (B, L, D)``.

    Args:
        dim: D.
        num_heads: H, a divisor of D.
        qkv_bias: bias in the joint projection.
        qk_scale: factor of the logits; None: (D/H)^-1/2.
        backend: ``sdpa`` (PyTorch picks flash, memory-efficient or math; explicit products for bf16 on a CPU, where
            they are faster), ``xformers`` or ``math`` (explicit products and softmax).

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
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        if self.backend == "xformers":
            return self.proj(self._xformers(qkv).reshape(batch, length, dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, L, D/H) each
        out = (_sdpa if self.backend == "sdpa" else _math)(q, k, v, self.scale)
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))

    def _xformers(self, qkv: Tensor) -> Tensor:
        from xformers.ops import memory_efficient_attention

        if qkv.device.type == "cpu":
            raise invalid("attention", "xformers", "'sdpa' or 'math' for tensors on the CPU")
        return memory_efficient_attention(*qkv.unbind(2), scale=self.scale)

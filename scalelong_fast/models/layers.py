"""Building blocks of the U-ViT; parameter names are those of the authors' released code."""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scalelong_fast.models.attention import Attention
from scalelong_fast.models.cpu_linear import project
from scalelong_fast.models.embedding import timestep_embedding as timestep_embedding
from scalelong_fast.models.long_skip import LongSkip, Stream, is_plain, merge_long_skip
from scalelong_fast.ops import add_layer_norm_gap, layer_norm_gap
from scalelong_fast.ops.autocast import autocast_dtype
from scalelong_fast.scaling.gates import global_average_pool


class PatchEmbed(nn.Module):
    """Images ``(B, C, H, W)`` to patch tokens ``(B, L, D)``.

    ``proj`` holds the weight of a convolution whose stride is its kernel; the product is taken as one matrix
    multiplication over unfolded patches, whose backward is several times faster than a convolution's on a CPU.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        patches = rearrange(x, "b c (h p1) (w p2) -> b (h w) (c p1 p2)", p1=p, p2=p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def unpatchify(x: Tensor, channels: int) -> Tensor:
    """Patch tokens ``(B, h·w, p·p·C)`` back to images ``(B, C, h·p, w·p)`` with h = w."""
    side, p = math.isqrt(x.shape[1]), math.isqrt(x.shape[2] // channels)
    return rearrange(x, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=side, w=side, p1=p, p2=p)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.fc2, F.gelu(project(self.fc1, x)))


def residual_norm(stream: Stream, norm: nn.LayerNorm, skip: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make the stream's pending addition, normalise it and pool it, in one op.

    Args:
        stream: x and the branch to be added.
        norm: LayerNorm over D.
        skip: whether the sum leaves as a long skip too.

    Returns:
        LayerNorm(s) ``(B, L, D)`` in autocast's dtype where that is on, the GAP of s ``(B, L)`` float32, the new stream
        s, and s once more as the long skip, in the dtype a Linear will read it in.
    """
    if not is_plain(norm, nn.LayerNorm) or norm.bias is None:
        x = stream.sum()
        return norm(x), global_average_pool(x), x, x
    narrow = autocast_dtype(stream.x)
    if stream.branch is None:
        y, pooled = layer_norm_gap(stream.x, norm.weight, norm.bias, norm.eps, out_dtype=narrow)
        return y, pooled, stream.x, stream.x
    # A copy for the skip only where it is narrower than the stream: then it is what the Linear will read.
    narrower = narrow != stream.x.dtype and torch.promote_types(narrow, stream.x.dtype) == stream.x.dtype
    skip_dtype = narrow if skip and narrower else None
    return add_layer_norm_gap(
        stream.x, stream.branch, norm.weight, norm.bias, norm.eps, out_dtype=narrow, skip_dtype=skip_dtype
    )


class Block(nn.Module):
    """Pre-norm transformer block ``(B, L, D) → (B, L, D)``; a decoder block first merges its long skip.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, qk_scale, attention: see :class:`~scalelong_fast.models.UViTConfig`.
        skip: whether the block has a ``skip_linear`` that maps cat[x, κ⊙skip] (2D) to D.
        use_checkpoint: recompute the block in the backward.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attention: str = "sdpa",
        skip: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.use_checkpoint = use_checkpoint

    def forward(
        self, x: Tensor | Stream, skip: Tensor | LongSkip | None = None
    ) -> Tensor | tuple[Stream, tuple[Tensor, Tensor]]:
        """Plain or fused, by the type of ``x``.

        Args:
            x: the stream ``(B, L, D)``; or, for the fused path, a :class:`Stream`.
            skip: decoder blocks only: ``(B, L, D)``, already scaled; for the fused path a :class:`LongSkip`.

        Returns:
            The stream ``(B, L, D)``; of the fused path a :class:`Stream`, and features and GAP of the stream as it
            came in: the long skip of the block before, ``(B, L, D)`` and ``(B, L)``.
        """
        if isinstance(x, Stream):
            return self._decode(x, skip) if isinstance(skip, LongSkip) else self._encode(x)
        return self._maybe_checkpoint(self._forward, x, skip)

    def _maybe_checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if self.skip_linear is not None:
            x = project(self.skip_linear, torch.cat([x, skip], dim=-1)).to(x.dtype)
        x = x + self.attn(self.norm1(x)).to(x.dtype)
        return x + self.mlp(self.norm2(x)).to(x.dtype)

    def _encode(self, stream: Stream) -> tuple[Stream, tuple[Tensor, Tensor]]:
        # The addition and what it gives the long skip lie before the checkpoint: the skip is kept in any case.
        y, pooled, x, features = residual_norm(stream, self.norm1, skip=True)
        return self._maybe_checkpoint(self._fused_body, y, x), (features, pooled)

    def _decode(self, stream: Stream, skip: LongSkip) -> tuple[Stream, None]:
        return self._maybe_checkpoint(self._fused_decoder, stream.sum(), skip.features, skip.pooled, skip), None

    def _fused_decoder(self, x: Tensor, features: Tensor, pooled: Tensor | None, skip: LongSkip) -> Stream:
        # Tensors come as arguments of their own: a checkpoint looks for them there.
        x = merge_long_skip(x, skip._replace(features=features, pooled=pooled), self.skip_linear).to(x.dtype)
        y, _, x, _ = residual_norm(Stream(x), self.norm1)
        return self._fused_body(y, x)

    def _fused_body(self, y: Tensor, x: Tensor) -> Stream:
        y, _, x, _ = residual_norm(Stream(x, self.attn(y)), self.norm2)
        return Stream(x, self.mlp(y))

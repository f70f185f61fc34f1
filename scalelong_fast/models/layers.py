"""Building blocks of the U-ViT; parameter names are those of the authors' released code."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from scalelong_fast.models.attention import Attention
from scalelong_fast.models.cpu_linear import project
from scalelong_fast.models.embedding import timestep_embedding as timestep_embedding
from scalelong_fast.models.long_skip import LongSkip, Stream, is_plain, merge_long_skip
from scalelong_fast.models.recomputing import maybe_recomputed
from scalelong_fast.ops import add_layer_norm_gap, layer_norm_gap
from scalelong_fast.ops.autocast import autocast_dtype
from scalelong_fast.scaling import global_average_pool, scale_branch


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


def norm_parameters(norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``norm`` as they are, or in the dtype of ``x`` where FSDP gathered them in a narrower one."""
    weight, bias = norm.weight, norm.bias
    if weight.dtype == x.dtype or torch.promote_types(weight.dtype, x.dtype) == weight.dtype:
        return weight, bias
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def normalize(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """``norm(x)``, with :func:`norm_parameters`."""
    if not is_plain(norm, nn.LayerNorm) or norm.weight.dtype == x.dtype:
        return norm(x)
    return F.layer_norm(x, norm.normalized_shape, *norm_parameters(norm, x), norm.eps)


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
    weight, bias = norm_parameters(norm, stream.x)
    if stream.branch is None:
        y, pooled = layer_norm_gap(stream.x, weight, bias, norm.eps, out_dtype=narrow)
        return y, pooled, stream.x, stream.x
    # A copy for the skip only where it is narrower than the stream: then it is what the Linear will read.
    narrower = narrow != stream.x.dtype and torch.promote_types(narrow, stream.x.dtype) == stream.x.dtype
    skip_dtype = narrow if skip and narrower else None
    return add_layer_norm_gap(stream.x, stream.branch, weight, bias, norm.eps, out_dtype=narrow, skip_dtype=skip_dtype)


class Block(nn.Module):
    """Pre-norm transformer block ``(B, L, D) → (B, L, D)``; a decoder block first merges its long skip.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, qk_scale, attention: see :class:`~scalelong_fast.models.UViTConfig`.
        skip: whether the block has a ``skip_linear`` that maps cat[x, κ⊙skip] (2D) to D.
        use_checkpoint: what to recompute in the backward, see :func:`~.recomputing.maybe_recomputed`.
        block_scaling: what both residual branches are multiplied by (ScaleLong Table 3); None: nothing.
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
        use_checkpoint: bool | str = False,
        block_scaling: nn.Module | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.use_checkpoint = use_checkpoint
        self.block_scaling = block_scaling

    def forward(
        self, x: Tensor | Stream, skip: Tensor | LongSkip | None = None
    ) -> Tensor | tuple[Stream, tuple[Tensor, Tensor]] | tuple[Stream, Tensor | None]:
        """Plain or fused, by the type of ``x``.

        Args:
            x: the stream ``(B, L, D)``; or, for the fused path, a :class:`Stream`.
            skip: decoder blocks only: ``(B, L, D)``, already scaled; for the fused path a :class:`LongSkip`.

        Returns:
            The stream ``(B, L, D)``; of the fused path a :class:`Stream`, and beside it, of an encoder block, features
            and GAP of the stream as it came in: the long skip of the block before, ``(B, L, D)`` and ``(B, L)``; of a
            decoder block κ ``(B, L)`` where it was computed here.
        """
        if isinstance(x, Stream):
            return self._decode(x, skip) if isinstance(skip, LongSkip) else self._encode(x)
        return maybe_recomputed(self, self._forward, x, skip)

    def _forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if self.skip_linear is not None:
            x = project(self.skip_linear, torch.cat([x, skip], dim=-1)).to(x.dtype)
        x = x + scale_branch(self.block_scaling, self.attn(normalize(self.norm1, x))).to(x.dtype)
        return x + scale_branch(self.block_scaling, self.mlp(normalize(self.norm2, x))).to(x.dtype)

    def _encode(self, stream: Stream) -> tuple[Stream, tuple[Tensor, Tensor]]:
        # The addition and what it gives the long skip lie before the checkpoint: the skip is kept in any case.
        y, pooled, x, features = residual_norm(stream, self.norm1, skip=True)
        return maybe_recomputed(self, self._fused_body, y, x), (features, pooled)

    def _decode(self, stream: Stream, skip: LongSkip) -> tuple[Stream, Tensor | None]:
        return maybe_recomputed(self, self._fused_decoder, stream.sum(), skip)

    def _fused_decoder(self, x: Tensor, skip: LongSkip) -> tuple[Stream, Tensor | None]:
        merged, kappa = merge_long_skip(x, skip, self.skip_linear)
        y, _, x, _ = residual_norm(Stream(merged.to(x.dtype)), self.norm1)
        return self._fused_body(y, x), kappa

    def _fused_body(self, y: Tensor, x: Tensor) -> Stream:
        y, _, x, _ = residual_norm(Stream(x, scale_branch(self.block_scaling, self.attn(y))), self.norm2)
        return Stream(x, scale_branch(self.block_scaling, self.mlp(y)))

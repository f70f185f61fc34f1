"""Building blocks of the U-ViT; parameter names are those of the authors' released code."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scalelong_fast.models.attention import Attention


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines first.

    Args:
        timesteps: ``(B,)`` on the 0…999 scale, whole or fractional.
        dim: width; an odd one gets a zero column.

    Returns:
        ``(B, dim)`` float32.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) * (-math.log(max_period) / half)
    angles = timesteps[:, None].float() * exponent.exp()
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


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
        return self.fc2(F.gelu(self.fc1(x)))


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

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Args: x ``(B, L, D)``; skip, already scaled, ``(B, L, D)`` in decoder blocks."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, skip, use_reentrant=False)
        return self._forward(x, skip)

    def _forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1)).to(x.dtype)
        x = x + self.attn(self.norm1(x)).to(x.dtype)
        return x + self.mlp(self.norm2(x)).to(x.dtype)

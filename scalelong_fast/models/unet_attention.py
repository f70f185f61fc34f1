"""Attention among the positions of a feature map; parameter names are those of the openai UNets and of LDM."""

from torch import Tensor, nn
from torch.nn import functional as F

from scalelong_fast.models.attention import attend, attend_jointly, require_backend
from scalelong_fast.models.cpu_linear import linear, project
from scalelong_fast.models.unet_blocks import zero_branch
from scalelong_fast.models.unet_norm import normalise
from scalelong_fast.plain import is_plain
from scalelong_fast.scaling import scale_branch


def to_tokens(image: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, H·W, C)``: a view of a channels_last image."""
    return image.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """``(B, H·W, C)`` to a channels_last ``(B, C, H, W)``: a view."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def pointwise(layer: nn.Module, kind: type[nn.Module], image: Tensor) -> Tensor:
    """Tokens ``(B, H·W, C_out)`` of a 1×1 convolution of ``image`` ``(B, C, H, W)``, taken as one matrix product.

    ``kind`` is what the layer is when nobody added to it: Conv1d or Conv2d.
    """
    if is_plain(layer, kind):
        return linear(to_tokens(image), layer.weight.flatten(1), layer.bias)
    return layer(image.flatten(2) if kind is nn.Conv1d else image).flatten(2).transpose(1, 2)


class AttentionBlock(nn.Module):
    """Self-attention with a norm before and a residual around it, ``(B, C, H, W) → (B, C, H, W)``.

    Args:
        channels: C.
        num_heads: H, a divisor of C.
        num_groups: of the GroupNorm.
        new_order: the joint projection's rows are divided by q, k, v first and then by heads, not by heads first.
        backend: see :class:`scalelong_fast.models.attention.Attention`.
        block_scaling: what the attention's branch is multiplied by (ScaleLong Table 3); None: nothing.
        norm_eps: ε of the GroupNorm.
    """

    #: See :class:`~scalelong_fast.models.unet.Stage`.
    takes = "nothing else"

    def __init__(
        self,
        channels: int,
        num_heads: int,
        num_groups: int = 32,
        new_order: bool = False,
        backend: str = "sdpa",
        block_scaling: nn.Module | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        require_backend(backend)
        self.num_heads, self.new_order, self.backend = num_heads, new_order, backend
        self.norm = nn.GroupNorm(num_groups, channels, norm_eps)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_branch(nn.Conv1d(channels, channels, 1), block_scaling)
        self.block_scaling = block_scaling

    def forward(self, x: Tensor, fused: bool = False) -> Tensor:
        """Attend among the H·W positions of ``x`` ``(B, C, H, W)``; ``fused``: the norm by a fused op."""
        _, channels, height, width = x.shape
        normalised, _ = normalise(x, self.norm, fused=fused)
        qkv = pointwise(self.qkv, nn.Conv1d, normalised)
        head = channels // self.num_heads
        if self.new_order:
            qkv = qkv.unflatten(2, (3, self.num_heads, head))
        else:
            qkv = qkv.unflatten(2, (self.num_heads, 3, head)).transpose(2, 3)
        out = attend_jointly(qkv, head**-0.5, self.backend)
        out = pointwise(self.proj_out, nn.Conv1d, to_image(out, height, width))
        return x + scale_branch(self.block_scaling, to_image(out, height, width))


class CrossAttention(nn.Module):
    """Attention of tokens ``(B, L, C)`` to themselves, or to a context ``(B, M, D)``; the result is ``(B, L, C)``.

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        context_dim: D; None: C, self-attention.
        backend: see :class:`scalelong_fast.models.attention.Attention`.
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None, backend: str = "sdpa"):
        super().__init__()
        require_backend(backend)
        self.num_heads, self.backend = num_heads, backend
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            project(layer, tokens).unflatten(2, (self.num_heads, -1))
            for layer, tokens in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        out = attend(q, k, v, q.shape[-1] ** -0.5, self.backend)
        return project(self.to_out[0], out)


class GEGLU(nn.Module):
    """a · GELU(b) of a Linear that gives a and b side by side."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = project(self.proj, x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and Linear, ``(B, L, C) → (B, L, C)``."""

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        # The place between them is a dropout's in published weights.
        self.net = nn.Sequential(GEGLU(dim, mult * dim), nn.Identity(), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return project(self.net[2], self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text and feed-forward, each after a LayerNorm and beside a residual."""

    def __init__(self, dim: int, num_heads: int, context_dim: int, backend: str = "sdpa"):
        super().__init__()
        self.attn1 = CrossAttention(dim, num_heads, None, backend)
        self.attn2 = CrossAttention(dim, num_heads, context_dim, backend)
        self.ff = FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x)).to(x.dtype)
        x = x + self.attn2(self.norm2(x), context).to(x.dtype)
        return x + self.ff(self.norm3(x)).to(x.dtype)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with attention to text; ``(B, C, H, W) → (B, C, H, W)``.

    Args:
        channels: C.
        num_heads: H, a divisor of C.
        context_dim: width D of the text features.
        depth: transformer blocks.
        num_groups: of the GroupNorm.
        backend: see :class:`scalelong_fast.models.attention.Attention`.
        block_scaling: what the transformer's branch as a whole is multiplied by (ScaleLong Table 3); None: nothing.
    """

    #: See :class:`~scalelong_fast.models.unet.Stage`.
    takes = "context"

    def __init__(
        self,
        channels: int,
        num_heads: int,
        context_dim: int,
        depth: int = 1,
        num_groups: int = 32,
        backend: str = "sdpa",
        block_scaling: nn.Module | None = None,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, num_heads, context_dim, backend) for _ in range(depth)]
        )
        self.proj_out = zero_branch(nn.Conv2d(channels, channels, 1), block_scaling)
        self.block_scaling = block_scaling

    def forward(self, x: Tensor, context: Tensor, fused: bool = False) -> Tensor:
        """Attend among the H·W positions of ``x`` and to the text ``context`` ``(B, M, D)``."""
        _, _, height, width = x.shape
        normalised, _ = normalise(x, self.norm, fused=fused)
        tokens = pointwise(self.proj_in, nn.Conv2d, normalised)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        out = pointwise(self.proj_out, nn.Conv2d, to_image(tokens, height, width))
        return x + scale_branch(self.block_scaling, to_image(out, height, width))

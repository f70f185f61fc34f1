"""Residual blocks and resizing of the UNet; parameter names are those of the openai UNets."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from scalelong_fast.models.unet_norm import ScaledSkip, Stats, concat_long_skip, convolve, merge_long_skip, normalise
from scalelong_fast.ops.autocast import no_autocast
from scalelong_fast.plain import is_untouched
from scalelong_fast.scaling import scale_branch
from scalelong_fast.scaling.block_output import ReZero


def conv3x3(channels: int, out_channels: int) -> nn.Conv2d:
    """A 3×3 convolution that keeps the image's size."""
    return nn.Conv2d(channels, out_channels, 3, padding=1)


def zero(module: nn.Module) -> nn.Module:
    """``module`` with all parameters zero, so that its branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def zero_branch(module: nn.Module, block_scaling: nn.Module | None) -> nn.Module:
    """The last layer of a residual branch: zero, unless ReZero's α is. Of α · W with both at 0 neither would learn."""
    return module if isinstance(block_scaling, ReZero) else zero(module)


def halve(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, C, H/2, W/2)`` by averaging."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, C, 2H, 2W)`` by repetition."""
    with no_autocast(x.device.type):  # which on a GPU makes the repetition, four times the image, float32
        return F.interpolate(x, scale_factor=2, mode="nearest")


class Downsample(nn.Module):
    """Strided convolution, ``(B, C, H, W) → (B, C, H/2, W/2)``.

    Args:
        channels: C.
        padding: 1 on every side (1), or on the right and below only (0, as in DDPM).
    """

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.padding = padding
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Repetition and a convolution, ``(B, C, H, W) → (B, C, 2H, 2W)``."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(double(x))


class ResBlock(nn.Module):
    """Two convolutions, each after GroupNorm and SiLU, with the time embedding between them, beside a shortcut.

    Hooks on ``in_layers`` of a block that resizes and on ``out_layers`` of one with ``scale_shift`` do not run, as in
    the openai UNets: something else happens between the layers of the container.

    Args:
        channels, out_channels: C and C_out.
        emb_channels: width E of the time embedding.
        num_groups: of the GroupNorms.
        dropout: rate before the second convolution.
        scale_shift: the embedding scales and shifts the second norm instead of being added before it.
        resize: ``down`` or ``up`` halves or doubles the image before the first convolution and in the shortcut.
        block_scaling: what the convolutions' branch is multiplied by (ScaleLong Table 3); None: nothing.
        norm_eps: ε of the GroupNorms.
    """

    #: See :class:`~scalelong_fast.models.unet.Stage`.
    takes = "embedding and skip"

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        num_groups: int = 32,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resize: Literal["down", "up"] | None = None,
        block_scaling: nn.Module | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.in_layers = nn.Sequential(
            nn.GroupNorm(num_groups, channels, norm_eps), nn.SiLU(), conv3x3(channels, out_channels)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(num_groups, out_channels, norm_eps),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_branch(conv3x3(out_channels, out_channels), block_scaling),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.block_scaling = block_scaling

    def forward(
        self, x: Tensor, emb: Tensor, skip: ScaledSkip | None = None, fused: bool = False
    ) -> Tensor | tuple[Tensor, Stats | None]:
        """Plain or fused.

        Args:
            x: ``(B, C, H, W)``; of a decoder block on the plain path the concat with its long skip, on the fused path
                the decoder's half of it.
            emb: time embedding ``(B, E)``.
            skip: decoder blocks on the fused path only: the other half.
            fused: norms by fused ops.

        Returns:
            ``(B, C_out, H, W)``, H and W halved or doubled by a block that resizes; on the fused path with the
            statistics of x (None where no fused op read it, or beside a ``skip``).
        """
        stats = None
        if skip is not None and not is_untouched(self.in_layers, nn.Sequential):
            x, skip = concat_long_skip(x, skip), None
        if skip is not None:
            norm, activation, convolution = self.in_layers
            h, shortcut = merge_long_skip(x, skip, norm, activation, self.skip_connection)
            h = convolution(h)
        elif self.resize is not None:
            norm, activation, convolution = self.in_layers
            h, stats = normalise(x, norm, activation, fused=fused)
            resize = halve if self.resize == "down" else double
            h, shortcut = convolution(resize(h)), self.skip_connection(resize(x))
        else:
            h, stats = convolve(self.in_layers, x, fused)
            shortcut = self.skip_connection(x)
        out = shortcut + scale_branch(self.block_scaling, self._second_half(h, self.emb_layers(emb), fused))
        return (out, stats) if fused else out

    def _second_half(self, h: Tensor, emb: Tensor, fused: bool) -> Tensor:
        if not self.scale_shift:
            return convolve(self.out_layers, h + emb.to(h.dtype)[:, :, None, None], fused)[0]
        norm, activation, dropout, convolution = self.out_layers
        h, _ = normalise(h, norm, activation, emb, fused)
        return convolution(dropout(h))

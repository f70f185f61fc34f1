"""The UNet's hyperparameters: one dataclass that the model, the presets and the command line share."""

from dataclasses import dataclass
from typing import Literal

from scalelong_fast.errors import check_bool, check_range, invalid, unknown_name
from scalelong_fast.models.config import ATTENTION_BACKENDS
from scalelong_fast.scaling import check_calibration, resolve_block_scaling, resolve_scaling
from scalelong_fast.scaling.gates import ACTIVATIONS, INITS


@dataclass(frozen=True)
class UNetConfig:
    """Hyperparameters of a convolutional UNet of the DDPM, IDDPM, ADM and LDM family."""

    img_size: int = 32
    """Height and width of the (square) images or latents, in pixels."""
    in_chans: int = 3
    """Channels of the images or latents."""
    model_channels: int = 128
    """Channels of the outermost level."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level in units of model_channels, outermost first; each level halves the image."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Sides of the feature maps, in pixels, that get attention; the middle always has it."""
    num_heads: int = 1
    """Attention heads."""
    num_head_channels: int | None = None
    """Channels per attention head; replaces num_heads."""
    use_new_attention_order: bool = False
    """How the joint projection is divided: by q, k, v and then heads (True, ADM) or by heads first (False)."""
    use_scale_shift_norm: bool = False
    """The time embedding scales and shifts the second norm of a residual block instead of being added before it."""
    resblock_updown: bool = False
    """Residual blocks that resize, instead of a strided convolution and a convolution after upsampling."""
    num_groups: int = 32
    """Groups of every GroupNorm; divides the channels of every level."""
    norm_eps: float = 1e-5
    """Epsilon of the GroupNorms (1e-6 in DDPM); that of transformers over a feature map is 1e-6 in any case."""
    freq_shift: int = 0
    """1: frequencies of the time embedding as in DDPM, the lowest of which is 1/10000; 0: as in the openai UNets."""
    downsample_padding: int = 1
    """Padding of the strided convolutions: 1 on every side (1), or on the right and below only (0, as in DDPM)."""
    dropout: float = 0.0
    """Dropout rate in the residual blocks."""
    num_classes: int = -1
    """Labels of a class-conditional model, the null class of classifier-free guidance counted; -1: unconditional."""
    clip_dim: int = 0
    """Width of the text features of a text-conditional model, whose attention blocks are transformers; 0: no text."""
    num_clip_token: int = 77
    """Text tokens of a text-conditional model."""
    transformer_depth: int = 1
    """Transformer blocks per attention block of a text-conditional model."""
    learn_sigma: bool = False
    """Twice the output channels, as in published weights that also predict the variance: noise first."""
    use_checkpoint: bool = False
    """Recompute each block in the backward instead of keeping its activations."""
    scaling: str = "ls"
    """Coefficients of the long skips: none, uniform, cs, cs-reversed, ls, ls-individual, learnable."""
    kappa: float | None = None
    """Base coefficient of uniform, cs, cs-reversed and learnable; good values 0.5 to 0.95."""
    calibration: Literal["se", "ie"] = "se"
    """LS: the gate that makes kappa of a skip's means: se (squeeze and excitation) or ie (instance enhancement: a scale
    and a shift per channel)."""
    reduction: int = 16
    """LS: reduction r of the SE gate (4, 8, 16); its hidden width is channels/r and at least 1."""
    adapter_reduction: int = 4
    """ls: N/r of the encoder and decoder of each width N around the shared SE gate."""
    activation: Literal["relu", "elu", "mish"] = "relu"
    """LS: activation of the SE gate."""
    init: Literal["paper", "identity"] = "paper"
    """LS: the paper's initialisation, or identity (kappa near 1 at the start, for networks already trained)."""
    block_scaling: Literal["none", "stable-tau", "rezero"] = "none"
    """Scaling of the blocks' residual branches, a baseline: none, stable-tau (x + tau f(x)) or rezero (x + alpha f(x),
    alpha learnt from 0)."""
    block_tau: float = 0.1
    """tau of stable-tau; the paper compares 0.1 and 0.3."""
    attention: Literal["sdpa", "xformers", "math"] = "sdpa"
    """Attention backend."""
    fused: bool | None = None
    """Fused long skips and GroupNorms (True), plain PyTorch (False), or fused where it wins (none)."""

    def __post_init__(self) -> None:
        for field in ("channel_mult", "attention_resolutions"):
            value = getattr(self, field)
            if not isinstance(value, (tuple, list)):
                raise invalid(field, value, "a tuple of whole numbers")
            object.__setattr__(self, field, tuple(value))  # JSON knows lists only
        for field in ("img_size", "in_chans", "model_channels", "num_res_blocks", "num_heads", "num_groups"):
            check_range(field, getattr(self, field), low=1, integer=True)
        for field in ("num_clip_token", "transformer_depth", "reduction", "adapter_reduction"):
            check_range(field, getattr(self, field), low=1, integer=True)
        check_range("num_classes", self.num_classes, low=-1, integer=True)
        check_range("clip_dim", self.clip_dim, low=0, integer=True)
        check_range("dropout", self.dropout, low=0, high=1, high_open=True)
        check_range("norm_eps", self.norm_eps, low=0, low_open=True)
        check_range("freq_shift", self.freq_shift, low=0, high=1, integer=True)
        check_range("downsample_padding", self.downsample_padding, low=0, high=1, integer=True)
        if self.freq_shift and self.model_channels < 4:
            raise invalid("freq_shift", self.freq_shift, f"0 with model_channels = {self.model_channels}")
        if self.kappa is not None:
            check_range("kappa", self.kappa, low=0, low_open=True)
        self._check_levels()
        self._check_heads()
        if self.num_classes > 0 and self.clip_dim > 0:
            raise invalid("clip_dim", self.clip_dim, "0 in a class-conditional model", "Drop one of the conditions.")
        object.__setattr__(self, "scaling", resolve_scaling(self.scaling))
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        check_calibration(self.calibration)
        object.__setattr__(self, "block_scaling", resolve_block_scaling(self.block_scaling))
        check_range("block_tau", self.block_tau, low=0, low_open=True)
        if self.init not in INITS:
            raise unknown_name("init", self.init, INITS)
        if self.attention not in ATTENTION_BACKENDS:
            raise unknown_name("attention", self.attention, ATTENTION_BACKENDS)
        for field in ("use_new_attention_order", "use_scale_shift_norm", "resblock_updown", "learn_sigma"):
            check_bool(field, getattr(self, field))
        check_bool("use_checkpoint", self.use_checkpoint)
        if self.fused is not None and not isinstance(self.fused, bool):
            raise invalid("fused", self.fused, "True, False or None (fused where it wins)")

    def _check_levels(self) -> None:
        if not self.channel_mult:
            raise invalid("channel_mult", self.channel_mult, "at least one level")
        for mult in self.channel_mult:
            check_range("channel_mult", mult, low=1, integer=True)
        halvings = len(self.channel_mult) - 1
        if self.img_size % 2**halvings:
            raise invalid(
                "img_size",
                self.img_size,
                f"a multiple of {2**halvings}, since {len(self.channel_mult)} levels halve the image {halvings} times",
                "Take another size or fewer levels (channel_mult).",
            )
        for width in self.level_channels:
            if width % self.num_groups:
                raise invalid(
                    "num_groups",
                    self.num_groups,
                    f"a divisor of the channels of every level, {self.level_channels}",
                    "Change num_groups, model_channels or channel_mult.",
                )
        sides = tuple(self.img_size >> level for level in range(len(self.channel_mult)))
        for side in self.attention_resolutions:
            if side not in sides:
                raise invalid(
                    "attention_resolutions",
                    self.attention_resolutions,
                    f"sides among {sides}",
                    f"They are sides of the feature maps of an image of {self.img_size} pixels: change them along with "
                    "img_size and channel_mult.",
                )

    def _check_heads(self) -> None:
        sides = [self.img_size >> level for level in range(len(self.channel_mult))]
        for side, width in [*zip(sides, self.level_channels, strict=True), (None, self.level_channels[-1])]:
            if side is not None and side not in self.attention_resolutions:
                continue
            where = "in the middle" if side is None else f"where the feature map is {side} pixels wide"
            mend = f"So many are {where}. Change it, model_channels, channel_mult or attention_resolutions."
            if self.num_head_channels is not None:
                check_range("num_head_channels", self.num_head_channels, low=1, integer=True)
                if width % self.num_head_channels:
                    raise invalid("num_head_channels", self.num_head_channels, f"a divisor of {width} channels", mend)
            elif width % self.num_heads:
                raise invalid("num_heads", self.num_heads, f"a divisor of {width} channels", mend)

    def heads_of(self, channels: int) -> int:
        """Attention heads of a block of so many channels."""
        return self.num_heads if self.num_head_channels is None else channels // self.num_head_channels

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, outermost first."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels N_i of the long skips i = 1 … N: the stem, every residual block, every downsampling."""
        channels = [self.model_channels]
        for level, width in enumerate(self.level_channels):
            channels += [width] * self.num_res_blocks
            if level + 1 < len(self.channel_mult):
                channels.append(width)
        return tuple(channels)

    @property
    def decoder_concats(self) -> tuple[tuple[int, int, int], ...]:
        """(C_x, C_skip, side in pixels) of the decoder's concats in the order in which they are made, i = N … 1."""
        waiting, channels, found = list(self.skip_channels), self.level_channels[-1], []
        for level, width in reversed(list(enumerate(self.level_channels))):
            for _ in range(self.num_res_blocks + 1):
                found.append((channels, waiting.pop(), self.img_size >> level))
                channels = width
        return tuple(found)

    @property
    def num_skips(self) -> int:
        """N, the number of long skip connections."""
        return len(self.skip_channels)

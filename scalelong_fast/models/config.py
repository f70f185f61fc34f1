"""The U-ViT's hyperparameters: one dataclass that the model, the presets and the command line share."""

from dataclasses import dataclass
from typing import Literal

from scalelong_fast.errors import check_bool, check_range, invalid, unknown_name
from scalelong_fast.scaling import check_calibration, resolve_block_scaling, resolve_scaling
from scalelong_fast.scaling.gates import ACTIVATIONS, INITS

ATTENTION_BACKENDS = ("sdpa", "xformers", "math")


@dataclass(frozen=True)
class UViTConfig:
    """Hyperparameters of a U-ViT (Bao et al., CVPR 2023); names as in the authors' released code."""

    img_size: int = 32
    """Height and width of the (square) images or latents, in pixels."""
    patch_size: int = 2
    """Side of a patch, in pixels; divides img_size."""
    in_chans: int = 3
    """Channels of the images or latents."""
    embed_dim: int = 512
    """Width D of the tokens; a multiple of num_heads."""
    depth: int = 12
    """Encoder plus decoder blocks (even); one more sits in the middle. There are depth/2 long skips."""
    num_heads: int = 8
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, in units of embed_dim."""
    qkv_bias: bool = False
    """A bias in the query, key and value projection."""
    qk_scale: float | None = None
    """Factor of the attention logits; none: 1/sqrt(head width)."""
    mlp_time_embed: bool = False
    """An MLP on top of the sinusoidal time embedding."""
    num_classes: int = -1
    """Labels of a class-conditional model, the null class of classifier-free guidance counted; -1: unconditional."""
    clip_dim: int = 0
    """Width of the text features of a text-conditional model; 0: no text."""
    num_clip_token: int = 77
    """Text tokens of a text-conditional model."""
    conv: bool = True
    """A 3x3 convolution at the end."""
    skip: bool = True
    """Long skip connections (False: the ablation without any)."""
    use_checkpoint: bool = False
    """Recompute each block in the backward instead of keeping its activations."""
    scaling: str = "ls"
    """Coefficients of the long skips: none, uniform, cs, cs-reversed, ls, ls-individual, learnable."""
    kappa: float | None = None
    """Base coefficient of uniform, cs, cs-reversed and learnable; good values 0.5 to 0.95."""
    calibration: Literal["se", "ie"] = "se"
    """LS: the gate that makes kappa of a skip's means: se (squeeze and excitation) or ie (instance enhancement: a scale
    and a shift per token)."""
    reduction: int = 16
    """LS: reduction r of the SE gate (4, 8, 16); its hidden width is tokens/r and at least 1."""
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
    """Fused long skips and residual LayerNorms (True), plain PyTorch (False), or fused where it wins (none)."""
    residual_dtype: Literal["bf16", "fp32"] = "fp32"
    """Dtype of the residual stream while training or sampling under bf16 autocast."""

    def __post_init__(self) -> None:
        for field in ("img_size", "patch_size", "in_chans", "num_heads", "num_clip_token", "reduction"):
            check_range(field, getattr(self, field), low=1, integer=True)
        check_range("embed_dim", self.embed_dim, low=2, integer=True)
        check_range("depth", self.depth, low=2, integer=True)
        check_range("mlp_ratio", self.mlp_ratio, low=0, low_open=True)
        check_range("num_classes", self.num_classes, low=-1, integer=True)
        check_range("clip_dim", self.clip_dim, low=0, integer=True)
        if self.qk_scale is not None:
            check_range("qk_scale", self.qk_scale, low=0, low_open=True)
        if self.kappa is not None:
            check_range("kappa", self.kappa, low=0, low_open=True)
        if self.depth % 2:
            raise invalid("depth", self.depth, "an even number", "Encoder and decoder have depth/2 blocks each.")
        if self.img_size % self.patch_size:
            raise invalid("img_size", self.img_size, f"a multiple of patch_size = {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise invalid("embed_dim", self.embed_dim, f"a multiple of num_heads = {self.num_heads}")
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
        for field in ("qkv_bias", "mlp_time_embed", "conv", "skip", "use_checkpoint"):
            check_bool(field, getattr(self, field))
        if self.fused is not None and not isinstance(self.fused, bool):
            raise invalid("fused", self.fused, "True, False or None (fused where it wins)")
        if self.residual_dtype not in ("bf16", "fp32"):
            raise unknown_name("residual_dtype", self.residual_dtype, ("bf16", "fp32"))

    @property
    def extras(self) -> int:
        """Tokens before the patches: time, and label or text."""
        if self.clip_dim > 0:
            return 1 + self.num_clip_token
        return 2 if self.num_classes > 0 else 1

    @property
    def num_tokens(self) -> int:
        """L, the length of the token sequence."""
        return self.extras + (self.img_size // self.patch_size) ** 2

    @property
    def num_skips(self) -> int:
        """N, the number of long skip connections."""
        return self.depth // 2 if self.skip else 0

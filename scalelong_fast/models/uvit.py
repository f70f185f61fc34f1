"""U-ViT (Bao et al., CVPR 2023) with scaled long skip connections (ScaleLong)."""

import torch
from torch import Tensor, nn

from scalelong_fast.models.config import UViTConfig
from scalelong_fast.models.embedding import timestep_embedding
from scalelong_fast.models.hub import Backbone
from scalelong_fast.models.inputs import check_dtype, check_input, text_features
from scalelong_fast.models.layers import Block, PatchEmbed, residual_norm, unpatchify
from scalelong_fast.models.long_skip import Stream, prepare
from scalelong_fast.ops.differentiable import under_functorch
from scalelong_fast.scaling import LongSkipScaling, create_block_scaling, create_scaling


class UViT(
    nn.Module,
    Backbone,
    library_name="scalelong_fast",
    license="apache-2.0",
    tags=["diffusion", "u-vit", "scalelong"],
):
    """Vision transformer with long skips between encoder and decoder; predicts the noise ε.

    Encoder block j = 1 … N feeds long skip i = j; decoder blocks use them last-in first-out, so that the first one
    merges skip N. Parameter names and shapes are those of the authors' released code; the coefficients live in
    ``scaling``. Build one with :func:`scalelong_fast.create_model`.

    Args:
        config: hyperparameters, see :class:`UViTConfig`.
    """

    def __init__(self, config: UViTConfig):
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim)
        self.time_embed: nn.Module = nn.Identity()
        if config.mlp_time_embed:
            self.time_embed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        if config.num_classes > 0:
            self.label_emb = nn.Embedding(config.num_classes, dim)
        if config.clip_dim > 0:
            self.context_embed = nn.Linear(config.clip_dim, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, dim))

        def block(skip: bool = False) -> Block:
            return Block(
                dim,
                config.num_heads,
                config.mlp_ratio,
                config.qkv_bias,
                config.qk_scale,
                config.attention,
                skip,
                config.use_checkpoint,
                create_block_scaling(config.block_scaling, config.block_tau),
            )

        self.in_blocks = nn.ModuleList([block() for _ in range(config.depth // 2)])
        self.mid_block = block()
        self.out_blocks = nn.ModuleList([block(config.skip) for _ in range(config.depth // 2)])
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, config.patch_size**2 * config.in_chans)
        self.final_layer = nn.Conv2d(config.in_chans, config.in_chans, 3, padding=1) if config.conv else nn.Identity()
        self._initialize()
        # After _initialize: the gates have an initialisation of their own.
        self.scaling: LongSkipScaling | None = None
        if config.skip:
            self.scaling = create_scaling(
                config.scaling,
                num_skips=config.num_skips,
                widths=config.num_tokens,
                kappa=config.kappa,
                calibration=config.calibration,
                reduction=config.reduction,
                activation=config.activation,
                init=config.init,
            )

    def _initialize(self) -> None:
        """The authors' initialisation: truncated normal of std 0.02 for Linears and positions, zero biases."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images the model takes and returns."""
        return self.config.in_chans, self.config.img_size, self.config.img_size

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise in ``x``.

        Args:
            x: noisy images or latents ``(B, C, H, W)``.
            timesteps: ``(B,)`` on the 0…999 scale, whole or fractional (999 t for continuous t in [0, 1]).
            y: labels ``(B,)`` int64 of a class-conditional model, or text features ``(B, L_text, D_text)`` of a
                text-conditional one; None for an unconditional model.

        Returns:
            ε prediction ``(B, C, H, W)`` in the dtype of ``x``.

        Raises:
            UserError: a shape or dtype that does not fit, or a condition missing or unexpected.
        """
        config = self.config
        check_input(config, self.input_shape, x, timesteps, y)
        check_dtype(x, self.patch_embed.proj)
        tokens = [self.time_embed(timestep_embedding(timesteps, config.embed_dim).to(self.pos_embed.dtype))[:, None]]
        if config.clip_dim > 0:
            tokens.append(self.context_embed(text_features(y, x)))
        elif config.num_classes > 0:
            tokens.insert(0, self.label_emb(y)[:, None])
        h = torch.cat([*tokens, self.patch_embed(x)], dim=1) + self.pos_embed
        h = h.to(self._residual_dtype(h))

        h = self._fused_blocks(h) if self._use_fused(h) else self._plain_blocks(h)
        patches = self.decoder_pred(h[:, config.extras :])
        return self.final_layer(unpatchify(patches, config.in_chans)).to(x.dtype)

    def _plain_blocks(self, h: Tensor) -> Tensor:
        """All blocks and the last norm in plain PyTorch: the reference."""
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            if self.scaling is None:
                h = block(h)
                continue
            i = len(skips)
            h = block(h, self.scaling(skips.pop(), i))
        return self.norm(h)

    def _fused_blocks(self, h: Tensor) -> Tensor:
        """The same with fused ops: each residual addition is made by the norm after it, which also pools the skip."""
        stream, _ = self.in_blocks[0](Stream(h))
        skips = []
        for block in [*self.in_blocks[1:], self.mid_block]:
            stream, skip = block(stream)
            skips.append(skip)
        for block in self.out_blocks:
            if self.scaling is None:
                stream, _ = block(stream)
                continue
            i = len(skips)
            stream, kappa = block(stream, prepare(self.scaling, i, *skips.pop()))
            if kappa is not None:
                self.scaling.record(i, kappa)
        return residual_norm(stream, self.norm)[0]

    def _use_fused(self, h: Tensor) -> bool:
        if self.config.fused is None:
            # functorch transforms take plain PyTorch only.
            return h.device.type == "cuda" and not under_functorch()
        return self.config.fused

    def _residual_dtype(self, h: Tensor) -> torch.dtype:
        # Only bf16 autocast may narrow the stream: fp16 would overflow in deep networks.
        device = h.device.type
        narrow = self.config.residual_dtype == "bf16" and torch.amp.is_autocast_available(device)
        narrow = narrow and torch.is_autocast_enabled(device)
        if narrow and torch.get_autocast_dtype(device) == torch.bfloat16:
            return torch.bfloat16
        return h.dtype

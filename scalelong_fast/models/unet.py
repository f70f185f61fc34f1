"""Convolutional UNets of the DDPM, IDDPM, ADM and LDM family with scaled long skip connections (ScaleLong)."""

import torch
from torch import Tensor, nn

from scalelong_fast.models.embedding import timestep_embedding
from scalelong_fast.models.hub import Backbone
from scalelong_fast.models.inputs import check_dtype, check_input, text_features
from scalelong_fast.models.long_skip import is_plain_scaling
from scalelong_fast.models.recomputing import maybe_recomputed
from scalelong_fast.models.unet_attention import AttentionBlock, SpatialTransformer
from scalelong_fast.models.unet_blocks import Downsample, ResBlock, Upsample, conv3x3, zero
from scalelong_fast.models.unet_config import UNetConfig
from scalelong_fast.models.unet_norm import ScaledSkip, Stats, convolve
from scalelong_fast.ops import channel_stats
from scalelong_fast.ops.differentiable import under_functorch
from scalelong_fast.scaling import create_block_scaling, create_scaling


class Stage(nn.Sequential):
    """Layers that run one after the other, each with what it takes besides the feature.

    That is what its class says under ``takes``, not its class, so that layers may be wrapped (activation checkpointing,
    FSDP, torch.compile): wrappers pass on the attributes of what they wrap. A layer that says nothing gets the feature.

    Args:
        *layers: ResBlock, AttentionBlock, SpatialTransformer, or layers of the feature alone.
        use_checkpoint: what to recompute in the backward, see :func:`~.recomputing.maybe_recomputed`.
    """

    def __init__(self, *layers: nn.Module, use_checkpoint: bool | str = False):
        super().__init__(*layers)
        self.use_checkpoint = use_checkpoint

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None, skip: ScaledSkip | None = None, fused: bool = False
    ) -> Tensor | tuple[Tensor, Stats | None]:
        """Plain or fused.

        Args:
            x: ``(B, C, H, W)``, see :class:`ResBlock`.
            emb: time embedding ``(B, E)``.
            context: text features ``(B, M, D)`` of a text-conditional model.
            skip, fused: see :class:`ResBlock`.

        Returns:
            The feature; on the fused path with the statistics of x where the first layer is a residual block that
            made them, else None.
        """
        return maybe_recomputed(self, self._forward, x, emb, context, skip, fused)

    def _forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None, skip: ScaledSkip | None, fused: bool
    ) -> Tensor | tuple[Tensor, Stats | None]:
        stats = None
        for position, layer in enumerate(self):
            takes = getattr(layer, "takes", None)
            if takes == "embedding and skip":
                x = layer(x, emb, skip if position == 0 else None, fused)
                if fused:
                    x, of_input = x
                    stats = of_input if position == 0 else stats
            elif takes == "context":
                x = layer(x, context, fused)
            elif takes == "nothing else":
                x = layer(x, fused)
            else:
                x = layer(x)
        return (x, stats) if fused else x


class UNet(
    nn.Module,
    Backbone,
    library_name="scalelong_fast",
    license="apache-2.0",
    tags=["diffusion", "unet", "scalelong"],
):
    """UNet with residual blocks and attention; predicts the noise ε.

    Every stage of the encoder feeds a long skip: the stem i = 1, then each residual block and each downsampling, up to
    i = N. Decoder stages use them last-in first-out, so that the first one meets skip N. Parameter names and shapes
    are those of the openai UNets (of LDM where there is text); the coefficients live in ``scaling``. Features are
    channels_last throughout, and so are the weights; FSDP takes contiguous ones only, which do as well:
    ``model.to(memory_format=torch.contiguous_format)``. Build one with :func:`scalelong_fast.create_model`.

    Args:
        config: hyperparameters, see :class:`UNetConfig`.
    """

    #: Of the features; the fused path takes channels_last only.
    memory_format: torch.memory_format = torch.channels_last

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels = config.model_channels
        emb_channels = 4 * channels
        self.time_embed = nn.Sequential(
            nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if config.num_classes > 0:
            self.label_emb = nn.Embedding(config.num_classes, emb_channels)
        self.input_blocks = self._encoder()
        width = config.level_channels[-1]
        self.middle_block = self._stage(self._res(width, width), self._attention(width), self._res(width, width))
        self.output_blocks = self._decoder()
        width = config.level_channels[0]
        self.out = nn.Sequential(
            nn.GroupNorm(config.num_groups, width, config.norm_eps),
            nn.SiLU(),
            zero(conv3x3(width, config.in_chans * (2 if config.learn_sigma else 1))),
        )
        self.to(memory_format=self.memory_format)
        self.scaling = create_scaling(
            config.scaling,
            num_skips=config.num_skips,
            widths=config.skip_channels,
            kappa=config.kappa,
            calibration=config.calibration,
            reduction=config.reduction,
            adapter_reduction=config.adapter_reduction,
            activation=config.activation,
            init=config.init,
        )

    def _stage(self, *layers: nn.Module) -> Stage:
        return Stage(*layers, use_checkpoint=self.config.use_checkpoint)

    def _res(self, channels: int, out_channels: int, resize: str | None = None) -> ResBlock:
        config = self.config
        return ResBlock(
            channels,
            out_channels,
            4 * config.model_channels,
            config.num_groups,
            config.dropout,
            config.use_scale_shift_norm,
            resize,
            self._block_scaling(),
            config.norm_eps,
        )

    def _attention(self, channels: int) -> AttentionBlock | SpatialTransformer:
        config, heads = self.config, self.config.heads_of(channels)
        if config.clip_dim > 0:
            depth, groups = config.transformer_depth, config.num_groups
            return SpatialTransformer(
                channels, heads, config.clip_dim, depth, groups, config.attention, self._block_scaling()
            )
        order, eps = config.use_new_attention_order, config.norm_eps
        return AttentionBlock(channels, heads, config.num_groups, order, config.attention, self._block_scaling(), eps)

    def _block_scaling(self) -> nn.Module | None:
        return create_block_scaling(self.config.block_scaling, self.config.block_tau)

    def _encoder(self) -> nn.ModuleList:
        config = self.config
        channels = config.model_channels
        stages = [self._stage(conv3x3(config.in_chans, channels))]
        for level, width in enumerate(config.level_channels):
            for _ in range(config.num_res_blocks):
                layers = [self._res(channels, width)]
                channels = width
                if config.img_size >> level in config.attention_resolutions:
                    layers.append(self._attention(width))
                stages.append(self._stage(*layers))
            if level + 1 < len(config.level_channels):
                if config.resblock_updown:
                    stages.append(self._stage(self._res(width, width, "down")))
                else:
                    stages.append(self._stage(Downsample(width, config.downsample_padding)))
        return nn.ModuleList(stages)

    def _decoder(self) -> nn.ModuleList:
        config = self.config
        skips = list(config.skip_channels)
        channels = config.level_channels[-1]
        stages = []
        for level, width in reversed(list(enumerate(config.level_channels))):
            for block in range(config.num_res_blocks + 1):
                layers = [self._res(channels + skips.pop(), width)]
                channels = width
                if config.img_size >> level in config.attention_resolutions:
                    layers.append(self._attention(width))
                if level > 0 and block == config.num_res_blocks:
                    layers.append(self._res(width, width, "up") if config.resblock_updown else Upsample(width))
                stages.append(self._stage(*layers))
        return nn.ModuleList(stages)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images the model takes."""
        return self.config.in_chans, self.config.img_size, self.config.img_size

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise in ``x``.

        Args:
            x: noisy images or latents ``(B, C, H, W)``, in either memory format.
            timesteps: ``(B,)`` on the 0…999 scale, whole or fractional (999 t for continuous t in [0, 1]).
            y: labels ``(B,)`` int64 of a class-conditional model, or text features ``(B, L_text, D_text)`` of a
                text-conditional one; None for an unconditional model.

        Returns:
            ε prediction ``(B, C, H, W)``, ``(B, 2C, H, W)`` with ``learn_sigma``, in the dtype and memory format of
            ``x``.

        Raises:
            UserError: a shape or dtype that does not fit, or a condition missing or unexpected.
        """
        config = self.config
        check_input(config, self.input_shape, x, timesteps, y)
        check_dtype(x, self.time_embed[0])
        sinusoids = timestep_embedding(timesteps, config.model_channels, freq_shift=config.freq_shift)
        emb = self.time_embed(sinusoids.to(x.dtype))
        if config.num_classes > 0:
            emb = emb + self.label_emb(y)
        context = text_features(y, x) if config.clip_dim > 0 else None
        fused = self._use_fused(x)
        run = self._fused_stages if fused else self._plain_stages
        h = run(x.contiguous(memory_format=self.memory_format), emb, context)
        h, _ = convolve(self.out, h, fused)
        return h.to(x.dtype).contiguous(memory_format=_format_of(x))

    def _plain_stages(self, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        """Encoder, middle and decoder in plain PyTorch: the reference."""
        skips = []
        for stage in self.input_blocks:
            h = stage(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for stage in self.output_blocks:
            i = len(skips)
            h = stage(torch.cat([h, self.scaling(skips.pop(), i).to(h.dtype)], dim=1), emb, context)
        return h

    def _fused_stages(self, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        """The same with fused ops: the norm that reads a feature next gives the statistics of its long skip."""
        skips = []
        for position, stage in enumerate([*self.input_blocks, self.middle_block]):
            feature = h
            h, stats = stage(feature, emb, context, fused=True)
            if position > 0:  # what goes into a stage has come out of the one before; the image is no long skip
                skips.append((feature, stats))
        for stage in self.output_blocks:
            i = len(skips)
            h, _ = stage(h, emb, context, self._scaled(i, *skips.pop()), fused=True)
        return h

    def _scaled(self, i: int, features: Tensor, stats: Stats | None) -> ScaledSkip:
        """Long skip i with its coefficient."""
        if not is_plain_scaling(self.scaling):
            # Somebody added to the scaling: it makes the product itself.
            pooled = None if stats is None else stats.mean
            return ScaledSkip(self.scaling(features, i, pooled), 1.0, None)
        if stats is None and self.scaling.uses_pooled:
            # A strided convolution read it, no norm: it is pooled here, and the decoder's norm has its statistics.
            stats = Stats(*channel_stats(features))
        pooled = None if stats is None else stats.mean
        return ScaledSkip(features, self.scaling.kappa(i, features, pooled), stats)

    def _use_fused(self, x: Tensor) -> bool:
        if self.config.fused is None:
            # functorch transforms take plain PyTorch only.
            return x.device.type == "cuda" and not under_functorch()
        return self.config.fused


def _format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format

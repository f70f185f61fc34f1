"""The training recipe published with U-ViT and ScaleLong, rebuilt from its description as the reference to beat.

It keeps what decides the speed of the released code: a strided convolution as patch embedding, ``einops`` and float32
queries, keys and values in the attention, LS as mean, Linear, ReLU, Linear, sigmoid and a product, CS as a product with
a number, a concatenated skip, AdamW with default settings over one parameter group, a ``LambdaLR``, an EMA parameter by
parameter, and mixed precision around the network alone, as Accelerate applies it: the published command asks for fp16,
whose gradient scaler reads on the host in every step whether a gradient was infinite. So does moving the frequencies of
the time embedding, made on the host in every call, wait for the device. Left out, to its advantage: data loading,
switching the modules between training and evaluation in every step, and barriers of a single process.
"""

import copy
import math

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalelong_fast.models import UViTConfig


class AuthorsMlp(nn.Module):
    """Linear, GELU, dropout (of probability 0), Linear, dropout, as timm had it."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(hidden))


class AuthorsAttention(nn.Module):
    """Self-attention ``(B, L, D) → (B, L, D)`` on queries, keys and values raised to float32."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.qkv(x)
        heads = einops.rearrange(projected, "b l (three h d) -> three b h l d", three=3, h=self.num_heads).float()
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        return self.proj_drop(self.proj(einops.rearrange(mixed, "b h l d -> b l (h d)")))


class AuthorsBlock(nn.Module):
    """Pre-norm block; a decoder block first maps cat[x, skip] from 2D to D."""

    def __init__(self, config: UViTConfig, skip: bool):
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = AuthorsAttention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = AuthorsMlp(dim, int(dim * config.mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat((x, skip), dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AuthorsGate(nn.Module):
    """LS: ``(B, L, D) → (B, L, 1)``, the coefficient of each token."""

    def __init__(self, tokens: int, reduction: int):
        super().__init__()
        self.layer1 = nn.Linear(tokens, tokens // reduction)
        self.layer2 = nn.Linear(tokens // reduction, tokens)
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()

    def forward(self, skip: Tensor) -> Tensor:
        pooled = skip.mean(dim=-1)
        return self.sigmoid(self.layer2(self.relu(self.layer1(pooled)))).unsqueeze(-1)


class AuthorsPatchEmbed(nn.Module):
    """Images to tokens by a strided convolution."""

    def __init__(self, config: UViTConfig):
        super().__init__()
        side = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, kernel_size=side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        return einops.rearrange(self.proj(x), "b d h w -> b (h w) d")


def _embed_times(times: Tensor, dim: int) -> Tensor:
    half = dim // 2
    # Made on the host at each call and moved, as in the released code.
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / half)).to(times.device)
    phases = times.float()[:, None] * frequencies[None]
    return torch.cat((phases.cos(), phases.sin()), dim=-1)


class AuthorsUViT(nn.Module):
    """U-ViT, with labels or without; ``config.scaling`` is ``ls``, ``cs`` or ``none``.

    Its state dict has the released parameter names, which
    :func:`~scalelong_fast.integrations.load_uvit_checkpoint` reads.

    Args:
        config: size; fields that the released configurations for images do not use must keep their defaults.
    """

    def __init__(self, config: UViTConfig):
        super().__init__()
        self.config = config
        self.kappa = 0.7 if config.kappa is None else config.kappa
        self.label_emb = nn.Embedding(config.num_classes, config.embed_dim) if config.num_classes > 0 else None
        self.patch_embed = AuthorsPatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, config.embed_dim))
        half = config.depth // 2
        self.in_blocks = nn.ModuleList(AuthorsBlock(config, skip=False) for _ in range(half))
        self.mid_block = AuthorsBlock(config, skip=False)
        self.out_blocks = nn.ModuleList(AuthorsBlock(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(config.embed_dim)
        self.decoder_pred = nn.Linear(config.embed_dim, config.patch_size**2 * config.in_chans)
        self.final_layer = nn.Conv2d(config.in_chans, config.in_chans, 3, padding=1)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The gate comes last: it keeps the initialisation of nn.Linear.
        self.se = AuthorsGate(config.num_tokens, config.reduction) if config.scaling == "ls" else None

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """ε prediction ``(B, C, H, W)`` of images, like it, at times ``(B,)`` on the 0…999 scale; labels y ``(B,)``."""
        config = self.config
        patches = self.patch_embed(x)
        time_token = _embed_times(timesteps, config.embed_dim).unsqueeze(1)
        h = torch.cat((time_token, patches), dim=1)
        if self.label_emb is not None:
            h = torch.cat((self.label_emb(y).unsqueeze(1), h), dim=1)
        h = h + self.pos_embed
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            skip = skips.pop()
            if self.se is not None:
                skip = skip * self.se(skip)
            elif config.scaling == "cs":
                skip = skip * self.kappa ** len(skips)
            h = block(h, skip)
        h = self.decoder_pred(self.norm(h))[:, config.extras :]
        side = config.img_size // config.patch_size
        p = config.patch_size
        image = einops.rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p)
        return self.final_layer(image)


def _vp_coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
    # alpha^2 = exp(-integral of beta from 0 to t), beta from 0.1 to 20 (Song et al. 2021, Eq. 33).
    alpha_squared = (-(0.1 * t + (20 - 0.1) * t**2 * 0.5)).exp()
    return alpha_squared**0.5, (1.0 - alpha_squared) ** 0.5


class AuthorsStep:
    """The released training step.

    Args:
        model: on the device where the images will be; called with images, times and labels.
        autocast: dtype of mixed precision around the network, or None for float32; float16 scales the loss.
        compiled: call the network through ``torch.compile``.
        lr, betas, weight_decay, warmup_steps, ema_rate: as in the released configuration for CIFAR-10.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: torch.dtype | None = None,
        compiled: bool = False,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.99, 0.999),
        weight_decay: float = 0.03,
        warmup_steps: int = 2500,
        ema_rate: float = 0.9999,
    ):
        self.model, self.autocast, self.ema_rate = model, autocast, ema_rate
        self.average = copy.deepcopy(model).eval()
        self.network = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: min(n / warmup_steps, 1.0))
        device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)

    def loss(self, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Squared error of each image, ``(B,)`` float32; x0, noise ``(B, C, H, W)``, t ``(B,)`` in [0, 1), labels."""
        alpha, sigma = _vp_coefficients(t)
        noisy = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise
        enabled = self.autocast is not None
        with torch.autocast(x0.device.type, dtype=self.autocast or torch.bfloat16, enabled=enabled):
            predicted = self.network(noisy, t * 999, labels)
        difference = noise - predicted.float()
        return difference.pow(2).flatten(start_dim=1).mean(dim=-1)

    def __call__(self, x0: Tensor, labels: Tensor | None = None) -> Tensor:
        """Draw times and noise for the images and take one step; returns the loss, a 0-dim device tensor."""
        self.optimizer.zero_grad()
        t = torch.rand(x0.shape[0], device=x0.device)
        loss = self.loss(x0, t, torch.randn_like(x0), labels)
        logged = loss.detach().mean()  # what gathering over one process comes to
        self.scaler.scale(loss.mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self._update_average()
        return logged

    @torch.no_grad()
    def _update_average(self) -> None:
        current = dict(self.model.named_parameters())
        for name, average in self.average.named_parameters():
            average.mul_(self.ema_rate).add_((1 - self.ema_rate) * current[name])

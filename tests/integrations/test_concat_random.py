"""Random UNets: of one to three dimensions, any number of levels, blocks and skips, with concats that are no skips."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scalelong_fast.integrations.patching import apply_scalelong, state_of

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Block(nn.Module):
    """A convolution, and beside it nothing, a dense layer, attention with a pooled token, or squeeze and excitation."""

    def __init__(self, dims, channels, out, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm = CONVOLUTIONS[dims](channels, out, 3, padding=1), nn.GroupNorm(1, out)
        self.linear = nn.Linear(out, out)
        self.dense, self.project = CONVOLUTIONS[dims](out, 2, 3, padding=1), CONVOLUTIONS[dims](out + 2, out, 1)

    def forward(self, x):
        x = F.silu(self.norm(self.conv(x)))
        tokens = x.flatten(2).transpose(1, 2)
        if self.kind == "dense":
            x = self.project(torch.cat([x, self.dense(x)], 1))
        elif self.kind == "attention":
            keys = torch.cat([tokens, self.linear(tokens.mean(1, keepdim=True))], 1)
            attended = F.scaled_dot_product_attention(tokens, keys, keys)
            x = x + attended.transpose(1, 2).reshape(x.shape)
        elif self.kind == "excitation":
            x = x * torch.sigmoid(self.linear(tokens.mean(1))).view(*x.shape[:2], *[1] * (x.dim() - 2))
        return x


class RandomUNet(nn.Module):
    """Attributes ``widths`` (outermost first) and ``skip_first`` say what is to be found."""

    def __init__(self, draw):
        super().__init__()
        self.dims = draw.choice([1, 2, 3])
        levels, blocks = (2 if self.dims == 3 else draw.choice([2, 3])), draw.choice([1, 2, 3])
        self.skip_first, self.keep_stem, self.keep_halved = (draw.random() < 0.5 for _ in range(3))
        self.halve = draw.choice(["stride", "pool", "resize"])

        def block(channels, out):
            return Block(self.dims, channels, out, draw.choice(["plain", "dense", "attention", "excitation"]))

        width = [draw.choice([2, 3, 4, 8, 16]) for _ in range(levels)]
        convolution = CONVOLUTIONS[self.dims]
        self.stem, channels = convolution(2, width[0], 3, padding=1), width[0]
        self.widths = [channels] if self.keep_stem else []
        self.encode, self.down, self.decode = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in range(levels):
            self.encode.append(
                nn.ModuleList(block(channels if n == 0 else width[level], width[level]) for n in range(blocks))
            )
            channels = width[level]
            self.widths += [channels] * blocks
            if level < levels - 1:
                strided = self.halve == "stride"
                self.down.append(convolution(channels, channels, 3, 2, 1) if strided else nn.Identity())
                self.widths += [channels] * self.keep_halved
        self.middle = block(channels, channels)
        left = list(self.widths)
        for level in reversed(range(levels)):
            self.decode.append(nn.ModuleList())
            for _ in range(blocks + (self.keep_halved if level else self.keep_stem)):
                self.decode[-1].append(block(channels + left.pop(), width[level]))
                channels = width[level]

    def forward(self, x):
        x = self.stem(x)
        kept = [x] if self.keep_stem else []
        for level, blocks in enumerate(self.encode):
            for block in blocks:
                x = block(x)
                kept.append(x)
            if level < len(self.down):
                x = self.down[level](x)
                if self.halve == "pool":
                    x = getattr(F, f"max_pool{self.dims}d")(x, 2)
                elif self.halve == "resize":
                    x = F.interpolate(x, scale_factor=0.5)
                if self.keep_halved:
                    kept.append(x)
        x = self.middle(x)
        for blocks in self.decode:
            for block in blocks:
                skip = kept.pop()
                if skip.shape != x.shape:
                    x = F.interpolate(x, skip.shape[2:])
                x = block(torch.cat([skip, x] if self.skip_first else [x, skip], 1))
        return x


@pytest.mark.parametrize("seed", range(16))
def test_the_skips_of_a_random_network_are_found(seed):
    draw = random.Random(seed)
    net = RandomUNet(draw)
    x = torch.randn(draw.choice([1, 2]), 2, *[4 if net.dims == 3 else draw.choice([8, 12])] * net.dims)
    apply_scalelong(net, "cs", example_inputs=(x,))
    sites = state_of(net).sites
    assert [site.width for site in sites] == net.widths
    assert {site.skip_first for site in sites} == {net.skip_first}

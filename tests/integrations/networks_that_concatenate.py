"""Networks that concatenate long skips by themselves, each in a way that is in use, for the tests of patching them.

Loaded by ``test_concat_networks.py``. Each skip goes through :func:`edit`, so that the same code is also the network
that somebody edited by hand.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def edit(module, skip, i):
    """What somebody who edits the network by hand would write around a skip; nothing in the stock network."""
    by_hand = getattr(module, "by_hand", ())
    return by_hand[0](skip, i) if by_hand else skip


def edit_by_hand(net, scaling):
    """Let the network scale its skips itself."""
    for module in net.modules():
        module.by_hand = (scaling,)
    return net


def conv(channels, out, stride=1):
    return nn.Conv2d(channels, out, 3, stride, 1)


class Condition(nn.Module):
    """Attention whose keys and values are concatenated with those of a condition, along the tokens."""

    def __init__(self, channels):
        super().__init__()
        self.qkv, self.of_condition = nn.Conv2d(channels, 3 * channels, 1), nn.Linear(5, 2 * channels)

    def forward(self, x, condition):
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, -1)
        more_k, more_v = self.of_condition(condition).chunk(2, -1)
        k, v = torch.cat([k, more_k], dim=1), torch.cat([v, more_v], dim=1)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


class OwnCheckpoint(torch.autograd.Function):
    """Recomputation that gives gradients to listed parameters alone."""

    @staticmethod
    def forward(ctx, run, count, *tensors):
        ctx.run, ctx.count, ctx.tensors = run, count, tensors
        with torch.no_grad():
            return run(*tensors[:count])

    @staticmethod
    def backward(ctx, grad):
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.tensors[: ctx.count]]
        with torch.enable_grad():
            out = ctx.run(*[tensor.view_as(tensor) for tensor in inputs])
        return None, None, *torch.autograd.grad(out, [*inputs, *ctx.tensors[ctx.count :]], grad)


class ResBlock(nn.Module):
    """With an embedding, and recomputed in the backward in one of three ways."""

    def __init__(self, channels, out, how):
        super().__init__()
        self.how = how
        self.norm, self.conv1, self.emb = nn.GroupNorm(2, channels), conv(channels, out), nn.Linear(8, out)
        self.conv2, self.shortcut = conv(out, out), nn.Conv2d(channels, out, 1)

    def forward(self, x, emb):
        if self.how == "own":
            return OwnCheckpoint.apply(self.run, 2, x, emb, *self.parameters())
        if self.how in (True, False):
            return checkpoint(self.run, x, emb, use_reentrant=self.how)
        return self.run(x, emb)

    def run(self, x, emb):
        h = self.conv1(F.silu(self.norm(x))) + self.emb(emb)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(h))


class Stage(nn.Sequential):
    def forward(self, x, emb, condition):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, Condition):
                x = layer(x, condition)
            else:
                x = layer(x)
        return x


class Stack(nn.Module):
    """Every stage of the encoder is kept on a stack, concatenated in the forward of the network."""

    def __init__(self, how=None):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.down = nn.ModuleList(
            [
                Stage(conv(3, 4)),
                Stage(ResBlock(4, 4, how)),
                Stage(conv(4, 4, 2)),
                Stage(ResBlock(4, 8, how), Condition(8)),
                Stage(ResBlock(8, 8, how)),
            ]
        )
        self.middle = Stage(ResBlock(8, 8, how), Condition(8))
        self.up = nn.ModuleList(
            [
                Stage(ResBlock(16, 8, how)),
                Stage(ResBlock(16, 8, how), Condition(8)),
                Stage(ResBlock(12, 8, how), nn.Upsample(scale_factor=2)),
                Stage(ResBlock(12, 4, how)),
                Stage(ResBlock(8, 4, how)),
            ]
        )
        self.out = conv(4, 3)

    def forward(self, x, t, condition):
        angles = t[:, None] * torch.tensor([1.0, 0.1, 0.01])
        emb = self.embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        kept = []
        for stage in self.down:
            x = stage(x, emb, condition)
            kept.append(x)
        x = self.middle(x, emb, condition)
        for stage in self.up:
            i = len(kept)
            x = stage(torch.cat([x, edit(self, kept.pop(), i)], dim=1), emb, condition)
        return self.out(x)


class Up(nn.Module):
    """Decoder block of a segmentation network: pads, and puts the skip first."""

    def __init__(self, channels, skip, out, i):
        super().__init__()
        self.i = i
        self.up = nn.ConvTranspose2d(channels, channels // 2, 2, 2)
        self.twice = nn.Sequential(conv(channels // 2 + skip, out), nn.BatchNorm2d(out), nn.ReLU(inplace=True))

    def forward(self, x, encoded):
        x = self.up(x)
        x = F.pad(x, (0, encoded.shape[3] - x.shape[3], 0, encoded.shape[2] - x.shape[2]))
        return self.twice(torch.cat([edit(self, encoded, self.i), x], dim=1))


class DecoderLoop(nn.Module):
    """A segmentation network with a condition beside its image, and the image once more before the last layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(4, 4), nn.ReLU(inplace=True))
        self.down = nn.ModuleList(
            [nn.Sequential(nn.MaxPool2d(2), conv(4, 8)), nn.Sequential(nn.MaxPool2d(2), conv(8, 16))]
        )
        self.up = nn.ModuleList([Up(16, 8, 8, 2), Up(8, 4, 4, 1)])
        self.out = nn.Conv2d(7, 2, 1)

    def forward(self, image, mask=None):
        mask = torch.zeros_like(image[:, :1]) if mask is None else mask
        features = [self.stem(torch.cat([image, mask], 1))]
        for down in self.down:
            features.append(down(features[-1]))
        x = features[-1]
        for up, skip in zip(self.up, features[-2::-1], strict=True):
            x = up(x, skip)
        return self.out(torch.cat((x, image), dim=-3))


class Recursive(nn.Module):
    """A block around a block, with activations in place: what it concatenates was changed after it came in."""

    def __init__(self, channels, inner, inside, i):
        super().__init__()
        self.i = i
        down = [nn.LeakyReLU(0.2, True), conv(channels, inner, 2), nn.BatchNorm2d(inner)]
        into = 2 * inner if inside is not None else inner
        up = [nn.ReLU(True), nn.ConvTranspose2d(into, channels, 4, 2, 1), nn.BatchNorm2d(channels)]
        self.model = nn.Sequential(*down, *([] if inside is None else [inside]), *up)

    def forward(self, x):
        # The way inside runs first: x is changed in place by it.
        inside = self.model(x)
        return torch.cat([edit(self, x, self.i), inside], 1)


def recursive():
    blocks = Recursive(4, 8, Recursive(8, 16, Recursive(16, 16, None, 3), 2), 1)
    return nn.Sequential(conv(3, 4), blocks, nn.ReLU(True), conv(8, 3))


class OneDimension(nn.Module):
    """Audio: (B, C, L), two skips of a level taken one after the other, skips joined by ``torch.concat``."""

    def __init__(self):
        super().__init__()
        wide = {"kernel_size": 3, "padding": 1}
        self.inp = nn.Conv1d(2, 4, **wide)
        self.encode = nn.ModuleList([nn.Conv1d(4, 4, **wide), nn.Conv1d(4, 8, stride=2, **wide)])
        self.tokens = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register = nn.Parameter(torch.randn(1, 3, 8))
        self.decode = nn.ModuleList([nn.ConvTranspose1d(8, 4, 2, 2), nn.Conv1d(8, 4, **wide), nn.Conv1d(8, 2, **wide)])

    def forward(self, x):
        x = self.inp(x)
        first = x.clone()
        x = second = F.silu(self.encode[0](x))
        x = self.encode[1](F.silu(x))
        tokens = x.transpose(1, 2)
        tokens = torch.cat([tokens, self.register.expand(len(x), -1, -1)], 1)
        x = self.tokens(tokens, tokens, tokens)[0][:, :-3].transpose(1, 2)
        x = self.decode[0](x)
        x = F.silu(self.decode[1](torch.concat((x, edit(self, second, 2)), dim=1)))
        return self.decode[2](torch.concat((x, edit(self, first, 1)), dim=1))


class SkipAround(nn.Module):
    """A container that returns its input beside what its submodule makes of it."""

    def __init__(self, inside, i):
        super().__init__()
        self.inside, self.i = inside, i

    def forward(self, x):
        return torch.cat([edit(self, x, self.i), self.inside(x)], dim=1)


def three_dimensions():
    """Volumes, written as one nested Sequential."""

    def conv3(channels, out, stride=1):
        return nn.Sequential(nn.Conv3d(channels, out, 3, stride, 1), nn.InstanceNorm3d(out), nn.PReLU())

    def up(channels, out):
        return nn.Sequential(nn.ConvTranspose3d(channels, out, 2, 2), nn.InstanceNorm3d(out))

    middle = nn.Sequential(conv3(8, 16, 2), conv3(16, 16), up(16, 8))
    inner = nn.Sequential(conv3(4, 8, 2), SkipAround(middle, 2), up(16, 4))
    return nn.Sequential(conv3(1, 4), SkipAround(inner, 1), nn.Conv3d(8, 1, 1))


class Dense(nn.Module):
    """A dense block: every layer's input beside its output."""

    def __init__(self, channels, growth, count=2):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.BatchNorm2d(channels + n * growth), conv(channels + n * growth, growth))
                for n in range(count)
            ]
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class ConcatUp(nn.Module):
    """Upsamples and returns the concat, which the next block receives."""

    def __init__(self, channels, i):
        super().__init__()
        self.i, self.up = i, nn.ConvTranspose2d(channels, channels, 3, 2, 1, 1)

    def forward(self, x, encoded):
        x = self.up(x)
        return torch.cat([x, edit(self, encoded, self.i)], 1)


class Halve(nn.Module):
    """Downsamples in two ways at once."""

    def __init__(self, channels, out):
        super().__init__()
        self.conv = conv(channels, out - channels, 2)

    def forward(self, x):
        return torch.cat([self.conv(x), F.max_pool2d(x, 2)], 1)


class DenseUNet(nn.Module):
    """Dense blocks in encoder, middle and decoder, and branches on the way down: their concats are no long skips."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 4)
        self.dense_down = nn.ModuleList([Dense(4, 2), Dense(8, 2)])
        self.down = nn.ModuleList([nn.AvgPool2d(2), Halve(12, 16)])
        self.middle = Dense(16, 2)
        self.up = nn.ModuleList([ConcatUp(20, 2), ConcatUp(8, 1)])
        self.dense_up = nn.ModuleList(
            [nn.Sequential(Dense(32, 2), conv(36, 8)), nn.Sequential(Dense(16, 2), conv(20, 3))]
        )

    def forward(self, x):
        x, kept = self.stem(x), []
        for dense, down in zip(self.dense_down, self.down, strict=True):
            x = dense(x)
            kept.insert(0, x)
            x = down(x)
        x = self.middle(x)
        for up, dense, skip in zip(self.up, self.dense_up, kept, strict=True):
            x = dense(up(x, skip))
        return x


class Gate(nn.Module):
    """Attention gate: the skip, weighed by a map made of it and of the stream."""

    def __init__(self, channels):
        super().__init__()
        self.of_stream, self.of_skip, self.psi = (nn.Conv2d(channels, n, 1) for n in (4, 4, 1))
        self.psi = nn.Conv2d(4, 1, 1)

    def forward(self, stream, encoded):
        return encoded * torch.sigmoid(self.psi(F.relu(self.of_stream(stream) + self.of_skip(encoded))))


class AttentionGated(nn.Module):
    """Skips through attention gates, parallel branches in the middle, and a concat passed by keyword."""

    def __init__(self):
        super().__init__()
        self.e1, self.e2, self.e3 = conv(3, 4), conv(4, 8, 2), conv(8, 16, 2)
        self.branches = nn.ModuleList([nn.Conv2d(16, 8, 3, padding=rate, dilation=rate) for rate in (1, 2)])
        self.pooled = nn.Conv2d(16, 8, 1)
        self.project = nn.Conv2d(24, 16, 1)
        self.u2, self.u1 = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.g2, self.g1 = Gate(8), Gate(4)
        self.d2, self.d1 = conv(16, 8), conv(8, 3)

    def forward(self, x):
        x1 = F.relu(self.e1(x))
        x2 = F.relu(self.e2(x1))
        x3 = F.relu(self.e3(x2))
        pooled = self.pooled(x3.mean((2, 3), keepdim=True)).expand(-1, -1, *x3.shape[2:])
        x3 = self.project(torch.cat([*(branch(x3) for branch in self.branches), pooled], 1))
        up = self.u2(x3)
        up = F.relu(self.d2(input=torch.cat([edit(self, self.g2(up, x2), 2), up], axis=1)))
        up = self.u1(up)
        return self.d1(input=torch.cat([edit(self, self.g1(up, x1), 1), up], axis=1))


class Tokens(nn.Module):
    """A transformer of one resolution throughout, with skips along the features of tokens."""

    def __init__(self, depth=2):
        super().__init__()
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.extra = nn.Parameter(torch.randn(1, 2, 8))
        self.patch = nn.Linear(3, 8)
        self.encode, self.decode = (nn.ModuleList(copy.deepcopy(block) for _ in range(depth)) for _ in "ab")
        self.middle = copy.deepcopy(block)
        self.merge = nn.ModuleList(nn.Linear(16, 8) for _ in range(depth))

    def forward(self, x):
        x = torch.cat([self.extra.expand(len(x), -1, -1), self.patch(x)], 1)
        kept = []
        for block in self.encode:
            x = block(x)
            kept.append(x)
        x = self.middle(x)
        for merge, block in zip(self.merge, self.decode, strict=True):
            i = len(kept)
            x = block(merge(torch.cat([x, edit(self, kept.pop(), i)], dim=-1)))
        return x


class Merging(nn.Module):
    """Windows of tokens are merged on the way down: (B, L, C), L a quarter at each level."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.down = nn.ModuleList([nn.Linear(32, 16), nn.Linear(64, 32)])
        self.norm = nn.LayerNorm(32)
        self.up = nn.ModuleList([nn.Linear(32, 64), nn.Linear(16, 32)])
        self.back = nn.ModuleList([nn.Linear(32, 16), nn.Linear(16, 8)])

    def forward(self, x):
        x, kept = self.embed(x), []
        for down in self.down:
            kept.append(x)
            parts = [x[:, n::4] for n in range(4)]
            x = F.gelu(down(torch.cat(parts, -1)))
        x = self.norm(x)
        for up, back in zip(self.up, self.back, strict=True):
            i = len(kept)
            x = up(x)
            x = x.view(len(x), -1, x.shape[-1] // 4)
            x = F.gelu(back(torch.cat([x, edit(self, kept.pop(), i)], -1)))
        return x


class OwnLayers(nn.Module):
    """Skips through layers of their own on the decoder's side, scaled by a constant, the first one cropped."""

    def __init__(self):
        super().__init__()
        self.e1, self.e2, self.e3 = nn.Conv2d(3, 4, 3), conv(4, 8, 2), conv(8, 16, 2)
        self.s1, self.s2 = nn.Conv2d(4, 6, 1), nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6))
        self.d2, self.d1 = conv(22, 8), conv(14, 3)

    def forward(self, x):
        x1 = self.e1(x).relu()
        x2 = self.e2(x1).relu()
        up = F.interpolate(self.e3(x2).relu(), scale_factor=2, mode="nearest")
        up = self.d2(torch.cat([up, edit(self, self.s2(x2) * 2**-0.5, 2)], 1))
        up = F.interpolate(up, scale_factor=2)[..., :-1, :-1]
        return self.d1(torch.cat([up, edit(self, self.s1(x1[..., 1:, 1:]) * 2**-0.5, 1)], 1))


class PermutedUp(nn.Module):
    """Hands the concat to a function; the skip is its argument."""

    def __init__(self, channels, skip, out, i):
        super().__init__()
        self.i, self.norm, self.out = i, nn.LayerNorm(channels + skip), nn.Linear(channels + skip, out)

    def forward(self, x, encoded, scale_factor=2):
        x = F.interpolate(x, scale_factor=scale_factor)
        x = torch.cat([x, edit(self, encoded, self.i)], 1).permute(0, 2, 3, 1)
        return self.out(self.norm(x)).permute(0, 3, 1, 2)


class HandedOn(nn.Module):
    """Modules that hand on what they get, dropout and identity, receive the concat first."""

    def __init__(self):
        super().__init__()
        self.e1, self.e2, self.e3 = conv(3, 4), conv(4, 8, 2), conv(8, 16, 2)
        self.up2, self.same, self.drop, self.up1 = PermutedUp(16, 8, 8, 2), nn.Identity(), nn.Dropout(0.1), conv(12, 3)

    def forward(self, x):
        x1 = self.same(self.e1(x))
        x2 = self.e2(x1)
        x = F.interpolate(self.up2(self.e3(x2), encoded=x2), scale_factor=2)
        return self.up1(self.drop(torch.cat([x, edit(self, x1, 1)], 1)))


class Listening(nn.Module):
    """Decoder block that finds its skip in a store, which hooks of the encoder's layers fill."""

    def __init__(self, store, layer, channels, skip, out, i):
        super().__init__()
        self.__dict__.update(store=store, layer=layer, i=i)
        self.shuffle = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.PixelShuffle(2))
        self.norm, self.conv = nn.BatchNorm2d(skip), conv(channels // 2 + skip, out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        encoded, x = self.store[self.layer], self.shuffle(x)
        if x.shape[2:] != encoded.shape[2:]:
            x = F.interpolate(x, encoded.shape[2:])
        return self.conv(self.relu(torch.cat([x, edit(self, self.norm(encoded), self.i)], dim=1)))


class Hooks(nn.Sequential):
    """The encoder is somebody's classifier, whose features hooks pick up."""

    def __init__(self):
        encoder = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 8, 2), nn.ReLU(), conv(8, 16, 2), nn.ReLU())
        store = {}
        super().__init__(encoder, Listening(store, 3, 16, 8, 8, 2), Listening(store, 1, 8, 4, 4, 1), conv(4, 2))
        for layer in (1, 3):
            encoder[layer].register_forward_hook(Keep(store, layer))


class Keep:
    def __init__(self, store, layer):
        self.store, self.layer = store, layer

    def __call__(self, module, args, output):
        self.store[self.layer] = output


class Frames(nn.Module):
    """Video (B, C, T, H, W) whose layers fold time or space into the batch; the skip is scaled by a number."""

    def __init__(self):
        super().__init__()
        self.e1, self.e2, self.time = conv(3, 4), conv(4, 8, 2), nn.Conv1d(8, 8, 3, padding=1)
        self.merge, self.out = nn.Conv3d(12, 4, 1), conv(4, 3)

    def images(self, layer, x):
        folded = x.transpose(1, 2).flatten(0, 1)
        return layer(folded).unflatten(0, (len(x), -1)).transpose(1, 2)

    def forward(self, x):
        skip = self.images(self.e1, x)
        x = self.images(self.e2, skip)
        b, c, t, h, w = x.shape
        x = self.time(x.permute(0, 3, 4, 1, 2).reshape(-1, c, t)).view(b, h, w, c, t).permute(0, 3, 4, 1, 2)
        x = F.interpolate(x, scale_factor=(1, 2, 2))
        return self.images(self.out, self.merge(torch.cat((x, edit(self, skip * 2**-0.5, 1)), dim=1)))


class TwoReaders(nn.Module):
    """A residual block written out in the forward of the network: norm and shortcut both receive the concat."""

    def __init__(self):
        super().__init__()
        self.e1, self.e2, self.m = conv(3, 4), conv(4, 8, 2), conv(8, 8, 2)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 16), nn.GroupNorm(2, 8)])
        self.convs = nn.ModuleList([conv(16, 4), conv(8, 3)])
        self.shortcuts = nn.ModuleList([nn.Conv2d(16, 4, 1), nn.Conv2d(8, 3, 1)])

    def forward(self, x):
        x1 = self.e1(x)
        x2 = self.e2(x1)
        x = self.m(x2)
        layers = zip((x2, x1), (2, 1), self.norms, self.convs, self.shortcuts, strict=True)
        for encoded, i, norm, convolve, shortcut in layers:
            h = torch.cat([F.interpolate(x, scale_factor=2), edit(self, encoded, i)], 1)
            x = convolve(F.silu(norm(h))) + shortcut(h)
        return x


def image(*size, batch=2):
    return torch.randn(batch, *size)


#: A network, the inputs of its forward, and the widths of its skips (outermost first).
NETWORKS = {
    "stack": (Stack, lambda: (image(3, 8, 8), torch.rand(2), torch.randn(2, 3, 5)), [4, 4, 4, 8, 8]),
    "decoder loop": (DecoderLoop, lambda: (image(3, 11, 9), image(1, 11, 9)), [4, 8]),
    "recursive": (recursive, lambda: (image(3, 16, 16),), [4, 8, 16]),
    "one dimension": (OneDimension, lambda: (image(2, 16),), [4, 4]),
    "three dimensions": (three_dimensions, lambda: (image(1, 8, 4, 4),), [4, 8]),
    "dense": (DenseUNet, lambda: (image(3, 8, 8),), [8, 12]),
    "attention gated": (AttentionGated, lambda: (image(3, 8, 8),), [4, 8]),
    "tokens": (Tokens, lambda: (image(7, 3),), [9, 9]),
    "merging": (Merging, lambda: (image(16, 3),), [16, 4]),
    "two readers": (TwoReaders, lambda: (image(3, 8, 8),), [4, 8]),
    "hooks": (Hooks, lambda: (image(3, 13, 13),), [4, 8]),
    "frames": (Frames, lambda: (image(3, 2, 8, 8),), [4]),
    "handed on": (HandedOn, lambda: (image(3, 8, 8),), [4, 8]),
    "own layers": (OwnLayers, lambda: (image(3, 10, 10),), [6, 6]),
}

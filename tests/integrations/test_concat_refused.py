"""Networks whose concats are no long skips, or may be: they are refused, with what was seen, and left as they were."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching import apply_scalelong, state_of
from scalelong_fast.integrations.patching.long_concats import judge
from scalelong_fast.integrations.patching.trace import trace


def conv(channels, out, stride=1):
    return nn.Conv2d(channels, out, 3, stride, 1)


class Net(nn.Module):
    """Two levels; subclasses write what is between."""

    def __init__(self, **layers):
        super().__init__()
        self.e1, self.e2, self.middle = conv(3, 4), conv(4, 4, 2), conv(4, 4)
        self.up, self.out = nn.Upsample(scale_factor=2), conv(8, 3)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def run(self, x):
        raise NotImplementedError

    def forward(self, x):
        x1 = self.e1(x)
        return self.run(x1)


class NoSkips(Net):
    def run(self, x):
        return self.out(self.up(torch.cat([self.e2(x), self.e2(x)], 1)))


class OneDenseBlock(Net):
    """A feature beside what was made of it, at its own resolution."""

    def run(self, x):
        return self.out(torch.cat([x, self.middle(F.relu(x))], 1))


class Magnitudes(Net):
    """Magnitude-preserving concat: both sides are weighed."""

    def run(self, x):
        return self.out(torch.cat([self.up(self.e2(x)) * 0.7, (x * 0.7).to(x.dtype)], 1))


class ThreeFeatures(Net):
    def __init__(self):
        super().__init__(last=conv(12, 3))

    def run(self, x):
        return self.last(torch.cat([self.up(self.e2(x)), x, self.middle(x)], 1))


class TwoDecoders(Net):
    """One encoder, and two decoders that use its features."""

    def __init__(self):
        super().__init__(e3=conv(4, 4, 2), a2=conv(8, 4), b2=conv(8, 4), b1=conv(8, 3))

    def run(self, x):
        x2 = self.e2(x)
        x3 = self.up(self.e3(x2))
        a = self.up(self.a2(torch.cat([x3, x2], 1)))
        b = self.up(self.b2(torch.cat([x3, x2], 1)))
        return self.out(torch.cat([a, x], 1)) + self.b1(torch.cat([b, x], 1))


class OneAfterTheOther(Net):
    """Two networks in a row."""

    def __init__(self):
        super().__init__(between=conv(8, 4))

    def run(self, x):
        x = self.between(torch.cat([self.up(self.e2(x)), x], 1))
        return self.out(torch.cat([self.up(self.e2(x)), x], 1))


class Nested(Net):
    """UNet++: between encoder and decoder lie smaller networks."""

    def __init__(self):
        super().__init__(e3=conv(4, 4, 2), m01=conv(8, 4), m11=conv(8, 4), m02=conv(12, 4), last=conv(4, 3))

    def run(self, x00):
        x10 = self.e2(x00)
        x01 = self.m01(torch.cat([x00, self.up(x10)], 1))
        x20 = self.e3(x10)
        x11 = self.m11(torch.cat([x10, self.up(x20)], 1))
        return self.last(self.m02(torch.cat([x00, x01, self.up(x11)], 1)))


class Pyramid(nn.Module):
    """Pooled, transformed, resized, and put beside what came in."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return torch.cat([x, F.interpolate(self.conv(F.avg_pool2d(x, 2)), scale_factor=2)], 1)


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(12, 8)

    def forward(self, x, encoded):
        return self.conv(torch.cat([F.interpolate(x, scale_factor=2), encoded], 1))


class PyramidInTheMiddle(Net):
    def __init__(self):
        super().__init__(pyramid=Pyramid(), decode=Up())

    def run(self, x):
        return self.out(self.decode(self.pyramid(self.e2(x)), x))


class OnePyramid(Net):
    def __init__(self):
        super().__init__(pyramid=Pyramid())

    def run(self, x):
        return self.out(self.pyramid(x))


class Halves(Net):
    """Downsampled in two ways at once, and then a dense block behind the pooling."""

    def __init__(self):
        super().__init__(dense=conv(8, 4), last=conv(12, 3))

    def run(self, x):
        x = torch.cat([self.e2(x), F.max_pool2d(x, 2)], 1)
        return self.last(torch.cat([x, self.dense(x)], 1))


class BesideTheOthers(Net):
    """A real long skip, and in the same forward a feature beside what was made of it."""

    def __init__(self):
        super().__init__(merge=conv(8, 4))

    def run(self, x):
        x = self.merge(torch.cat([x, self.middle(x)], 1))
        return self.out(torch.cat([self.up(self.e2(x)), x], 1))


class NoMiddle(Net):
    """The decoder follows at once: its first concat is of a feature with itself."""

    def __init__(self):
        super().__init__(first=conv(8, 4))

    def run(self, x):
        x2 = self.e2(x)
        return self.out(torch.cat([self.up(self.first(torch.cat([x2, x2], 1))), x], 1))


class ByFunction(Net):
    def run(self, x):
        return self.out(F.relu(torch.cat([self.up(self.e2(x)), x], 1)))


class Dropped(Net):
    """In eval mode, in which the network is run, dropout hands on the concat itself; in training it does not."""

    def run(self, x):
        return self.out(F.dropout(torch.cat([self.up(self.e2(x)), x], 1), 0.1, self.training))


class SharedActivation(Net):
    def __init__(self):
        super().__init__(act=nn.ReLU())

    def run(self, x):
        return self.out(self.act(torch.cat([self.up(self.act(self.e2(x))), x], 1)))


class InAList(Net):
    def __init__(self):
        super().__init__(takes_list=ListConv())

    def run(self, x):
        return self.takes_list([torch.cat([self.up(self.e2(x)), x], 1)])


class ListConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(8, 3)

    def forward(self, features):
        return self.conv(features[0])


class Returned(Net):
    def run(self, x):
        return torch.cat([self.up(self.e2(x)), x], 1)


#: A network and what the error says.
REFUSED = {
    NoSkips: "1 concats, none of them a long skip",
    OneDenseBlock: "within a block, at one resolution",
    Magnitudes: "magnitude-preserving",
    ThreeFeatures: "more than two features, a long skip among them",
    TwoDecoders: "several decoders",
    OneAfterTheOther: "not last in, first out",
    Nested: "not last in, first out",
    PyramidInTheMiddle: "a block that goes to a lower resolution and back by itself",
    OnePyramid: "a block that goes to a lower resolution and back by itself",
    Halves: "2 concats, none of them a long skip",
    BesideTheOthers: "outside the other long skips or beside them",
    NoMiddle: "doubtful, of two views of one feature",
    ByFunction: "not handed to a module first, but to a function.*expect=1",
    Dropped: "not handed to a module first.*expect=1",
    SharedActivation: "'act', which is used more than once.*expect=1",
    InAList: "inside a list.*expect=1",
    Returned: "returned by the network.*expect=1",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_what_was_seen(kind):
    net, args = kind(), (torch.randn(2, 3, 8, 8),)
    before = [dict(module.__dict__) for module in net.modules()]
    with pytest.raises(UserError, match=f"(?s){REFUSED[kind]}") as raised:
        apply_scalelong(net, "cs", example_inputs=args)
    assert "along dim 1" in str(raised.value)  # the concats are listed
    assert [module.__dict__ for module in net.modules()] == before
    assert state_of(net) is None


def test_without_example_inputs_the_error_asks_for_them():
    with pytest.raises(UserError, match="Pass example_inputs"):
        apply_scalelong(TwoDecoders(), "cs")


def test_lazy_networks_are_refused():
    with pytest.raises(UserError, match="lazy parameters"):
        apply_scalelong(nn.Sequential(nn.LazyConv2d(4, 3)), "cs", example_inputs=(torch.randn(1, 3, 8, 8),))


class Plain(Net):
    def run(self, x):
        return self.out(torch.cat([self.up(self.e2(x)), x], 1))


class ChannelsLast(nn.Module):
    """(B, H, W, C)"""

    def __init__(self):
        super().__init__()
        self.e1, self.e2, self.e3, self.out = (nn.Linear(*n) for n in ((3, 4), (16, 8), (8, 16), (8, 3)))

    def forward(self, x):
        x = self.e1(x)
        y = torch.cat([x[:, n::2, m::2] for n in (0, 1) for m in (0, 1)], -1)
        y = self.e3(self.e2(y)).unflatten(-1, (2, 2, 4)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        return self.out(torch.cat([y, x], -1))


def test_constants_scale_features_with_channels_last():
    net, args = ChannelsLast(), (torch.randn(2, 8, 8, 3),)
    apply_scalelong(net, "uniform", kappa=0.5, example_inputs=args)
    assert [site.width for site in state_of(net).sites] == [None]
    with pytest.raises(
        UserError, match=r"'out' concatenates features \(2, 8, 8, 4\).*Gates take \(B, C, ...\)"
    ) as error:
        apply_scalelong(ChannelsLast(), "ls", example_inputs=args)
    assert "Pass" not in str(error.value)  # more inputs are no help


def test_a_concat_of_other_widths_is_refused_later():
    net = Plain()
    apply_scalelong(net, "cs", example_inputs=(torch.randn(1, 3, 8, 8),))
    with pytest.raises(UserError, match=r"argument 0 of 'out': got \(1, 7, 8, 8\), expected 4 and 4 channels"):
        net.out(torch.randn(1, 7, 8, 8))


class Noisy(Net):
    """A forward that draws random numbers, counts, and writes to its input."""

    def __init__(self):
        super().__init__(norm=nn.BatchNorm2d(4), drop=nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))
        self.last = None

    def run(self, x):
        self.calls += 1
        self.steps, self.last, self.first = self.steps + 1, x, x
        x = self.drop(self.norm(x)) + torch.rand(1)
        return self.out(torch.cat([self.up(self.e2(x)), x], 1))

    def forward(self, x):
        return super().forward(x.mul_(2))


def test_the_run_leaves_nothing_behind():
    net, image = Noisy(), torch.randn(2, 3, 8, 8)
    net.norm.eval()
    before, state, generator = image.clone(), [b.clone() for b in net.buffers()], torch.get_rng_state()
    seen = trace(net, (image,))
    assert [concat.verdict for concat in judge(seen)] == ["long skip"]
    assert torch.equal(image, before)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), state, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert net.last is None
    assert not hasattr(net, "first")
    assert net.drop.training
    assert not net.norm.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_failing_run_is_explained_and_leaves_nothing_behind():
    net = Plain()
    with pytest.raises(UserError, match="example_inputs: Plain failed on them"):
        apply_scalelong(net, "cs", example_inputs=(torch.randn(2, 5, 8, 8),))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert net.training

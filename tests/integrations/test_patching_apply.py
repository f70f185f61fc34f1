"""apply_scalelong, remove_scalelong and scalelong_report: arguments, refusals, adapters of one's own, the report."""

import warnings

import pytest
import torch
from torch import nn

import scalelong_fast
from scalelong_fast import apply_scalelong, create_model, remove_scalelong, scalelong_report
from scalelong_fast.errors import UserError
from scalelong_fast.integrations import Adapter, Finding, Site, register_adapter
from scalelong_fast.integrations.patching import apply_record, list_adapters, state_of
from scalelong_fast.integrations.patching.adapters import registry


class Layer(nn.Sequential):
    def __init__(self, width: int, out: int):
        super().__init__(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))


class Down(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.resnets = nn.ModuleList([Layer(width, out), Layer(out, out)])

    def forward(self, x):
        features = []
        for layer in self.resnets:
            x = layer(x)
            features.append(x)
        return x, features


class Up(nn.Module):
    def __init__(self, width: int, skips: tuple[int, int], out: int):
        super().__init__()
        self.resnets = nn.ModuleList([Layer(width + skips[0], out), Layer(out + skips[1], out)])

    def forward(self, stream, res_hidden_states_tuple):
        for number, layer in enumerate(self.resnets, start=1):
            stream = layer(self.join(stream, res_hidden_states_tuple[-number]))
        return stream

    def join(self, stream, skip):
        return torch.cat([stream, skip], dim=1)


class Net(nn.Module):
    """Skips of 16, 16, 32 and 32 channels, outermost first; those of the first convolution are not used."""

    def __init__(self, up: type[Up] = Up):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.encoder = nn.ModuleList([Down(8, 16), Down(16, 32)])
        self.decoder = nn.ModuleList([up(32, (32, 32), 32), up(32, (16, 16), 16)])

    def forward(self, x):
        x = self.first(x)
        features = [x]
        for block in self.encoder:
            x, more = block(x)
            features += more
        for number, block in enumerate(self.decoder, start=1):
            stop = len(features) - 2 * number
            x = block(x, features[stop : stop + 2])
        return x


X = torch.randn(2, 3, 8, 8)


@pytest.fixture
def net() -> Net:
    return Net().eval()


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"scaling": "lz"}, "Did you mean 'ls'"),
            ({"scaling": "cs", "kappa": 0.0}, "kappa: got 0.0"),
            ({"scaling": "cs", "kappa": float("nan")}, "kappa: got nan"),
            ({"shared": 1}, "shared: got 1"),
            ({"fused": "yes"}, "fused: got 'yes'"),
            ({"scaling": "cs", "shared": True}, "shared: got True, expected False with scaling 'cs'"),
            ({"scaling": "ls-individual", "shared": True}, "Only 'ls' has a gate"),
            ({"init": "zero"}, "init: got 'zero'"),
            ({"expect": 0}, "expect: got 0"),
            ({"expect": 3}, "expect: got 3, but tuple-of-skips found 4:\n- skip 1: .* of 'decoder.1'"),
            ({"example_inputs": X}, "example_inputs: got 'Tensor', expected a tuple"),
            ({"example_inputs": (X, X)}, "example_inputs: Net failed on them .TypeError"),
        ],
    )
    def test_bad_ones_say_so_and_change_nothing(self, net, options, said):
        before = set(vars(net)), list(net.state_dict())
        with pytest.raises(UserError, match=said):
            apply_scalelong(net, **options)
        assert (set(vars(net)), list(net.state_dict())) == before
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())

    def test_kappa_of_gates_is_passed_over_in_silence(self, net, recwarn):
        apply_scalelong(net, kappa=0.5)
        assert not recwarn.list

    def test_names(self, net):
        assert apply_scalelong(net) is net
        assert net.scalelong.settings["scaling"] == "ls-individual"
        remove_scalelong(net)
        assert apply_scalelong(net, "LS", shared=True).scalelong.settings["scaling"] == "ls"
        remove_scalelong(net)
        assert apply_scalelong(net, "cs_reversed").scalelong.settings["scaling"] == "cs-reversed"

    def test_the_right_number_is_accepted(self, net):
        apply_scalelong(net, expect=4)
        apply_scalelong(net)
        apply_scalelong(net, expect=4)
        with pytest.raises(UserError, match=r"expect"):
            apply_scalelong(net, expect=5)

    @pytest.mark.parametrize(
        ("scaling", "kappas"),
        [
            ("uniform", [0.5, 0.5, 0.5, 0.5]),
            ("cs", [1.0, 0.5, 0.25, 0.125]),
            ("cs-reversed", [0.0625, 0.125, 0.25, 0.5]),
            ("learnable", [0.5, 0.5, 0.5, 0.5]),
            ("none", [1.0, 1.0, 1.0, 1.0]),
        ],
    )
    def test_kappa(self, net, scaling, kappas):
        apply_scalelong(net, scaling, kappa=0.5)
        assert [site.kappa for site in scalelong_report(net, show=False)] == kappas


class TestTwice:
    def test_the_same_settings_change_nothing(self, net):
        apply_scalelong(net, init="paper")
        state, hooks = net.scalelong, sum(len(m._forward_pre_hooks) for m in net.modules())
        before = net(X)
        with torch.no_grad():
            state.scaling.gates[0].up.bias.add_(1.0)
        after = net(X)
        assert apply_scalelong(net, init="paper") is net
        assert net.scalelong is state
        assert sum(len(m._forward_pre_hooks) for m in net.modules()) == hooks
        assert torch.equal(net(X), after)
        assert not torch.equal(after, before)

    @pytest.mark.parametrize("other", [{"scaling": "cs"}, {"shared": True}, {"init": "paper"}, {"fused": False}])
    def test_other_settings_are_refused_and_change_nothing(self, net, other):
        apply_scalelong(net)
        state = net.scalelong
        with pytest.raises(UserError, match=r"patched already, with .*remove_scalelong"):
            apply_scalelong(net, **other)
        assert net.scalelong is state
        assert not state.settings["shared"]

    def test_removal_of_nothing_is_no_error(self, net):
        before = set(vars(net))
        assert remove_scalelong(net) is net
        assert remove_scalelong(remove_scalelong(apply_scalelong(net))) is net
        assert set(vars(net)) == before

    def test_patched_again_after_removal(self, net):
        plain = net(X)
        apply_scalelong(net, "cs")
        scaled = net(X)
        remove_scalelong(net)
        assert torch.equal(net(X), plain)
        apply_scalelong(net, "cs")
        assert torch.equal(net(X), scaled)

    def test_hooks_of_others_stay(self, net):
        seen = []
        handle = net.decoder[0].register_forward_pre_hook(lambda module, args: seen.append(len(args)))
        remove_scalelong(apply_scalelong(net))
        net(X)
        assert seen == [2]
        handle.remove()


class TestRefused:
    def test_what_is_no_module(self, net):
        class Pipeline:
            unet = net

        with pytest.raises(UserError, match=r"model: got 'Pipeline', expected a torch.nn.Module. Pass its .*'unet'"):
            apply_scalelong(Pipeline())
        with pytest.raises(UserError, match=r"got 'int'"):
            scalelong_report(3)

    def test_our_own_networks(self):
        model = create_model("uvit_digits")
        with pytest.raises(UserError, match=r"UViT of scalelong_fast.*create_model\(name, scaling=...\)"):
            apply_scalelong(model)

    def test_wrapped_for_parallel_training(self, net):
        with pytest.raises(UserError, match=r"DataParallel has collected.*Patch the network first"):
            apply_scalelong(nn.DataParallel(net))

    @pytest.mark.parametrize("kind", ["DataParallel", "FSDP2"])
    def test_parts_that_are_wrapped_for_parallel_training(self, net, kind):
        if kind == "DataParallel":
            net.encoder[0] = nn.DataParallel(net.encoder[0])
            said = r"part 'encoder.0' is wrapped. DataParallel has collected.*Patch the network first, then wrap"
        else:
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
            try:
                torch.distributed.fsdp.fully_shard(net.encoder[0], mesh=torch.distributed.init_device_mesh("cpu", (1,)))
            finally:
                torch.distributed.destroy_process_group()
            said = r"part 'encoder.0' is sharded \(FSDP\) already. Patch the network first, then shard"
        with pytest.raises(UserError, match=said):
            apply_scalelong(net)
        assert state_of(net) is None

    def test_a_patched_network_that_was_wrapped_since(self, net):
        apply_scalelong(net)
        net.encoder[0] = nn.DataParallel(net.encoder[0])
        assert apply_scalelong(net) is net

    def test_a_network_with_a_child_of_that_name(self, net):
        net.scalelong = nn.Identity()
        with pytest.raises(UserError, match=r"attribute 'scalelong' of its own"):
            apply_scalelong(net)

    def test_a_whole_whose_part_is_patched(self, net):
        whole = nn.ModuleDict({"net": apply_scalelong(net)})
        with pytest.raises(UserError, match=r"part 'net' is patched, not the whole ModuleDict"):
            apply_scalelong(whole)
        with pytest.raises(UserError, match=r"part 'net' is patched, not the whole ModuleDict"):
            remove_scalelong(whole)
        assert state_of(net)
        assert len(scalelong_report(whole, show=False)) == 4
        two = nn.ModuleList([net, apply_scalelong(Net())])
        with pytest.raises(UserError, match=r"ModuleList is not patched"):
            scalelong_report(two, show=False)

    def test_torch_script(self):
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1)))
        for function in (apply_scalelong, remove_scalelong, scalelong_report):
            with pytest.raises(UserError, match=r"it is TorchScript.*Patch the network it was made from"):
                function(scripted)

    def test_two_networks_in_one(self, net):
        with pytest.raises(UserError, match=r"in several places: 'average.decoder', 'net.decoder'"):
            apply_scalelong(nn.ModuleDict({"net": net, "average": Net()}))

    def test_one_network_in_another(self, net):
        class Trainer(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self, x):
                return self.net(x)

        trainer = apply_scalelong(Trainer(), "cs")
        expected = trainer(X)
        remove_scalelong(trainer)
        assert torch.equal(apply_scalelong(net, "cs")(X), expected)

    def test_an_unknown_network_is_told_what_was_looked_for_and_seen(self):
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3))
        with pytest.raises(UserError) as error:
            apply_scalelong(network)
        for said in (
            "no long skip connections were found in Sequential; nothing was changed",
            "tuple-of-skips looks for blocks whose forward takes res_hidden_states_tuple: no module takes it",
            "skip-argument",
            "concat-consumer",
            "Pass example_inputs",
        ):
            assert said in str(error.value)
        with pytest.raises(UserError, match=r"SkipConcat"):
            apply_scalelong(network, example_inputs=(X,))
        assert not state_of(network)

    def test_a_decoder_that_does_not_fit_its_encoder(self):
        net = Net()
        net.encoder[0] = Down(8, 24)
        with pytest.raises(UserError, match=r"skips of \[32, 32, 16, 16\] channels, the encoder keeps \[32, 32, 24"):
            apply_scalelong(net)


class TestRun:
    """Where the modules do not tell."""

    def test_skips_that_are_added_are_not_concatenated(self):
        class Adding(Up):
            def __init__(self, width, skips, out):
                super().__init__(width, (0, 0), out)

            def join(self, stream, skip):
                return stream + (skip if skip.shape == stream.shape else skip.mean(1, keepdim=True))

        net = Net(Adding)
        with pytest.raises(UserError, match=r"cannot be read off its modules: no layer of its up blocks"):
            apply_scalelong(net)
        with pytest.raises(UserError, match=r"joins entries \[-2, -1\] of its tuple of skips in one call of add"):
            apply_scalelong(net, example_inputs=(X,))

    def test_skips_that_are_joined_first(self):
        class Joining(Up):
            def forward(self, stream, res_hidden_states_tuple):
                mixed = sum(res_hidden_states_tuple)
                return super().forward(stream, [mixed, mixed])

        with pytest.raises(UserError, match=r"'decoder.0' joins entries \[-2, -1\]"):
            apply_scalelong(Net(Joining), example_inputs=(X,))

    def test_one_that_goes_no_further(self):
        class Deaf(Up):
            def join(self, stream, skip):
                return torch.cat([stream, torch.zeros(skip.shape)], dim=1)

        with pytest.raises(UserError, match=r"concatenated none of its entries"):
            apply_scalelong(Net(Deaf), example_inputs=(X,))

    def test_the_order_is_that_of_use(self):
        class FirstFirst(Up):
            def forward(self, stream, res_hidden_states_tuple):
                return super().forward(stream, res_hidden_states_tuple[::-1])

        net = apply_scalelong(Net(FirstFirst), "cs", example_inputs=(X,))
        assert [site.extra["entry"] for site in net.scalelong.sites] == [-1, -2, -1, -2]

    def test_filters_on_the_way_to_the_concat(self):
        class Filtering(Up):
            def join(self, stream, skip):
                return torch.cat([torch.fft.ifftn(torch.fft.fftn(skip)).real, stream], dim=1)

        net = apply_scalelong(Net(Filtering), example_inputs=(X,))
        assert [site.width for site in net.scalelong.sites] == [16, 16, 32, 32]

    def test_a_tuple_that_is_passed_by_keyword_only(self):
        class Keyword(Up):
            def forward(self, stream, *, res_hidden_states_tuple):
                return super().forward(stream, res_hidden_states_tuple)

        class Net2(Net):
            def forward(self, x):
                features = [x := self.first(x)]
                for block in self.encoder:
                    x, more = block(x)
                    features += more
                x = self.decoder[0](x, res_hidden_states_tuple=features[3:])
                return self.decoder[1](x, res_hidden_states_tuple=features[1:3])

        net = Net2(Keyword)
        plain = Net()
        plain.load_state_dict(net.state_dict())
        expected = apply_scalelong(plain, "cs")(X)
        for inputs in (None, (X,)):
            assert torch.equal(apply_scalelong(net, "cs", example_inputs=inputs)(X), expected)
            remove_scalelong(net)

    def test_blocks_that_take_entries_out_of_one_list(self):
        class Popping(Up):
            def forward(self, stream, res_hidden_states_tuple):
                for layer in self.resnets:
                    stream = layer(self.join(stream, res_hidden_states_tuple.pop()))
                return stream

        class Net2(Net):
            def __init__(self):
                super().__init__(Popping)
                self.middle = Layer(32, 32)

            def forward(self, x):
                features = [x := self.first(x)]
                for block in self.encoder:
                    x, more = block(x)
                    features += more
                x = self.middle(x)
                for block in self.decoder:
                    x = block(x, features)
                return x

        net = Net2().eval()
        plain = net(X)
        assert torch.equal(apply_scalelong(net, "none", example_inputs=(X,))(X), plain)
        assert net.scalelong.settings["adapter"] == "concat-consumer"
        assert len(net.scalelong.sites) == 4

    def test_it_leaves_no_trace(self):
        net = Net()
        net.first = nn.Sequential(net.first, nn.BatchNorm2d(8), nn.Dropout())
        net.decoder[0].eval()
        modes = {name: module.training for name, module in net.named_modules()}
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        # The gates of 'cs' draw nothing, so what is drawn next shows what the run drew.
        apply_scalelong(net, "cs", example_inputs=(X,))
        assert torch.equal(torch.rand(3), expected)
        remove_scalelong(net)
        assert {name: module.training for name, module in net.named_modules()} == modes
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
        assert all(parameter.grad is None for parameter in net.parameters())

    def test_fewer_entries_than_when_it_was_patched(self, net):
        apply_scalelong(net)
        with pytest.raises(UserError, match=r"got 1 skips, expected at least 2"):
            net.decoder[0](torch.randn(2, 32, 8, 8), [torch.randn(2, 32, 8, 8)])


class Halves(nn.Module):
    """A structure that no adapter knows: the skip is the second half of what its last layer takes."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.cat([self.inner(x), x], dim=-1))


class ScaleHalf:
    def __init__(self, state, i):
        self.state, self.i = state, i

    def __call__(self, module, args, kwargs):
        x, skip = args[0].chunk(2, dim=-1)
        return (torch.cat([x, self.state(skip, self.i)], dim=-1),), kwargs


class HalvesAdapter(Adapter):
    name = "halves"
    looks_for = "a Linear called last, twice as wide as the one called inner"

    def find(self, model, example_inputs):
        if not isinstance(getattr(model, "last", None), nn.Linear):
            return Finding(seen="no such layer")
        return Finding([Site(1, "last", "second half", width=4, dim=-1)])

    def attach(self, model, state, sites):
        hook = ScaleHalf(state, sites[0].i)
        return [model.last.register_forward_pre_hook(hook, with_kwargs=True)]


@pytest.fixture
def own_adapter():
    before = dict(registry._adapters)
    register_adapter(HalvesAdapter())
    yield
    registry._adapters.clear()
    registry._adapters.update(before)


class TestAdapters:
    def test_ones_own(self, own_adapter):
        model, x = Halves(), torch.randn(3, 4)
        apply_scalelong(model, "uniform", kappa=0.5)
        expected = model.last(torch.cat([model.inner(x), x], dim=-1))  # the hook runs here too
        assert torch.equal(model(x), expected)
        remove_scalelong(model)
        assert torch.equal(expected, model.last(torch.cat([model.inner(x), x * 0.5], dim=-1)))

    def test_two_that_find_something_are_refused(self, own_adapter, net):
        net.last = nn.Linear(8, 4)
        with pytest.raises(UserError, match=r"ambiguous, since several adapters(.|\n)*halves looks for a Linear"):
            apply_scalelong(net)

    def test_what_is_no_adapter(self):
        with pytest.raises(UserError, match=r"expected an instance of Adapter"):
            register_adapter(HalvesAdapter)
        with pytest.raises(UserError, match=r"has no name"):
            register_adapter(Adapter())
        assert "halves" not in list_adapters()


class TestRecord:
    @pytest.mark.parametrize("scaling", ["cs", "ls", "none", "learnable"])
    def test_a_network_is_patched_as_another_was(self, net, scaling):
        apply_scalelong(net, scaling, kappa=0.9, init="paper" if scaling == "ls" else "identity")
        twin = apply_record(Net(), net.scalelong.record())
        twin.load_state_dict(net.state_dict())
        assert torch.equal(twin(X), net(X))
        assert twin.scalelong.record() == net.scalelong.record()

    def test_another_network_is_refused(self, net):
        record = apply_scalelong(net).scalelong.record()
        other = Net()
        other.decoder = nn.ModuleList([Up(32, (32, 32), 32)])
        with pytest.raises(UserError, match=r"has no block 'decoder.1'.*made for another network"):
            apply_record(other, record)
        assert not state_of(other)
        assert not any(module._forward_pre_hooks for module in other.modules())

    def test_a_patched_network_and_another_version_are_refused(self, net):
        record = apply_scalelong(net).scalelong.record()
        with pytest.raises(UserError, match=r"patched already"):
            apply_record(net, record)
        with pytest.raises(UserError, match=r"version of the patch: got 99"):
            apply_record(Net(), {**record, "version": 99})


class TestReport:
    def test_before_and_after_a_forward(self, net, capsys):
        apply_scalelong(net)
        sites = scalelong_report(net)
        assert [(site.i, site.module, site.width) for site in sites] == [
            (1, "decoder.1", 16),
            (2, "decoder.1", 16),
            (3, "decoder.0", 32),
            (4, "decoder.0", 32),
        ]
        assert all(site.shape is None and site.kappa is None for site in sites)
        net(X.to(memory_format=torch.channels_last))
        after = scalelong_report(net)
        assert [site.shape for site in after] == [(2, 16, 8, 8)] * 2 + [(2, 32, 8, 8)] * 2
        assert {site.layout for site in after} == {"channels_last"}
        assert all(site.kappa == pytest.approx(0.9975, abs=1e-4) for site in after)
        printed = capsys.readouterr().out
        for said in ("scaling ls-individual", "4 long skips", "decoder.1", "tuple[-1]", "2×16×8×8", "0.9975", "gate"):
            assert said in printed

    def test_kappa_is_the_mean_of_the_last_forward(self, net):
        apply_scalelong(net, init="paper")
        with net.scalelong.scaling.recording() as kappas:
            net(X)
        for site in scalelong_report(net, show=False):
            assert site.kappa == pytest.approx(kappas[site.i].mean().item())

    def test_with_example_inputs(self, net):
        apply_scalelong(net.train())
        sites = scalelong_report(net, example_inputs=(X,), show=False)
        assert all(site.shape is not None and site.kappa is not None for site in sites)
        assert net.training

    def test_a_network_that_is_not_patched(self, net):
        with pytest.raises(UserError, match=r"Net is not patched. Call apply_scalelong"):
            scalelong_report(net)

    def test_what_the_gates_are_is_shown_in_the_module(self, net):
        apply_scalelong(net)
        assert "adapter=tuple-of-skips" in repr(net)


def test_the_library_offers_them():
    for name in ("apply_scalelong", "remove_scalelong", "scalelong_report"):
        assert name in scalelong_fast.__all__
        assert hasattr(scalelong_fast, name)


def test_nothing_is_said_that_need_not_be(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remove_scalelong(apply_scalelong(net, example_inputs=(X,)))

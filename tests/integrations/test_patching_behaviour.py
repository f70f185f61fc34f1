"""A patched network of diffusers in training and use: copies, compilation, checkpointing, dtypes, FreeU, residuals."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scalelong_fast import apply_scalelong, remove_scalelong
from scalelong_fast.errors import UserError
from scalelong_fast.scaling import SEGate

diffusers = pytest.importorskip("diffusers")

SAMPLE, TIME = torch.randn(2, 3, 8, 8), torch.tensor([1, 400])


def unet(**options) -> nn.Module:
    settings = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        **options,
    }
    return diffusers.UNet2DModel(**settings)


def condition_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32, 32, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        mid_block_type=None,
        cross_attention_dim=16,
        attention_head_dim=8,
    ).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Gates far from the identity, so that what passes them by shows."""
    for gate in model.modules():
        if isinstance(gate, SEGate):
            nn.init.normal_(gate.up.bias)
            nn.init.normal_(gate.up.weight)
    return model


def predict(model: nn.Module) -> torch.Tensor:
    return model(SAMPLE.to(next(model.parameters()).dtype), TIME).sample


def loss(model: nn.Module) -> torch.Tensor:
    return predict(model).square().mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class TestTraining:
    @pytest.mark.parametrize("shared", [False, True])
    def test_ten_steps_change_every_gate(self, shared):
        model = apply_scalelong(unet(), shared=shared)
        before = copy.deepcopy(dict(model.scalelong.named_parameters()))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(10):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        last = [name for name in before if name.endswith("up.bias")]
        # A hidden unit that is off for the whole batch gets no gradient; what stands before the sigmoid always does.
        last = [name for name in last if not shared or "decoders" in name]
        assert len(last) == (2 if shared else 4)
        for name in last:
            assert not torch.equal(before[name], model.scalelong.get_parameter(name)), name

    def test_the_gates_follow_the_train_and_eval_mode_and_a_frozen_network_leaves_them_to_train(self):
        model = unet().eval().requires_grad_(False)
        apply_scalelong(model)
        assert not model.scalelong.training
        assert model.train().scalelong.scaling.training
        assert {name for name in gradients(model)} == {
            f"scalelong.{name}" for name, _ in model.scalelong.named_parameters()
        }

    @pytest.mark.parametrize("scaling", ["ls", "cs"])
    def test_checkpointed_gradients_equal_plain_ones(self, scaling):
        model = randomise(apply_scalelong(unet(down_block_types=("DownBlock2D", "AttnDownBlock2D")), scaling)).train()
        plain = gradients(model)
        model.enable_gradient_checkpointing()
        checkpointed = gradients(model)
        assert checkpointed.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-8, msg=name)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_blocks_whose_forward_is_checkpointed_give_the_same_gradients(self, use_reentrant):
        model = randomise(apply_scalelong(unet())).train()
        plain = gradients(model)
        for block in model.up_blocks:

            def forward(hidden_states, features, temb, original=block.forward):
                def run(hidden_states, temb, *features):
                    return original(hidden_states, features, temb)

                return checkpoint(run, hidden_states, temb, *features, use_reentrant=use_reentrant)

            block.forward = forward
        again = gradients(model)
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-8, msg=name)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_the_network_checkpointed_as_a_whole_gives_the_same_gradients(self, use_reentrant):
        model = randomise(apply_scalelong(unet())).train()
        plain = gradients(model)
        model.zero_grad()
        sample = SAMPLE.clone().requires_grad_()
        # The hooks are inside: κ is computed again in the backward pass.
        output = checkpoint(lambda x: model(x, TIME).sample, sample, use_reentrant=use_reentrant)
        output.square().mean().backward()
        for name, gradient in plain.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-6, atol=1e-8, msg=name)

    @pytest.mark.parametrize("scaling", ["ls", "cs"])
    def test_a_checkpoint_that_would_leave_gates_without_gradients_is_refused(self, scaling):
        model = apply_scalelong(unet(), scaling).train()
        plain = gradients(model)
        parameters = [p for name, p in model.named_parameters() if not name.startswith("scalelong")]
        model.zero_grad()
        output = OwnCheckpoint.apply(lambda x: model(x, TIME).sample, SAMPLE.clone().requires_grad_(), *parameters)
        if scaling == "ls":
            with pytest.raises(UserError, match=r"gives no gradient to gates"):
                output.square().mean().backward()
            return
        output.square().mean().backward()
        for name, gradient in plain.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-6, atol=1e-8, msg=name)


class OwnCheckpoint(torch.autograd.Function):
    """Recomputes in the backward pass, and asks for the gradients of the parameters it was given."""

    @staticmethod
    def forward(ctx, run, x, *parameters):
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        return run(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            gradients = torch.autograd.grad(ctx.run(x), (x, *ctx.parameters), gradient, allow_unused=True)
        return None, *gradients


class TestCopies:
    def test_a_deep_copy_has_gates_of_its_own(self):
        model = randomise(apply_scalelong(unet().eval()))
        twin = copy.deepcopy(model)
        with torch.no_grad():
            before = loss(model)
            assert torch.equal(loss(twin), before)
            for parameter in twin.scalelong.parameters():
                parameter.add_(1.0)
            assert torch.equal(loss(model), before)
            assert not torch.equal(loss(twin), before)
        hooks = [hook for block in twin.up_blocks for hook in block._forward_pre_hooks.values()]
        assert hooks
        assert all(hook.state is twin.scalelong for hook in hooks)

    def test_removal_from_a_copy_leaves_the_original_patched(self):
        plain = unet().eval()
        with torch.no_grad():
            expected = loss(plain)
            model = randomise(apply_scalelong(plain))
            scaled = loss(model)
            twin = remove_scalelong(copy.deepcopy(model))
            assert torch.equal(loss(twin), expected)
            assert torch.equal(loss(model), scaled)
            assert "scalelong" not in dict(twin.named_children())

    def test_pickling(self):
        model = randomise(apply_scalelong(unet().eval()))
        twin = pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            assert torch.equal(loss(twin), loss(model))
            remove_scalelong(twin)
            assert not torch.equal(loss(twin), loss(model))

    def test_state_dict_round_trip(self):
        model = randomise(apply_scalelong(unet().eval()))
        other = apply_scalelong(unet().eval())
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(loss(other), loss(model))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Layer(nn.Sequential):
    def __init__(self, width: int, out: int):
        super().__init__(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))


class Down(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.resnets = nn.ModuleList([Layer(width, out), Layer(out, out)])

    def forward(self, x):
        features = ()
        for layer in self.resnets:
            x = layer(x)
            features += (x,)
        return x, features


class Up(nn.Module):
    def __init__(self, width: int, skips: tuple[int, int], out: int):
        super().__init__()
        self.resnets = nn.ModuleList([Layer(width + skips[0], out), Layer(out + skips[1], out)])

    def forward(self, hidden_states, res_hidden_states_tuple):
        for number, layer in enumerate(self.resnets, start=1):
            hidden_states = layer(torch.cat([hidden_states, res_hidden_states_tuple[-number]], dim=1))
        return hidden_states


class Output(NamedTuple):
    sample: torch.Tensor


class Tiny(nn.Module):
    """Nothing of diffusers, and the structure of its networks; quick to compile."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.encoder = nn.ModuleList([Down(16, 16), Down(16, 32)])
        self.decoder = nn.ModuleList([Up(32, (32, 32), 32), Up(32, (16, 16), 16)])

    def forward(self, x, time=None):
        x = self.first(x)
        features = (x,)
        for block in self.encoder:
            x, more = block(x)
            features += more
        for block in self.decoder:
            x, features = block(x, features[-2:]), features[:-2]
        return Output(x)


def compiled(model: nn.Module):
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    @pytest.mark.parametrize(("scaling", "shared"), [("cs", False), ("ls", True), ("learnable", False)])
    def test_after(self, scaling, shared):
        model = randomise(apply_scalelong(Tiny(), scaling, shared=shared))
        plain = gradients(model)
        model.zero_grad()
        loss(torch.compile(model, backend="aot_eager", fullgraph=True)).backward()
        assert plain.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
        for name, gradient in plain.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)

    def test_after_with_a_network_of_diffusers(self):
        model = randomise(apply_scalelong(unet().eval()))
        with torch.no_grad():
            torch.testing.assert_close(loss(compiled(model)), loss(model))

    def test_before_the_wrapper(self):
        model = Tiny().eval()
        run = compiled(model)
        with torch.no_grad():
            plain = predict(run)
            with pytest.warns(UserWarning, match="compiled before"):
                assert apply_scalelong(run, "cs") is run
            assert list(dict(run.named_children())) == ["_orig_mod"]
            scaled = predict(run)
            torch.testing.assert_close(scaled, predict(model))
            assert not torch.allclose(scaled, plain, rtol=1e-3)
            with pytest.warns(UserWarning, match="compiled before"):
                remove_scalelong(run)
            torch.testing.assert_close(predict(run), plain)
        assert "scalelong" not in dict(model.named_children())

    @pytest.mark.parametrize("inputs", [None, (SAMPLE,)])
    def test_before_in_place(self, inputs):
        model = Tiny().eval()
        model.compile(backend="eager", fullgraph=True)
        with torch.no_grad():
            plain = predict(model)
            with pytest.warns(UserWarning, match="compiled before"):
                apply_scalelong(model, "cs", example_inputs=inputs)
            assert not torch.allclose(predict(model), plain, rtol=1e-3)

    @pytest.mark.parametrize("wrap", [False, True])
    def test_blocks_compiled_one_by_one(self, wrap):
        model = Tiny().eval()
        expected = apply_scalelong(copy.deepcopy(model), "cs")
        for number, block in enumerate(model.decoder):
            if wrap:
                model.decoder[number] = compiled(block)
            else:
                block.compile(backend="eager", fullgraph=True)
        with torch.no_grad():
            loss(model)
            with pytest.warns(UserWarning, match="compiled before"):
                apply_scalelong(model, "cs")
            torch.testing.assert_close(loss(model), loss(expected))
            # The names are those of a network that is not compiled, so that the patch fits one.
            assert model.scalelong.record() == expected.scalelong.record()

    def test_before_in_a_function_around_it(self):
        model = Tiny().eval()
        step = torch.compile(lambda x: model(x).sample, backend="eager", fullgraph=True)
        with torch.no_grad():
            plain = step(SAMPLE)
            apply_scalelong(model, "cs")
            torch.testing.assert_close(step(SAMPLE), model(SAMPLE).sample)
            assert not torch.allclose(step(SAMPLE), plain, rtol=1e-3)
            remove_scalelong(model)
            torch.testing.assert_close(step(SAMPLE), plain)

    def test_no_warning_where_nothing_was_compiled(self, recwarn):
        apply_scalelong(unet())
        assert not recwarn.list


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_gates_take_the_dtype_of_the_network_and_the_feature_keeps_its_own(self, dtype):
        model = unet().to(dtype).eval()
        randomise(apply_scalelong(model, init="paper"))
        assert {parameter.dtype for parameter in model.scalelong.parameters()} == {dtype}
        output = model(SAMPLE.to(dtype), TIME).sample
        assert output.dtype == dtype
        assert output.isfinite().all()

    def test_to_moves_the_gates(self):
        model = apply_scalelong(unet()).to(torch.bfloat16)
        assert {parameter.dtype for parameter in model.scalelong.parameters()} == {torch.bfloat16}

    def test_storage_formats_are_no_dtype_for_gates(self):
        model = unet().to(torch.float8_e4m3fn)
        apply_scalelong(model)
        assert {parameter.dtype for parameter in model.scalelong.parameters()} == {torch.float32}

    def test_autocast(self):
        model = randomise(apply_scalelong(unet().eval()))
        with torch.no_grad():
            exact = loss(model)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(loss(model), exact, rtol=0.1, atol=0.1, check_dtype=False)

    def test_a_network_without_storage(self):
        with torch.device("meta"):
            model = unet()
        apply_scalelong(model)
        assert {parameter.device.type for parameter in model.scalelong.parameters()} == {"meta"}


def scale_entries(model: nn.Module, kappa: float) -> nn.Module:
    """Edit by hand: two skips per up block of four, κ_8 first."""
    for number, block in enumerate(model.up_blocks):
        i = 8 - 2 * number

        def forward(*args, original=block.forward, i=i, **kwargs):
            outer, inner = kwargs["res_hidden_states_tuple"]
            kwargs["res_hidden_states_tuple"] = (outer * kappa ** (i - 2), inner * kappa ** (i - 1))
            return original(*args, **kwargs)

        block.forward = forward
    return model


class TestOtherFeatures:
    inputs = (torch.randn(2, 4, 8, 8), TIME, torch.randn(2, 3, 16))

    def test_free_u(self):
        model, edited = condition_unet(), condition_unet()
        edited.load_state_dict(model.state_dict())
        scale_entries(edited, 0.7)
        apply_scalelong(model, "cs", fused=False)
        with torch.no_grad():
            before = model(*self.inputs).sample
            for network in (model, edited):
                network.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
            after = model(*self.inputs).sample
            assert not torch.equal(after, before)
            assert torch.equal(after, edited(*self.inputs).sample)
            model.disable_freeu()
            assert torch.equal(model(*self.inputs).sample, before)

    def test_residuals_of_a_control_network_are_added_before_the_scaling(self):
        model, edited = condition_unet(), condition_unet()
        edited.load_state_dict(model.state_dict())
        scale_entries(edited, 0.7)
        apply_scalelong(model, "cs", fused=False)
        widths, sizes = (16, 16, 16, 32, 32, 32, 32, 32), (8, 8, 4, 4, 2, 2, 1, 1)
        residuals = tuple(torch.randn(2, width, size, size) for width, size in zip(widths, sizes, strict=True))
        control = {
            "down_block_additional_residuals": residuals,
            "mid_block_additional_residual": torch.randn(2, 32, 1, 1),
        }
        with torch.no_grad():
            ours = model(*self.inputs, **control).sample
            assert torch.equal(ours, edited(*self.inputs, **control).sample)
            assert not torch.equal(ours, model(*self.inputs).sample)

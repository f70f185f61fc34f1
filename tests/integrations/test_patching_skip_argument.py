"""Blocks that take the long skip as an argument: U-ViT, HunyuanDiT, Stable Cascade, and what only looks like them."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scalelong_fast import apply_scalelong, remove_scalelong
from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching import apply_record, state_of

TIME = torch.tensor([0.2, 0.7])


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    """A transformer block of a U-ViT (Bao et al., 2023): a decoder's merges its skip before all else."""

    def __init__(self, dim: int, skip: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.use_checkpoint = False

    def forward(self, x, skip=None):
        if self.use_checkpoint:
            return checkpoint(self._forward, x, skip, use_reentrant=False)
        return self._forward(x, skip)

    def _forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, dim: int = 16, depth: int = 3):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 2, 2)
        self.in_blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.mid_block = Block(dim)
        self.out_blocks = nn.ModuleList([Block(dim, skip=True) for _ in range(depth)])
        self.out = nn.Linear(dim, 12)

    def forward(self, x, time):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([time[:, None, None].expand(-1, 1, x.shape[-1]), x], dim=1)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.out(x)


def hunyuan() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=4,
        text_len_t5=4,
        activation_fn="gelu-approximate",
    )


def cascade(checkpointed: bool = False) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    levels = {
        "block_out_channels": (16, 32, 64),
        "num_attention_heads": (2, 2, 2),
        "down_num_layers_per_block": (1, 2, 2),
        "up_num_layers_per_block": (2, 2, 1),
        "down_blocks_repeat_mappers": (1, 1, 1),
        "up_blocks_repeat_mappers": (1, 1, 1),
        "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 3,
        "dropout": (0.0, 0.0, 0.0),
    }
    return diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=16,
        conditioning_dim=16,
        clip_text_pooled_in_channels=8,
        clip_text_in_channels=8,
        clip_image_in_channels=8,
        clip_seq=2,
        timestep_conditioning_type=("sca",),
        **levels,
    )


MASK = torch.ones(2, 4, dtype=torch.long)
HUNYUAN_INPUTS = {
    "hidden_states": noise(2, 4, 8, 8),
    "timestep": torch.tensor([1.0, 400.0]),
    "encoder_hidden_states": noise(2, 4, 8),
    "text_embedding_mask": MASK,
    "encoder_hidden_states_t5": noise(2, 4, 8),
    "text_embedding_mask_t5": MASK,
    "image_meta_size": torch.tensor([[8.0, 8.0, 8.0, 8.0, 0.0, 0.0]] * 2),
    "style": torch.tensor([0, 0]),
    "image_rotary_emb": (noise(16, 8), noise(16, 8)),
}
CASCADE_INPUTS = {
    "sample": noise(2, 4, 16, 16),
    "timestep_ratio": TIME,
    "clip_text_pooled": noise(2, 1, 8),
    "clip_text": noise(2, 3, 8),
    "clip_img": noise(2, 1, 8),
}


class Case(NamedTuple):
    """A tiny network, forward arguments, its decoder blocks outermost first, their argument, widths of the gates."""

    build: Callable[[], nn.Module]
    inputs: tuple | dict[str, Any]
    blocks: tuple[str, ...]
    argument: str
    widths: tuple[int, ...]


CASES = {
    "U-ViT": Case(
        Transformer, (noise(2, 3, 8, 8), TIME), ("out_blocks.2", "out_blocks.1", "out_blocks.0"), "skip", (17, 17, 17)
    ),
    "HunyuanDiT": Case(hunyuan, HUNYUAN_INPUTS, ("blocks.5", "blocks.4"), "skip", (16, 16)),
    "Stable Cascade": Case(cascade, CASCADE_INPUTS, ("up_blocks.2.0", "up_blocks.1.0"), "x_skip", (16, 32)),
}


@pytest.fixture(scope="module", params=list(CASES))
def network(request):
    torch.manual_seed(0)
    case = CASES[request.param]
    model = case.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some of them begin with zeros, behind which a skip would not show
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return case, model, call(model, case.inputs).detach()


@pytest.fixture(autouse=True)
def _unpatch(request):
    yield
    if "network" in request.fixturenames:
        remove_scalelong(request.getfixturevalue("network")[1])


def call(model: nn.Module, inputs: tuple | dict[str, Any]) -> torch.Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return output if isinstance(output, torch.Tensor) else output.sample


def scale_by_hand(model: nn.Module, case: Case, scale: Callable[[torch.Tensor, int], torch.Tensor]) -> nn.Module:
    """Edit the network: the forward of every decoder block scales its skip."""
    for i, name in enumerate(case.blocks, start=1):
        block = model.get_submodule(name)

        def forward(*args, original=block.forward, i=i, **kwargs):
            if case.argument in kwargs:
                kwargs[case.argument] = scale(kwargs[case.argument], i)
            else:
                args = (args[0], scale(args[1], i), *args[2:])
            return original(*args, **kwargs)

        block.forward = forward
    return model


@pytest.mark.parametrize("run", [False, True])
def test_constant_scaling_equals_the_network_edited_by_hand(network, run):
    case, model, output = network
    expected = call(scale_by_hand(copy.deepcopy(model), case, lambda skip, i: skip * 0.6 ** (i - 1)), case.inputs)
    apply_scalelong(model, "cs", kappa=0.6, fused=False, example_inputs=case.inputs if run else None)
    assert [site.module for site in model.scalelong.sites] == list(case.blocks)
    assert torch.equal(call(model, case.inputs), expected)
    assert not torch.equal(expected, output)


def test_kappa_of_one_changes_no_bit(network):
    case, model, output = network
    apply_scalelong(model, "none")
    assert torch.equal(call(model, case.inputs), output)


def test_learnable_scaling_equals_the_network_edited_by_hand(network):
    case, model, output = network
    apply_scalelong(model, init="paper", fused=False, example_inputs=case.inputs)
    assert [site.width for site in model.scalelong.sites] == list(case.widths)
    ours, gates = call(model, case.inputs), model.scalelong.scaling.gates

    def scale(skip, i):
        kappa = torch.sigmoid(gates[i - 1].up(torch.relu(gates[i - 1].down(skip.flatten(2).mean(2)))))
        return skip * kappa.reshape(*kappa.shape, *[1] * (skip.dim() - 2))

    ours.square().mean().backward()
    assert all(gate.up.bias.grad.any() for gate in gates)
    model.zero_grad()
    remove_scalelong(model)
    assert torch.equal(call(model, case.inputs), output)
    torch.testing.assert_close(ours, call(scale_by_hand(copy.deepcopy(model), case, scale), case.inputs))


def test_gates_ask_for_inputs_where_the_width_is_that_of_the_sequence(network):
    case, model, _ = network
    if case.build is cascade:
        apply_scalelong(model)
        assert [site.width for site in model.scalelong.sites] == list(case.widths)
    else:
        with pytest.raises(UserError, match=r"example_inputs: the gates .* need the width of every long skip"):
            apply_scalelong(model)
        assert state_of(model) is None


class Pixels(Block):
    """Takes (B, H, W, C)."""

    def _forward(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        return x + self.mlp(self.norm2(x))


class PixelNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_blocks = nn.ModuleList([Pixels(8) for _ in range(2)])
        self.mid_block = Pixels(8)
        self.out_blocks = nn.ModuleList([Pixels(8, skip=True) for _ in range(2)])

    def forward(self, x):
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return x


def test_gates_take_no_features_with_channels_last():
    inputs = (noise(2, 4, 4, 8),)
    with pytest.raises(UserError, match=r"concatenates features \(2, 4, 4, 8\) with the channels last"):
        apply_scalelong(PixelNet(), example_inputs=inputs)
    assert len(apply_scalelong(PixelNet(), "cs", example_inputs=inputs).scalelong.sites) == 2


def test_a_record_patches_another_without_inputs(network):
    case, model, _ = network
    apply_scalelong(model, example_inputs=case.inputs, init="paper")
    twin = apply_record(case.build().eval(), model.scalelong.record())
    twin.load_state_dict(model.state_dict())
    assert torch.equal(call(twin, case.inputs), call(model, case.inputs))


def test_a_copy_has_gates_of_its_own(network):
    case, model, _ = network
    apply_scalelong(model, example_inputs=case.inputs, init="paper")
    before, twin = call(model, case.inputs), copy.deepcopy(model)
    nn.init.normal_(twin.scalelong.scaling.gates[0].up.bias)
    assert torch.equal(call(model, case.inputs), before)
    assert not torch.equal(call(twin, case.inputs), before)


@pytest.mark.parametrize("how", ["its own", "outside"])
def test_checkpointed_gradients_equal_plain_ones(how):
    model = apply_scalelong(Transformer(), init="paper", example_inputs=CASES["U-ViT"].inputs)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        if how == "outside" and checkpointed:
            output = checkpoint(model, *CASES["U-ViT"].inputs, use_reentrant=False)
        else:
            for block in model.out_blocks:
                block.use_checkpoint = checkpointed
            output = model(*CASES["U-ViT"].inputs)
        output.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("run", [False, True])
def test_blocks_that_are_compiled_keep_their_names(run):
    torch.compiler.reset()
    case, model = CASES["U-ViT"], Transformer().eval()
    expected = apply_scalelong(copy.deepcopy(model), "cs")
    for number, block in enumerate(model.out_blocks):
        model.out_blocks[number] = torch.compile(block, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match="compiled before"):
        apply_scalelong(model, "cs", example_inputs=case.inputs if run else None)
    assert [site.module for site in model.scalelong.sites] == list(case.blocks)
    with torch.no_grad():
        torch.testing.assert_close(call(model, case.inputs), call(expected, case.inputs))
    torch.compiler.reset()


def test_compiled():
    torch.compiler.reset()
    model = apply_scalelong(Transformer().eval(), init="paper", example_inputs=CASES["U-ViT"].inputs)
    with torch.no_grad():
        expected = call(model, CASES["U-ViT"].inputs)
        run = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(call(run, CASES["U-ViT"].inputs), expected)
    torch.compiler.reset()


def test_another_number_of_tokens_is_refused_by_gates_alone():
    model = apply_scalelong(Transformer(), example_inputs=CASES["U-ViT"].inputs)
    larger = (noise(2, 3, 16, 16), TIME)
    with pytest.raises(UserError, match=r"skip 3: got \(2, 65, 16\), expected 17 channels or tokens"):
        model(*larger)
    apply_scalelong(remove_scalelong(model), "cs")(*larger)


class TestRefused:
    def test_a_condition_that_is_called_a_skip(self):
        pytest.importorskip("diffusers")
        from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt

        model = WuerstchenDiffNeXt(
            c_in=4,
            c_out=4,
            c_r=16,
            patch_size=2,
            c_cond=16,
            c_hidden=[16, 32],
            nhead=[-1, 2],
            blocks=[2, 2],
            level_config=["CT", "CTA"],
            inject_effnet=[False, True],
            effnet_embd=8,
            clip_embd=8,
            dropout=[0.0, 0.0],
        ).eval()
        with pytest.raises(UserError, match=r"blocks that take one: 8; 5 .* are no decoder after an encoder"):
            apply_scalelong(model)
        inputs = {"x": noise(2, 4, 16, 16), "r": TIME, "effnet": noise(2, 8, 4, 4), "clip": noise(2, 3, 8)}
        with pytest.raises(UserError, match=r"is not clear, and nothing is patched by guess|no long skip for sure"):
            apply_scalelong(model, example_inputs=inputs)

    def test_a_skip_that_is_added(self):
        class Adds(Block):
            def _forward(self, x, skip=None):
                return super()._forward(x if skip is None else x + skip)

        model = Transformer()
        model.out_blocks = nn.ModuleList([Adds(16) for _ in range(3)])
        for inputs in (None, CASES["U-ViT"].inputs):
            with pytest.raises(UserError, match=r"no long skip connections were found"):
                apply_scalelong(model, example_inputs=inputs)

    def test_a_skip_that_is_used_for_something_else_too_is_left_to_another_adapter(self):
        class Twice(Block):
            def _forward(self, x, skip=None):
                return super()._forward(x, skip) + skip.mean()

        model = Transformer()
        model.out_blocks = nn.ModuleList([Twice(16, skip=True) for _ in range(3)])
        apply_scalelong(model, "cs", example_inputs=CASES["U-ViT"].inputs)
        # Not the block's argument: the mean stays that of the feature as it was.
        assert model.scalelong.settings["adapter"] == "concat-consumer"

    def test_one_of_the_long_skips_comes_another_way(self):
        class Mixed(Transformer):
            def __init__(self):
                super().__init__()
                self.outermost = nn.Linear(32, 16)
                self.last = Block(16)

            def forward(self, x, time):
                x = self.patches(x).flatten(2).transpose(1, 2) + time[:, None, None]
                skips = [x]
                for block in self.in_blocks:
                    x = block(x)
                    skips.append(x)
                x = self.mid_block(x)
                for block in self.out_blocks:
                    x = block(x, skips.pop())
                return self.out(self.last(self.outermost(torch.cat([x, skips.pop()], dim=-1))))

        model = apply_scalelong(Mixed(), "cs", example_inputs=CASES["U-ViT"].inputs)
        assert model.scalelong.settings["adapter"] == "concat-consumer"
        assert len(model.scalelong.sites) == 4

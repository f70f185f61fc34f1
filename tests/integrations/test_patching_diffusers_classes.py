"""Every network of diffusers whose up blocks take a tuple of skips, against one scaled by hand."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from scalelong_fast import apply_scalelong, remove_scalelong
from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.long_concats import DOUBTFUL, LONG, judge
from scalelong_fast.integrations.patching.trace import trace

diffusers = pytest.importorskip("diffusers")

TIME = torch.tensor([1, 400])
TEXT = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


class Case(NamedTuple):
    """A tiny network, forward arguments, and how many entries of their tuple its up blocks use, first block first."""

    build: Callable[[], nn.Module]
    inputs: tuple | dict[str, Any]
    uses: tuple[int, ...]
    argument: str = "res_hidden_states_tuple"
    readable: bool = True


def unet_2d(down: str, up: str, **options: Any) -> Case:
    def build():
        return diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", down),
            up_block_types=(up, "UpBlock2D"),
            **{"norm_num_groups": 8, **options},
        )

    return Case(build, (noise(2, 3, 8, 8), TIME), (2, 2))


def skip_blocks() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )


def unet_2d_condition(
    down: str = "CrossAttnDownBlock2D",
    up: str = "CrossAttnUpBlock2D",
    last_down: str = "DownBlock2D",
    first_up: str = "UpBlock2D",
    cls: str = "UNet2DConditionModel",
    **options: Any,
) -> Callable[[], nn.Module]:
    def build():
        return getattr(diffusers, cls)(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            down_block_types=(down, last_down),
            up_block_types=(first_up, up),
            cross_attention_dim=32,
            attention_head_dim=8,
            **options,
        )

    return build


def k_blocks() -> nn.Module:
    # The last block of the encoder keeps None, and its decoder block is built for no skip.
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        attention_head_dim=8,
        cross_attention_dim=32,
        norm_num_groups=None,
        act_fn="gelu",
        time_embedding_type="fourier",
        conv_in_kernel=1,
        conv_out_kernel=1,
    )


def unet_1d() -> nn.Module:
    return diffusers.UNet1DModel(
        in_channels=2,
        out_channels=2,
        block_out_channels=(32, 32, 64),
        extra_in_channels=64,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )


def unet_1d_temporal() -> nn.Module:
    # The last of its encoder's features is used by the first up block, the first by none.
    return diffusers.UNet1DModel(
        in_channels=14,
        out_channels=14,
        down_block_types=("DownResnetBlock1D",) * 3,
        up_block_types=("UpResnetBlock1D",) * 2,
        mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock",
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        use_timestep_embedding=True,
        act_fn="mish",
        time_embedding_type="positional",
    )


def unet_video(cls: str, kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build():
        return getattr(diffusers, cls)(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=(f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
            up_block_types=(f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
            cross_attention_dim=32,
            **options,
        )

    return build


def versatile_text() -> nn.Module:
    from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel

    return UNetFlatConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlockFlat", "DownBlockFlat"),
        up_block_types=("UpBlockFlat", "CrossAttnUpBlockFlat"),
        cross_attention_dim=32,
        attention_head_dim=2,
    )


def control_xs() -> nn.Module:
    return diffusers.UNetControlNetXSModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        norm_num_groups=8,
        cross_attention_dim=32,
        transformer_layers_per_block=1,
        num_attention_heads=2,
        ctrl_block_out_channels=(8, 16),
        ctrl_num_attention_heads=2,
        ctrl_max_norm_num_groups=4,
        ctrl_conditioning_embedding_out_channels=(16, 16),
    )


IMAGES, VIDEO = noise(2, 4, 8, 8), noise(2, 4, 3, 8, 8)
CONDITION = (IMAGES, TIME, TEXT)
SIMPLE = {
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "last_down": "ResnetDownsampleBlock2D",
    "first_up": "ResnetUpsampleBlock2D",
}

CASES = {
    "UNet2DModel": unet_2d("DownBlock2D", "UpBlock2D"),
    "UNet2DModel, attention": unet_2d("AttnDownBlock2D", "AttnUpBlock2D"),
    "UNet2DModel, resnet samplers": unet_2d("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    "UNet2DModel, skip blocks": Case(skip_blocks, (noise(2, 3, 8, 8), TIME), (2, 2)),
    "UNet2DConditionModel": Case(unet_2d_condition("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), CONDITION, (2, 2)),
    "UNet2DConditionModel, simple attention": Case(
        unet_2d_condition("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D", **SIMPLE), CONDITION, (2, 2)
    ),
    "UNet2DConditionModel, K blocks": Case(k_blocks, CONDITION, (0, 1, 1)),
    "AudioLDM2UNet2DConditionModel": Case(
        unet_2d_condition(cls="AudioLDM2UNet2DConditionModel"),
        {"sample": IMAGES, "timestep": TIME, "encoder_hidden_states": TEXT, "encoder_hidden_states_1": TEXT},
        (2, 2),
    ),
    "UNet1DModel": Case(unet_1d, (noise(2, 2, 64), TIME), (1, 1, 1)),
    "UNet1DModel, temporal": Case(unet_1d_temporal, (noise(2, 14, 16), TIME), (1, 1)),
    "UNet3DConditionModel": Case(
        unet_video("UNet3DConditionModel", "3D", norm_num_groups=8, attention_head_dim=8), (VIDEO, TIME, TEXT), (2, 2)
    ),
    "UNetMotionModel": Case(
        unet_video(
            "UNetMotionModel",
            "Motion",
            norm_num_groups=8,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
        ),
        (VIDEO, TIME, TEXT.repeat_interleave(3, 0)),
        (2, 2),
    ),
    "I2VGenXLUNet": Case(
        unet_video("I2VGenXLUNet", "3D", norm_num_groups=8, attention_head_dim=2),
        (VIDEO, TIME, torch.tensor([8, 8]), VIDEO, noise(2, 1, 32), TEXT),
        (2, 2),
    ),
    "UNetSpatioTemporalConditionModel": Case(
        unet_video(
            "UNetSpatioTemporalConditionModel",
            "SpatioTemporal",
            num_attention_heads=8,
            projection_class_embeddings_input_dim=96,
            addition_time_embed_dim=32,
        ),
        (noise(2, 2, 8, 8, 8), TIME, noise(2, 1, 32), torch.tensor([[6.0, 127.0, 0.02]] * 2)),
        (2, 2),
    ),
    "UNetControlNetXSModel": Case(
        control_xs, (*CONDITION, noise(2, 3, 16, 16)), (3, 3), "res_hidden_states_tuple_base", readable=False
    ),
    "UNetFlatConditionModel": Case(versatile_text, (noise(2, 4, 4, 1), TIME, TEXT), (2, 2), readable=False),
}
if hasattr(diffusers, "DreamLiteUNetModel"):
    CASES["DreamLiteUNetModel"] = Case(
        unet_2d_condition(
            "DreamLiteDownBlock2D",
            "DreamLiteUpBlock2D",
            cls="DreamLiteUNetModel",
            last_down="DreamLiteCrossAttnDownBlock2D",
            first_up="DreamLiteCrossAttnUpBlock2D",
        ),
        CONDITION,
        (2, 2),
    )


@pytest.fixture(scope="module", params=list(CASES))
def network(request):
    """The case, its network and what it gives; tests leave the network unpatched."""
    torch.manual_seed(0)
    case = CASES[request.param]
    model = case.build().eval()
    output = call(model, case.inputs).detach()
    assert output.abs().max() > 1e-3
    return case, model, output


@pytest.fixture(autouse=True)
def _unpatch(request):
    yield
    if "network" in request.fixturenames:
        remove_scalelong(request.getfixturevalue("network")[1])


def call(model: nn.Module, inputs: tuple | dict[str, Any]) -> torch.Tensor:
    return (model(**inputs) if isinstance(inputs, dict) else model(*inputs)).sample


def scale_by_hand(model: nn.Module, case: Case, scale: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Edit the network: each up block's forward scales the entries that it uses, the last of its tuple first."""
    i = sum(case.uses)
    for block, used in zip(model.up_blocks, case.uses, strict=True):
        indices = {-1 - entry: i - entry for entry in range(used)}
        i -= used

        def forward(*args, original=block.forward, indices=indices, **kwargs):
            features = list(kwargs.pop(case.argument) if case.argument in kwargs else args[1])
            for entry, index in indices.items():
                features[entry] = scale(features[entry], index)
            if len(args) > 1:
                return original(args[0], tuple(features), *args[2:], **kwargs)
            return original(*args, **{case.argument: tuple(features)}, **kwargs)

        block.forward = forward


def example_inputs(case: Case) -> tuple | dict[str, Any] | None:
    return None if case.readable else case.inputs


def test_kappa_of_one_changes_no_bit(network):
    case, model, output = network
    apply_scalelong(model, "none", example_inputs=example_inputs(case))
    assert torch.equal(call(model, case.inputs), output)
    remove_scalelong(model)
    apply_scalelong(model, "cs", kappa=1.0, example_inputs=example_inputs(case))
    assert torch.equal(call(model, case.inputs), output)
    assert len(model.scalelong.sites) == sum(case.uses)


def test_constant_scaling_equals_the_network_edited_by_hand(network):
    case, model, output = network
    edited = copy.deepcopy(model)
    scale_by_hand(edited, case, lambda skip, i: skip * 0.7 ** (i - 1))
    expected = call(edited, case.inputs)
    assert not torch.equal(expected, output)
    apply_scalelong(model, "cs", example_inputs=example_inputs(case), fused=False)
    assert torch.equal(call(model, case.inputs), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_learnable_scaling_equals_the_network_edited_by_hand(network, shared):
    case, model, _ = network
    apply_scalelong(model, init="paper", shared=shared, example_inputs=example_inputs(case), fused=False)
    ours = call(model, case.inputs)
    state = model.scalelong
    remove_scalelong(model)
    edited = copy.deepcopy(model)

    def scale(skip, i):
        pooled = skip.flatten(2).mean(2)
        if not shared:
            gate = state.scaling.gates[i - 1]
            logits = gate.up(torch.relu(gate.down(pooled)))
        elif hasattr(state.scaling, "encoders"):
            width = str(skip.shape[1])
            encoder, gate, decoder = state.scaling.encoders[width], state.scaling.gate, state.scaling.decoders[width]
            logits = pooled
            for pair in (encoder, gate, decoder):
                logits = pair.up(torch.relu(pair.down(logits)))
        else:
            logits = state.scaling.gate.up(torch.relu(state.scaling.gate.down(pooled)))
        return skip * torch.sigmoid(logits).reshape(*logits.shape, *[1] * (skip.dim() - 2))

    scale_by_hand(edited, case, scale)
    torch.testing.assert_close(ours, call(edited, case.inputs), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_gate(network):
    case, model, _ = network
    apply_scalelong(model, init="paper", example_inputs=example_inputs(case))
    call(model, case.inputs).square().mean().backward()
    for name, parameter in model.scalelong.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A hidden unit of these small gates may be off for every input of the batch.
        assert parameter.grad.any() or "down" in name or "up.weight" in name, name
    model.zero_grad()


def test_modules_show_what_a_run_shows(network):
    case, model, _ = network
    apply_scalelong(model, example_inputs=case.inputs)
    traced = [site.to_dict() for site in model.scalelong.sites]
    remove_scalelong(model)
    if not case.readable:
        with pytest.raises(UserError, match="example_inputs"):
            apply_scalelong(model)
        return
    apply_scalelong(model)
    assert [site.to_dict() for site in model.scalelong.sites] == traced


def test_the_data_flow_alone_finds_all_or_says_so(network):
    """Networks of this structure under other names are left to the adapter that sees concats."""
    case, model, _ = network
    seen = trace(model, case.inputs)
    verdicts = [concat.verdict for concat in judge(seen)]
    assert DOUBTFUL in verdicts or verdicts.count(LONG) == sum(case.uses)


FULL_SIZE = {
    "Stable Diffusion 1": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 768},
        [320] * 4 + [640] * 3 + [1280] * 5,
    ),
    "Stable Diffusion XL": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
        },
        [320] * 4 + [640] * 3 + [1280] * 2,
    ),
    "DDPM, CIFAR10": (
        "UNet2DModel",
        {
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        [128] * 4 + [256] * 8,
    ),
}


@pytest.mark.parametrize("name", list(FULL_SIZE))
def test_networks_as_they_are_published(name):
    cls, config, widths = FULL_SIZE[name]
    with torch.device("meta"):
        model = getattr(diffusers, cls)(**{"layers_per_block": 2, **config})
    apply_scalelong(model)
    assert [site.width for site in model.scalelong.sites] == widths


def test_kandinsky_3_concatenates_in_its_own_forward():
    torch.manual_seed(0)
    model = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(16, 32, 32, 32),
        cross_attention_dim=16,
        encoder_hid_dim=32,
    ).eval()
    inputs = {"sample": noise(2, 4, 16, 16), "timestep": TIME, "encoder_hidden_states": TEXT}
    inputs["encoder_attention_mask"] = torch.ones(2, 5)
    with pytest.raises(UserError, match="example_inputs"):
        apply_scalelong(model, "cs")
    edited = copy.deepcopy(model)
    for i, width in ((3, 32), (2, 32), (1, 16)):

        def forward(x, *args, original=edited.up_blocks[4 - i].forward, i=i, width=width):
            return original(torch.cat([x[:, :-width], x[:, -width:] * 0.7 ** (i - 1)], dim=1), *args)

        edited.up_blocks[4 - i].forward = forward
    with torch.no_grad():
        plain = call(model, inputs)
        apply_scalelong(model, "none", example_inputs=inputs)
        assert torch.equal(call(model, inputs), plain)
        apply_scalelong(remove_scalelong(model), "cs", example_inputs=inputs)
        assert torch.equal(call(model, inputs), call(edited, inputs))


def test_removal_leaves_nothing(network):
    case, model, output = network
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    keys, config = list(model.state_dict()), dict(model.config)
    apply_scalelong(model, example_inputs=example_inputs(case))
    call(model, case.inputs)
    assert remove_scalelong(model) is model
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert list(model.state_dict()) == keys
    assert dict(model.config) == config
    assert torch.equal(call(model, case.inputs), output)

"""UNets of diffusers, an implementation of the same networks by other people: converted both ways, the same outputs."""

import dataclasses

import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.integrations import apply_scalelong, from_diffusers, remove_scalelong, to_diffusers
from scalelong_fast.models import UNet, UNetConfig, UViT, UViTConfig, model_config

diffusers = pytest.importorskip("diffusers")

KINDS = {"unconditional": {}, "class": {"num_classes": 7}, "text": {"clip_dim": 12, "num_clip_token": 5}}
TINY = {
    **{"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1},
    **{"norm_num_groups": 4},
}
TINY_2D = TINY | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
DDPM = {"freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6}
TINY_TEXT = TINY | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}


def tiny(kind="unconditional", **overrides):
    sizes = {"img_size": 8, "in_chans": 3, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
    sizes |= {"attention_resolutions": (4,), "num_heads": 1, "num_groups": 4, "scaling": "none"}
    return UNetConfig(**(sizes | KINDS[kind] | overrides))


def randomised(model):
    """Weights large enough that every part of the network shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def batch_for(config, size=3):
    x = torch.randn(size, config.in_chans, config.img_size, config.img_size)
    y = None
    if config.clip_dim > 0:
        y = torch.randn(size, config.num_clip_token, config.clip_dim)
    elif config.num_classes > 0:
        y = torch.arange(size) % config.num_classes
    return x, torch.linspace(0.5, 999, size), y


@torch.no_grad()
def assert_same(ours, theirs, spread=0.1):
    x, timesteps, y = batch_for(ours.config)
    if ours.config.clip_dim:
        expected = theirs(x, timesteps, encoder_hidden_states=y).sample
    else:
        expected = theirs(x, timesteps, class_labels=y).sample
    actual = ours(x, timesteps, y)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    assert expected.std() > spread  # there is something to compare


OURS = [
    ("unconditional", {}),
    ("unconditional", {"dropout": 0.3, "learn_sigma": True, "in_chans": 2}),
    ("unconditional", {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (8, 2)}),
    ("unconditional", {"channel_mult": (1,), "attention_resolutions": (), "num_heads": 4}),
    ("class", {"use_scale_shift_norm": True, "num_heads": 4, "channel_mult": (1, 3)}),
    ("class", {"use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 4}),
    ("class", {"use_new_attention_order": True, "num_heads": 2, "resblock_updown": True, "channel_mult": (1, 2, 2)}),
    ("text", {"num_heads": 2}),
    ("text", {"transformer_depth": 2, "num_res_blocks": 2, "channel_mult": (1, 2, 1), "use_scale_shift_norm": True}),
    ("text", {"num_head_channels": 4, "attention_resolutions": (8, 4)}),
    ("text", {"resblock_updown": True, "attention_resolutions": ()}),
    ("unconditional", {"channel_mult": (1, 2, 2), "norm_eps": 1e-2, "freq_shift": 1, "downsample_padding": 0}),
]


@pytest.mark.parametrize(("kind", "overrides"), OURS, ids=str)
def test_our_unets_give_the_outputs_of_diffusers_and_come_back_bit_for_bit(kind, overrides):
    config = tiny(kind, **overrides)
    ours = randomised(UNet(config))
    theirs = to_diffusers(ours)
    assert_same(ours, theirs)
    order = {"use_new_attention_order": config.use_new_attention_order}
    back = from_diffusers(theirs, num_clip_token=config.num_clip_token, **order)
    assert back.config.level_channels == config.level_channels
    for key, value in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)
        assert back.state_dict()[key].stride() == value.stride()  # channels_last still
    batch = batch_for(config)
    with torch.no_grad():
        assert torch.equal(back(*batch), ours(*batch))


@pytest.mark.parametrize(("kind", "overrides"), OURS, ids=str)
def test_the_fused_path_too(kind, overrides):
    ours = randomised(UNet(tiny(kind, fused=True, **overrides)))
    assert_same(ours, to_diffusers(ours))


def test_the_cifar10_preset_narrower():
    config = dataclasses.replace(model_config("unet_cifar10"), model_channels=32, scaling="none")
    ours = randomised(UNet(config))
    theirs = to_diffusers(ours)
    assert_same(ours, theirs)
    assert theirs.config.block_out_channels == (32, 64, 64, 64)
    assert theirs.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")


THEIRS = {
    "one-head": ("UNet2DModel", TINY_2D | {"attention_head_dim": None}),
    "narrow-heads": ("UNet2DModel", TINY_2D | {"attention_head_dim": 4, "act_fn": "swish"}),
    "classes": ("UNet2DModel", TINY_2D | {"num_class_embeds": 7, "out_channels": 6}),
    "resnet-resizing": (
        "UNet2DModel",
        TINY_2D
        | {
            **{"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "downsample_type": "resnet"},
            **{"up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "upsample_type": "resnet"},
            **{"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
        },
    ),
    "sines-first": ("UNet2DModel", TINY_2D | {"flip_sin_to_cos": False}),
    # The options of google/ddpm-cifar10-32.
    "ddpm": (
        "UNet2DModel",
        TINY_2D | {"attention_head_dim": None, "flip_sin_to_cos": False} | DDPM,
    ),
    "stable-diffusion-1": ("UNet2DConditionModel", TINY_TEXT),
    "stable-diffusion-2": (
        "UNet2DConditionModel",
        TINY_TEXT | {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
    ),
    "deep-transformers": (
        "UNet2DConditionModel",
        TINY_TEXT
        | {"transformer_layers_per_block": (2, 2), "layers_per_block": [1, 1], "cross_attention_dim": [12, 12]},
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_unets_of_diffusers_give_their_outputs_in_ours(name):
    cls, arguments = THEIRS[name]
    theirs = randomised(getattr(diffusers, cls)(**arguments))
    assert_same(from_diffusers(theirs, num_clip_token=5), theirs)


def test_a_saved_model_converts_as_the_one_in_memory(tmp_path):
    theirs = randomised(diffusers.UNet2DConditionModel(**TINY_TEXT))
    theirs.save_pretrained(tmp_path)
    loaded = from_diffusers(diffusers.UNet2DConditionModel.from_pretrained(tmp_path))
    expected = from_diffusers(theirs).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        ("UNet2DModel", {"freq_shift": 2}, "freq_shift: got 2, expected"),
        ("UNet2DModel", {"downsample_padding": 2}, "downsample_padding: got 2, expected"),
        ("UNet2DModel", {"center_input_sample": True}, "center_input_sample: got True"),
        ("UNet2DModel", {"add_attention": False}, "add_attention: got False"),
        ("UNet2DModel", {"time_embedding_type": "fourier"}, "time_embedding_type: got 'fourier'"),
        ("UNet2DModel", {"class_embed_type": "timestep"}, "class_embed_type: got 'timestep'"),
        ("UNet2DModel", {"act_fn": "mish"}, "act_fn: got 'mish'"),
        ("UNet2DModel", {"out_channels": 4}, "out_channels: got 4"),
        ("UNet2DModel", {"time_embedding_dim": 16}, "time_embedding_dim: got 16"),
        ("UNet2DModel", {"block_out_channels": (16, 24)}, "block_out_channels: got"),
        ("UNet2DModel", {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups: got None"),
        ("UNet2DModel", {"sample_size": None}, "sample_size: got None.*img_size"),
        ("UNet2DModel", {"sample_size": (8, 16)}, "sample_size: got .*a square"),
        ("UNet2DModel", {"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")}, "down_block_types: got"),
        ("UNet2DModel", {"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "up_block_types: got"),
        ("UNet2DModel", {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}, "upsample_type: got"),
        ("UNet2DConditionModel", {"class_embed_type": "timestep"}, "class_embed_type: got 'timestep'"),
        ("UNet2DConditionModel", {"num_class_embeds": 3}, "num_class_embeds: got 3"),
        ("UNet2DConditionModel", {"time_cond_proj_dim": 4}, "time_cond_proj_dim: got 4"),
        ("UNet2DConditionModel", {"only_cross_attention": True}, "only_cross_attention: got True"),
        ("UNet2DConditionModel", {"conv_in_kernel": 1}, "conv_in_kernel: got 1"),
        ("UNet2DConditionModel", {"transformer_layers_per_block": (1, 2)}, "transformer_layers_per_block: got"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_option_that_ours_has_not_is_refused_by_name(cls, options, named):
    base = TINY_2D if cls == "UNet2DModel" else TINY_TEXT
    theirs = getattr(diffusers, cls)(**(base | options))
    with pytest.raises(UserError, match=named):
        from_diffusers(theirs)


@pytest.mark.parametrize(
    ("kind", "overrides", "named"),
    [
        ("unconditional", {"scaling": "ls", "reduction": 4}, "reduction: got 4, expected 16"),
        ("unconditional", {"scaling": "ls-individual", "calibration": "ie"}, "calibration: got 'ie'"),
        ("unconditional", {"num_heads": 2, "attention_resolutions": (8, 4)}, "num_heads: got 2.*num_head_channels"),
        ("unconditional", {"channel_mult": (2, 2)}, "channel_mult: got .*stem"),
        ("text", {"resblock_updown": True}, "resblock_updown: got True"),
        ("unconditional", {"block_scaling": "rezero"}, "block_scaling: got 'rezero'"),
    ],
    ids=str,
)
def test_a_hyperparameter_that_diffusers_has_not_is_refused_by_name(kind, overrides, named):
    with pytest.raises(UserError, match=named):
        to_diffusers(UNet(tiny(kind, **overrides)))


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("unconditional", {"scaling": "cs", "kappa": 0.5}),
        ("unconditional", {"scaling": "uniform"}),
        ("class", {"scaling": "ls", "resblock_updown": True}),
        ("text", {"scaling": "ls-individual", "init": "identity", "num_heads": 2}),
        ("text", {"scaling": "learnable", "channel_mult": (1, 2, 2)}),
    ],
    ids=str,
)
def test_coefficients_become_a_patch_and_come_back(kind, overrides):
    ours = randomised(UNet(tiny(kind, **overrides)))
    theirs = to_diffusers(ours)
    assert_same(ours, theirs)
    back = from_diffusers(theirs, num_clip_token=ours.config.num_clip_token)
    batch = batch_for(ours.config)
    with torch.no_grad():
        assert torch.equal(back(*batch), ours(*batch))
    assert back.config.scaling == ours.config.scaling
    assert back.config.init == ours.config.init or "ls" not in ours.config.scaling  # constants have none
    assert ours.config.kappa in (None, back.config.kappa)
    with pytest.raises(UserError, match=r"model: it is patched with scaling .*remove_scalelong"):
        from_diffusers(theirs, scaling="cs")
    plain = from_diffusers(remove_scalelong(theirs), num_clip_token=ours.config.num_clip_token)
    assert plain.config.scaling == "none"


def test_new_gates_start_near_the_network_as_it_was():
    theirs = randomised(diffusers.UNet2DModel(**TINY_2D))
    plain, gated = from_diffusers(theirs), from_diffusers(theirs, scaling="ls-individual", reduction=4)
    assert gated.config.init == "identity"
    batch = batch_for(plain.config)
    with torch.no_grad():
        expected = plain(*batch)
        assert (gated(*batch) - expected).norm() < 0.05 * expected.norm()
        assert not torch.equal(gated(*batch), expected)
        scaled = from_diffusers(theirs, scaling="cs", kappa=0.5)
        assert (scaled(*batch) - expected).norm() > 0.05 * expected.norm()


def test_the_result_has_memory_dtype_and_mode_of_its_own():
    theirs = diffusers.UNet2DModel(**TINY_2D).to(torch.float64).train()
    ours = from_diffusers(theirs)
    assert ours.training
    assert ours.time_embed[0].weight.dtype == torch.float64
    before = ours.time_embed[2].weight.clone()
    with torch.no_grad():
        theirs.time_embedding.linear_2.weight.zero_()
    assert torch.equal(ours.time_embed[2].weight, before)
    assert not to_diffusers(ours.eval()).training


def test_what_is_no_such_unet_is_refused():
    with pytest.raises(UserError, match=r"model: got 'Linear', expected a UNet2DModel.*apply_scalelong"):
        from_diffusers(torch.nn.Linear(2, 2))
    uvit = UViT(UViTConfig(img_size=8, embed_dim=16, depth=2, num_heads=2))
    with pytest.raises(UserError, match=r"model: got 'UViT', expected a scalelong_fast UNet.*no class of the U-ViT"):
        to_diffusers(uvit)


def test_a_model_that_computes_something_else_is_refused():
    class Other(diffusers.UNet2DModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Same(diffusers.UNet2DModel):
        pass

    with pytest.raises(UserError, match=r"model: got 'Other', expected UNet2DModel itself.*apply_scalelong"):
        from_diffusers(Other(**TINY_2D))
    from_diffusers(Same(**TINY_2D))
    theirs = diffusers.UNet2DConditionModel(**TINY_TEXT)
    theirs.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(UserError, match=r"FreeU is on.*disable_freeu"):
        from_diffusers(theirs)
    theirs.disable_freeu()
    from_diffusers(theirs)


@pytest.mark.parametrize("option", [{"reduction": 8}, {"calibration": "ie"}, {"activation": "mish"}], ids=str)
def test_gates_of_a_patch_are_not_made_others(option):
    theirs = apply_scalelong(diffusers.UNet2DModel(**TINY_2D))
    with pytest.raises(UserError, match=rf"{next(iter(option))}: got .*for the gates"):
        from_diffusers(theirs, **option)
    from_diffusers(theirs, reduction=16)
    from_diffusers(apply_scalelong(diffusers.UNet2DModel(**TINY_2D), "cs"), **option)  # without gates: without meaning


def test_overrides_are_those_that_do_not_follow_from_the_weights():
    theirs = diffusers.UNet2DModel(**TINY_2D)
    assert from_diffusers(theirs, img_size=16).config.attention_resolutions == (8,)
    with pytest.raises(UserError, match="model_channels: it follows from the model"):
        from_diffusers(theirs, model_channels=16)
    with pytest.raises(UserError, match=r"override: got 'fusde'.*'fused'"):
        from_diffusers(theirs, fusde=True)


def test_parameters_that_somebody_added_are_refused():
    theirs = diffusers.UNet2DModel(**TINY_2D)
    theirs.conv_in.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"2 unexpected: conv_in\.adapter\.bias.*Merge or unload adapters"):
        from_diffusers(theirs)

"""The UNet equals those of diffusers, an implementation of the same networks by other people."""

import dataclasses

import pytest
import torch

from scalelong_fast.models import UNet, model_config

diffusers = pytest.importorskip("diffusers")

RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def names(config):
    """Our modules and those of diffusers that hold the same weights, as (ours, theirs)."""
    pairs = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb", "class_embedding"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ]

    def res(ours, theirs):
        pairs.extend((f"{ours}.{a}", f"{theirs}.{b}") for a, b in RES_BLOCK.items())

    def attention(ours, theirs):
        same = ["proj_in", "proj_out", "transformer_blocks"] if config.clip_dim else []
        pairs.extend((f"{ours}.{name}", f"{theirs}.{name}") for name in same)
        pairs.append((f"{ours}.norm", f"{theirs}.norm" if config.clip_dim else f"{theirs}.group_norm"))

    def resizing(ours, theirs, layer):
        if config.resblock_updown:
            res(ours, theirs)
        else:
            pairs.append((f"{ours}.{layer}", f"{theirs}.conv"))

    levels = len(config.channel_mult)
    k = 1
    for level in range(levels):
        attends = config.img_size >> level in config.attention_resolutions
        for j in range(config.num_res_blocks):
            res(f"input_blocks.{k}.0", f"down_blocks.{level}.resnets.{j}")
            if attends:
                attention(f"input_blocks.{k}.1", f"down_blocks.{level}.attentions.{j}")
            k += 1
        if level + 1 < levels:
            resizing(f"input_blocks.{k}.0", f"down_blocks.{level}.downsamplers.0", "op")
            k += 1
    res("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    res("middle_block.2", "mid_block.resnets.1")
    k = 0
    for number, level in enumerate(reversed(range(levels))):
        attends = config.img_size >> level in config.attention_resolutions
        for j in range(config.num_res_blocks + 1):
            res(f"output_blocks.{k}.0", f"up_blocks.{number}.resnets.{j}")
            if attends:
                attention(f"output_blocks.{k}.1", f"up_blocks.{number}.attentions.{j}")
            if level and j == config.num_res_blocks:
                resizing(f"output_blocks.{k}.{1 + attends}", f"up_blocks.{number}.upsamplers.0", "conv")
            k += 1
    return dict(pairs)


def converted(model):
    """Our weights by the names of diffusers."""
    config, state = model.config, {}
    known = names(config)
    # Longest first: transformer_blocks stands for all that is inside.
    prefixes = sorted(known, key=len, reverse=True)
    for key, value in model.state_dict().items():
        if key.startswith("scaling."):
            continue
        block, _, leaf = key.rpartition(".")
        parent, _, layer = block.rpartition(".")
        if layer == "qkv":
            heads = config.heads_of(value.shape[0] // 3)
            rows = value.flatten(1) if leaf == "weight" else value
            theirs = known[f"{parent}.norm"].rpartition(".")[0]
            order = (3, heads, -1) if config.use_new_attention_order else (heads, 3, -1)
            parts = rows.unflatten(0, order).unbind(0 if config.use_new_attention_order else 1)
            for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                state[f"{theirs}.{name}.{leaf}"] = part.flatten(0, 1)
        elif layer == "proj_out" and not config.clip_dim:
            theirs = known[f"{parent}.norm"].rpartition(".")[0]
            state[f"{theirs}.to_out.0.{leaf}"] = value.flatten(1) if leaf == "weight" else value
        else:
            ours = next(name for name in prefixes if block == name or block.startswith(f"{name}."))
            state[f"{known[ours]}{key[len(ours) :]}"] = value
    return state


def reference(model):
    """The diffusers model with our weights; a weight that has no place there, or lacks one, fails."""
    config = model.config
    attends = [config.img_size >> level in config.attention_resolutions for level in range(len(config.channel_mult))]
    arguments = {
        "sample_size": config.img_size,
        "in_channels": config.in_chans,
        "out_channels": config.in_chans * (2 if config.learn_sigma else 1),
        "block_out_channels": config.level_channels,
        "layers_per_block": config.num_res_blocks,
        "downsample_padding": 1,
        "norm_num_groups": config.num_groups,
        "dropout": config.dropout,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
    }
    resnet = "Resnet" if config.resblock_updown else ""
    if config.clip_dim:
        down, up = f"{resnet}DownBlock2D", f"{resnet}UpBlock2D"
        theirs = diffusers.UNet2DConditionModel(
            **arguments,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else down for a in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else up for a in reversed(attends)),
            cross_attention_dim=config.clip_dim,
            attention_head_dim=config.num_heads,
            transformer_layers_per_block=config.transformer_depth,
        )
    else:
        kind = "resnet" if config.resblock_updown else "conv"
        down = "ResnetDownsampleBlock2D" if config.resblock_updown else "DownBlock2D"
        up = "ResnetUpsampleBlock2D" if config.resblock_updown else "UpBlock2D"
        theirs = diffusers.UNet2DModel(
            **arguments,
            down_block_types=tuple("AttnDownBlock2D" if a else down for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else up for a in reversed(attends)),
            downsample_type=kind,
            upsample_type=kind,
            attention_head_dim=config.num_groups,
            attn_norm_num_groups=config.num_groups,  # without it a model with scale and shift lacks a norm
            num_class_embeds=config.num_classes if config.num_classes > 0 else None,
        )
        for module in theirs.modules():
            if type(module).__name__ == "Attention":
                width = module.to_q.in_features
                module.heads = config.heads_of(width)
                module.scale = (width // module.heads) ** -0.5
    theirs.load_state_dict(converted(model), strict=True)
    return theirs.eval()


@torch.no_grad()
def check(model, batch, spread=0.1):
    x, timesteps, y = batch
    model.eval()
    theirs = reference(model)
    if model.config.clip_dim:
        expected = theirs(x, timesteps, encoder_hidden_states=y).sample
    else:
        expected = theirs(x, timesteps, class_labels=y).sample
    actual = model(x, timesteps, y)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    assert expected.std() > spread  # there is something to compare


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("unconditional", {}),
        ("unconditional", {"dropout": 0.3, "learn_sigma": True, "in_chans": 2}),
        ("unconditional", {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (8, 2)}),
        ("class", {"use_scale_shift_norm": True, "num_heads": 4, "channel_mult": (1, 3)}),
        ("class", {"use_scale_shift_norm": True, "resblock_updown": True, "num_head_channels": 4}),
        ("class", {"use_new_attention_order": True, "resblock_updown": True, "channel_mult": (1, 2, 2)}),
        ("text", {}),
        (
            "text",
            {"transformer_depth": 2, "num_res_blocks": 2, "channel_mult": (1, 2, 1), "use_scale_shift_norm": True},
        ),
        ("text", {"resblock_updown": False, "attention_resolutions": (), "num_heads": 1}),
    ],
    ids=str,
)
def test_outputs_are_those_of_diffusers(tiny_unet, batch_for, randomised, kind, overrides, fused):
    config = tiny_unet(kind, scaling="none", fused=fused, **overrides)
    check(randomised(UNet(config)), batch_for(config))


def test_the_cifar10_preset_is_that_of_diffusers(batch_for):
    model = UNet(dataclasses.replace(model_config("unet_cifar10"), scaling="none"))
    with torch.no_grad():
        for module in model.modules():  # as it is built the network ends in zeros
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv1d) and not module.weight.any():
                module.reset_parameters()
    check(model, batch_for(model.config, 1), spread=0.01)

"""Parameters of the UNet: names, counts of the presets, and initialisation."""

import pytest
import torch
from torch import nn

from scalelong_fast.models import UNet, create_model, summarize


def affine(name, bias=True):
    return [f"{name}.weight", f"{name}.bias"] if bias else [f"{name}.weight"]


def res(name, shortcut=False):
    layers = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    return [leaf for layer in layers + ["skip_connection"] * shortcut for leaf in affine(f"{name}.{layer}")]


def attention(name):
    return [leaf for layer in ("norm", "qkv", "proj_out") for leaf in affine(f"{name}.{layer}")]


def transformer(name):
    leaves = [leaf for layer in ("norm", "proj_in", "proj_out") for leaf in affine(f"{name}.{layer}")]
    block = f"{name}.transformer_blocks.0"
    for attn in ("attn1", "attn2"):
        leaves += [f"{block}.{attn}.{layer}.weight" for layer in ("to_q", "to_k", "to_v")]
        leaves += affine(f"{block}.{attn}.to_out.0")
    for layer in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"):
        leaves += affine(f"{block}.{layer}")
    return leaves


def network(attention, down, up):
    """Two levels, one residual block each, attention on the second."""
    return [
        *affine("time_embed.0"),
        *affine("time_embed.2"),
        *affine("input_blocks.0.0"),
        *res("input_blocks.1.0"),
        *down("input_blocks.2.0"),
        *res("input_blocks.3.0", shortcut=True),
        *attention("input_blocks.3.1"),
        *res("middle_block.0"),
        *attention("middle_block.1"),
        *res("middle_block.2"),
        *res("output_blocks.0.0", shortcut=True),
        *attention("output_blocks.0.1"),
        *res("output_blocks.1.0", shortcut=True),
        *attention("output_blocks.1.1"),
        *up("output_blocks.1.2"),
        *res("output_blocks.2.0", shortcut=True),
        *res("output_blocks.3.0", shortcut=True),
        *affine("out.0"),
        *affine("out.2"),
    ]


def strided(name):
    return affine(f"{name}.op")


def repeated(name):
    return affine(f"{name}.conv")


@pytest.mark.parametrize(
    ("kind", "overrides", "names"),
    [
        ("unconditional", {}, network(attention, strided, repeated)),
        ("class", {}, [*network(attention, strided, repeated), "label_emb.weight"]),
        ("unconditional", {"resblock_updown": True}, network(attention, res, res)),
        ("text", {}, network(transformer, strided, repeated)),
    ],
    ids=["unconditional", "class", "resblock_updown", "text"],
)
def test_names_of_the_state_dict(tiny_unet, kind, overrides, names):
    state = UNet(tiny_unet(kind, scaling="none", **overrides)).state_dict()
    assert sorted(state) == sorted(names)


@pytest.mark.parametrize("scaling", ["none", "uniform", "cs", "cs-reversed", "ls", "ls-individual", "learnable"])
def test_coefficients_live_in_scaling(tiny_unet, scaling):
    state = UNet(tiny_unet(scaling=scaling)).state_dict()
    extra = state.keys() - set(network(attention, strided, repeated))
    assert all(key.startswith("scaling.") for key in extra)
    assert bool(extra) == (scaling in ("ls", "ls-individual", "learnable"))


def test_shapes_that_published_weights_have(tiny_unet):
    state = UNet(tiny_unet("class", use_scale_shift_norm=True, learn_sigma=True)).state_dict()
    assert state["time_embed.0.weight"].shape == (32, 8)
    assert state["label_emb.weight"].shape == (7, 32)
    assert state["middle_block.0.emb_layers.1.weight"].shape == (32, 32)
    assert state["middle_block.1.qkv.weight"].shape == (48, 16, 1)
    assert state["middle_block.1.proj_out.weight"].shape == (16, 16, 1)
    assert state["output_blocks.0.0.skip_connection.weight"].shape == (16, 32, 1, 1)
    assert state["out.2.weight"].shape == (6, 8, 3, 3)


@pytest.mark.parametrize(
    ("name", "count", "millions", "skips", "shape", "condition"),
    [
        ("unet_cifar10", 35_746_307, 35.7, 12, (3, 32, 32), "none"),
        ("unet_imagenet64", 144_395_363, 144.4, 12, (3, 64, 64), "1000 labels"),
        ("unet_imagenet64_large", 295_899_267, 295.9, 16, (3, 64, 64), "1000 labels"),
        ("unet_coco", 52_968_964, 53.0, 12, (4, 32, 32), "text"),
    ],
)
def test_presets_have_the_published_sizes(name, count, millions, skips, shape, condition):
    with torch.device("meta"):
        model = create_model(name, scaling="none")
    assert sum(p.numel() for p in model.parameters()) == count
    assert round(count / 1e6, 1) == millions
    summary = summarize(name)
    assert (summary.name, summary.skips, summary.tokens) == (name, skips, None)
    assert (summary.input_shape, summary.condition) == (shape, condition)
    assert 0 < summary.parameters - count < count / 100  # the gates of LS


def test_digits_preset_is_small_enough_for_a_cpu():
    summary = summarize("unet_digits")
    assert summary.parameters < 2e6
    assert summary.input_shape == (1, 8, 8)


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_branches_and_output_start_as_nothing(tiny_unet, batch_for, kind, resblock_updown):
    model = UNet(tiny_unet(kind, resblock_updown=resblock_updown))
    zeros = {name for name, layer in model.named_modules() if hasattr(layer, "bias") and not layer.weight.any()}
    assert "out.2" in zeros
    last = {name.rpartition(".")[0] if name.startswith("out.") else name for name in zeros}
    assert {name.rpartition(".")[2] for name in last - {"out"}} == {"3", "proj_out"}
    residual = [name for name, layer in model.named_modules() if type(layer).__name__ == "ResBlock"]
    assert {f"{name}.out_layers.3" for name in residual} < zeros
    for name in zeros:
        assert not model.get_submodule(name).bias.any()
    assert not model(*batch_for(model.config)).any()


def test_a_seed_decides_the_weights(tiny_unet):
    def build(seed):
        torch.manual_seed(seed)
        return UNet(tiny_unet("class")).state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["input_blocks.1.0.in_layers.2.weight"], other["input_blocks.1.0.in_layers.2.weight"])


def test_norms_have_the_epsilons_of_published_models(tiny_unet):
    model = UNet(tiny_unet("text"))
    epsilons = {name: layer.eps for name, layer in model.named_modules() if isinstance(layer, nn.GroupNorm)}
    assert epsilons.pop("middle_block.1.norm") == epsilons.pop("input_blocks.3.1.norm") == 1e-6
    assert {epsilons.pop(f"output_blocks.{k}.1.norm") for k in (0, 1)} == {1e-6}
    assert set(epsilons.values()) == {1e-5}

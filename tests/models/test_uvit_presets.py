"""Models by name."""

import pytest
import torch

from scalelong_fast import create_model, list_models
from scalelong_fast.errors import UserError
from scalelong_fast.models import UNet, UNetConfig, UViT, UViTConfig, model_config
from scalelong_fast.scaling import CS, SharedLS


def test_list_models_takes_shell_patterns():
    assert list_models("uvit_s2*") == ["uvit_s2", "uvit_s2_deep"]
    assert list_models("*t2i*") == ["uvit_t2i_s2", "uvit_t2i_s2_deep"]
    assert list_models("uvit_[ml]4") == ["uvit_m4", "uvit_l4"]
    assert list_models("unet*") == [
        "unet_cifar10",
        "unet_imagenet64",
        "unet_imagenet64_large",
        "unet_coco",
        "unet_digits",
    ]
    assert list_models("resnet*") == []
    assert len(list_models()) == len(set(list_models())) == 14


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("uvit-s2", "uvit_s2"), ("uvit_h4", "uvit_l4"), ("digits", ""), ("unet_cifar", "unet_cifar10")],
)
def test_unknown_model_offers_the_nearest(name, suggestion):
    with pytest.raises(UserError, match=rf"model: got '{name}'.*{suggestion}.*Known: unet_cifar10") as caught:
        create_model(name)
    if suggestion:
        assert "Did you mean" in str(caught.value)


def test_misspelt_override_offers_the_nearest():
    with pytest.raises(UserError, match=r"model override: got 'img_sise'.*Did you mean 'img_size'"):
        create_model("uvit_digits", img_sise=8)


def test_an_override_of_the_other_kind_of_network_is_refused():
    with pytest.raises(UserError, match=r"model override: got 'patch_size', which is not known.*model_channels"):
        create_model("unet_digits", patch_size=2)
    with pytest.raises(UserError, match=r"model override: got 'channel_mult', which is not known.*patch_size"):
        create_model("uvit_digits", channel_mult=(1, 2))


def test_unknown_scaling_offers_the_nearest():
    with pytest.raises(UserError, match=r"scaling: got 'cs-reverse'.*Did you mean .*'cs-reversed'"):
        create_model("uvit_digits", scaling="cs-reverse")


def test_scaling_kappa_and_overrides_reach_the_model():
    model = create_model("uvit_digits", scaling="cs", kappa=0.5, depth=6, embed_dim=32, num_classes=-1)
    assert isinstance(model.scaling, CS)
    assert model.scaling.kappas == (1.0, 0.5, 0.25)
    assert (len(model.in_blocks), len(model.out_blocks)) == (3, 3)
    assert model.input_shape == (1, 8, 8)
    assert not hasattr(model, "label_emb")


def test_the_preset_decides_where_nothing_is_said():
    model = create_model("uvit_digits")
    assert isinstance(model.scaling, SharedLS)
    assert model.scaling.gate.reduction == 4
    assert model.config == model_config("uvit_digits")


def test_gate_options_reach_the_gates():
    model = create_model("uvit_digits", scaling="ls_individual", reduction=2, activation="mish", init="identity")
    assert [(g.reduction, g.activation, g.init) for g in model.scaling.gates] == [(2, "mish", "identity")] * 2


def test_presets_stay_as_they_are_when_overridden():
    before = model_config("uvit_digits")
    create_model("uvit_digits", depth=8)
    assert model_config("uvit_digits") == before


@pytest.mark.parametrize("name", list_models())
def test_every_preset_runs_on_the_meta_device(name):
    with torch.device("meta"):
        model = create_model(name)
        config = model.config
        y = None
        if config.clip_dim:
            y = torch.randn(2, config.num_clip_token, config.clip_dim)
        elif config.num_classes > 0:
            y = torch.zeros(2, dtype=torch.long)
        out = model(torch.randn(2, *model.input_shape), torch.zeros(2), y)
    assert isinstance(model, {UViTConfig: UViT, UNetConfig: UNet}[type(config)])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert out.shape == (2, *model.input_shape)

"""Hyperparameters of a UNet that do not fit together are refused with the mend."""

import dataclasses
import math

import pytest

from scalelong_fast.errors import UserError
from scalelong_fast.models import UNet, UNetConfig


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *(
            ({name: value}, rf"{name}: got {value}, expected a whole number >= 1")
            for name in (
                "img_size",
                "in_chans",
                "model_channels",
                "num_res_blocks",
                "num_heads",
                "num_head_channels",
                "num_groups",
                "num_clip_token",
                "transformer_depth",
                "reduction",
                "adapter_reduction",
            )
            for value in (0, -2, 2.5)
        ),
        ({"channel_mult": (1, 0)}, r"channel_mult: got 0, expected a whole number >= 1"),
        ({"channel_mult": (1, 1.5)}, r"channel_mult: got 1.5"),
        ({"channel_mult": ()}, r"channel_mult: got \(\), expected at least one level"),
        ({"channel_mult": 2}, r"channel_mult: got 2, expected a tuple of whole numbers"),
        ({"attention_resolutions": 16}, r"attention_resolutions: got 16, expected a tuple of whole numbers"),
        (
            {"attention_resolutions": (12,)},
            r"attention_resolutions: got \(12,\), expected sides among \(32, 16, 8, 4\)",
        ),
        (
            {"img_size": 36},
            r"img_size: got 36, expected a multiple of 8, since 4 levels halve the image 3 times.*fewer",
        ),
        ({"img_size": 33, "channel_mult": (1, 2)}, r"img_size: got 33, expected a multiple of 2"),
        (
            {"model_channels": 48},
            r"num_groups: got 32, expected a divisor of the channels of every level, \(48, 96, 96",
        ),
        ({"num_groups": 24}, r"num_groups: got 24, expected a divisor of the channels of every level.*Change"),
        ({"num_heads": 3}, r"num_heads: got 3, expected a divisor of 256 channels"),
        ({"num_head_channels": 96}, r"num_head_channels: got 96, expected a divisor of 256 channels"),
        ({"dropout": 1.0}, r"dropout: got 1.0, expected a finite number in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout: got -0.1"),
        ({"norm_eps": 0.0}, r"norm_eps: got 0.0, expected a finite number > 0"),
        ({"freq_shift": 2}, r"freq_shift: got 2, expected a whole number in \[0, 1\]"),
        ({"model_channels": 2, "num_groups": 1, "freq_shift": 1}, r"freq_shift: got 1, expected 0 with model_channels"),
        ({"downsample_padding": 2}, r"downsample_padding: got 2, expected a whole number in \[0, 1\]"),
        ({"num_classes": -2}, r"num_classes: got -2, expected a whole number >= -1"),
        ({"clip_dim": -1}, r"clip_dim: got -1, expected a whole number >= 0"),
        ({"num_classes": 10, "clip_dim": 768}, r"clip_dim: got 768, expected 0 in a class-conditional model.*Drop one"),
        ({"kappa": 0}, r"kappa: got 0, expected a finite number > 0"),
        ({"kappa": math.nan}, r"kappa: got nan"),
        ({"scaling": "lss"}, r"scaling: got 'lss'.*Did you mean .*'ls'"),
        ({"attention": "sdp"}, r"attention: got 'sdp'.*Did you mean 'sdpa'"),
        ({"activation": "reul"}, r"activation: got 'reul'.*Did you mean .*'relu'"),
        ({"init": "identiti"}, r"init: got 'identiti'.*Did you mean 'identity'"),
        *(
            ({name: value}, rf"{name}: got {value!r}, expected True or False")
            for name in (
                "use_new_attention_order",
                "use_scale_shift_norm",
                "resblock_updown",
                "learn_sigma",
                "use_checkpoint",
            )
            for value in (1, "no", None)
        ),
        ({"fused": 1}, r"fused: got 1, expected True, False or None"),
        ({"img_size": 24}, r"attention_resolutions: got \(16,\).*sides among \(24, 12, 6, 3\).*24 pixels.*img_size"),
        ({"num_heads": 3}, r"num_heads: got 3.*where the feature map is 16 pixels wide. Change it, model_channels"),
        ({"fused": "yes"}, r"fused: got 'yes', expected True, False or None"),
    ],
    ids=str,
)
def test_bad_values_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        UNetConfig(**overrides)


def test_heads_are_counted_where_there_is_attention():
    narrow = {"model_channels": 32, "channel_mult": (1, 3), "num_heads": 3}
    assert UNetConfig(**narrow, attention_resolutions=(16,)).heads_of(96) == 3
    assert UNetConfig(**narrow, attention_resolutions=()).num_heads == 3
    with pytest.raises(UserError, match="num_heads: got 3, expected a divisor of 32 channels"):
        UNetConfig(**narrow, attention_resolutions=(32,))
    # The middle always has attention.
    with pytest.raises(UserError, match="num_heads: got 5, expected a divisor of 96 channels"):
        UNetConfig(**narrow | {"num_heads": 5}, attention_resolutions=())


def test_channels_per_head_replace_the_number_of_heads():
    config = UNetConfig(num_heads=3, num_head_channels=64, attention_resolutions=(32, 16))
    assert [config.heads_of(width) for width in (128, 256)] == [2, 4]


def test_skips_are_the_stem_the_residual_blocks_and_the_downsamplings():
    config = UNetConfig(model_channels=32, channel_mult=(1, 2, 4), num_res_blocks=2)
    assert config.skip_channels == (32, 32, 32, 32, 64, 64, 64, 128, 128)
    assert config.num_skips == 9
    assert UNetConfig().num_skips == 12
    assert UNetConfig(channel_mult=(1,), attention_resolutions=()).skip_channels == (128, 128, 128)


def test_lists_as_json_has_them_become_tuples():
    config = UNetConfig(channel_mult=[1, 2], attention_resolutions=[16])
    assert config == UNetConfig(channel_mult=(1, 2), attention_resolutions=(16,))
    assert isinstance(hash(config), int)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        UNetConfig().num_heads = 4


def test_the_adapters_of_ls_have_the_reduction_asked_for():
    config = UNetConfig(model_channels=32, channel_mult=(1, 2), attention_resolutions=(), adapter_reduction=8)
    scaling = UNet(config).scaling
    assert {width: layer.down.out_features for width, layer in scaling.encoders.items()} == {"32": 4, "64": 8}
    assert {width: layer.down.out_features for width, layer in scaling.decoders.items()} == {"32": 4, "64": 8}

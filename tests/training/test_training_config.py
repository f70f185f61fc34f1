"""Configs: JSON round trips, ranges, names, and what changed between two of them."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest

from scalelong_fast.errors import UserError
from scalelong_fast.models import UNetConfig, UViTConfig
from scalelong_fast.training import (
    DataConfig,
    DiffusionConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    get_preset,
    list_presets,
)
from scalelong_fast.training.config import changed_fields, from_dict, to_dict

NAN, INF = math.nan, math.inf

#: Every numeric field with values it must refuse.
OUT_OF_RANGE = {
    UViTConfig: {
        "img_size": [0, -8, 8.0, True],
        "patch_size": [0, -1, 2.0],
        "in_chans": [0, 1.5],
        "embed_dim": [0, -16, 16.0],
        "depth": [0, -2, 1, 3, 4.0],
        "num_heads": [0, -1, 2.0],
        "mlp_ratio": [0, -1.0, NAN, INF],
        "qk_scale": [0, -1.0, NAN],
        "num_classes": [-2, 10.0],
        "clip_dim": [-1, 1.0],
        "num_clip_token": [0, 1.0],
        "kappa": [0, 0.0, -0.7, NAN, INF],
        "block_tau": [0, -0.1, NAN, INF],
        "reduction": [0, -4, 4.0],
    },
    UNetConfig: {
        "img_size": [0, -8, 8.0, True, 33],
        "in_chans": [0, 1.5],
        "model_channels": [0, -128, 128.0],
        "channel_mult": [(), (0, 1), (1, -2), (1, 2.0), (1, True)],
        "num_res_blocks": [0, -1, 2.0],
        "attention_resolutions": [(0,), (-8,), (12,), (16, 15), (64,)],
        "num_heads": [0, -1, 2.0, 3],
        "num_head_channels": [0, -8, 8.0, 100],
        "num_groups": [0, -1, 8.0, 48],
        "norm_eps": [0, -1e-5, NAN, INF],
        "freq_shift": [-1, 2, 0.5, True],
        "downsample_padding": [-1, 2, 0.5, True],
        "dropout": [-0.1, 1.0, 1.5, NAN],
        "num_classes": [-2, 10.0],
        "clip_dim": [-1, 1.0],
        "num_clip_token": [0, 1.0],
        "transformer_depth": [0, 1.0],
        "kappa": [0, 0.0, -0.7, NAN, INF],
        "block_tau": [0, -0.1, NAN, INF],
        "reduction": [0, -4, 4.0],
        "adapter_reduction": [0, -4, 4.0],
    },
    DataConfig: {"size": [0, -1, 1.5, True]},
    DiffusionConfig: {
        "beta_min": [0, -0.1, NAN, INF],
        "beta_max": [0.05, -1, NAN, INF],
        "label_dropout": [-0.1, 1.0, 1.5, NAN],
    },
    TrainConfig: {
        "steps": [0, -1, 10.0, True],
        "batch_size": [0, -1, 8.0],
        "lr": [0, -1e-4, 10.5, NAN, INF],
        "betas": [(0.9,), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), (0.9, 0.9, 0.9)],
        "weight_decay": [-0.1, NAN, INF],
        "warmup_steps": [-1, 1.5],
        "decay_steps": [-1, 1.5],
        "final_lr": [-1e-4, 1.0, NAN],
        "ema_decay": [-0.1, 1.0, NAN],
        "ema_profiles": [(0.0,), (-0.1,), (0.2887,), (NAN,), (0.05, 0.05), (0.05, True)],
        "ema_snapshot_every": [-1, 1.5],
        "grad_clip": [-1, NAN, INF],
        "seed": [-1, 2**63, 0.5],
        "log_every": [0, -1, 1.5],
        "save_every": [0, -1, 1.5],
        "keep_checkpoints": [0, -1, 1.5],
        "sample_every": [-1, 1.5],
        "profile": [-1, 1.5],
        "accumulate": [0, -1, 1.5],
        "timeout": [0.0, 0.5, -1, NAN, INF],
    },
    SampleConfig: {"steps": [0, 1001, -1, 5.0], "guidance": [-1, NAN, INF], "grid": [0, 101, 1.5]},
}

CASES = [
    pytest.param(cls, field, value, id=f"{cls.__name__}.{field}={value}")
    for cls, fields in OUT_OF_RANGE.items()
    for field, values in fields.items()
    for value in values
]


@pytest.mark.parametrize(("cls", "field", "value"), CASES)
def test_a_number_out_of_range_is_refused_by_name(cls, field, value):
    with pytest.raises(UserError, match=rf"^(\w+\.)?{field}: got "):
        cls(**{field: value})


@pytest.mark.parametrize("cls", [UViTConfig, UNetConfig, DataConfig, DiffusionConfig, TrainConfig, SampleConfig])
def test_no_numeric_field_is_forgotten_above(cls):
    numeric = set()
    for name, hint in typing.get_type_hints(cls).items():
        kinds = {hint, *typing.get_args(hint)}
        if kinds & {int, float}:
            numeric.add(name)
    assert numeric == set(OUT_OF_RANGE.get(cls, {}))


@pytest.mark.parametrize(
    ("cls", "field", "value", "message"),
    [
        (UViTConfig, "patch_size", 3, "img_size: got 32, expected a multiple of patch_size = 3"),
        (UViTConfig, "num_heads", 7, "embed_dim: got 512, expected a multiple of num_heads = 7"),
        (UNetConfig, "model_channels", 100, "num_groups: got 32, expected a divisor of the channels of every level"),
        (
            UNetConfig,
            "img_size",
            36,
            "img_size: got 36, expected a multiple of 8, since 4 levels halve the image",
        ),
        (TrainConfig, "betas", (0.9,), "train.betas: got"),
    ],
)
def test_fields_that_do_not_fit_together(cls, field, value, message):
    with pytest.raises(UserError) as caught:
        cls(**{field: value})
    assert str(caught.value).startswith(message)


def test_a_decay_must_end_after_the_warmup():
    TrainConfig(warmup_steps=10, decay_steps=11)
    with pytest.raises(UserError, match=r"train\.decay_steps: got 10, expected more than train\.warmup_steps = 10"):
        TrainConfig(warmup_steps=10, decay_steps=10)


@pytest.mark.parametrize(
    ("cls", "field", "value", "suggestion"),
    [
        (UViTConfig, "scaling", "lss", "ls"),
        (UNetConfig, "scaling", "lss", "ls"),
        (UNetConfig, "attention", "xformer", "xformers"),
        (UViTConfig, "attention", "xformer", "xformers"),
        (UViTConfig, "residual_dtype", "bf61", "bf16"),
        (DataConfig, "name", "cifar", "cifar10"),
        (DiffusionConfig, "schedule", "ddmp", "ddpm"),
        (TrainConfig, "compile", "of", "off"),
        (TrainConfig, "precision", "fp61", "fp16"),
        (SampleConfig, "sampler", "dimm", "ddim"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(cls, field, value, suggestion):
    with pytest.raises(UserError) as caught:
        cls(**{field: value})
    message = str(caught.value)
    assert message.startswith((f"{field}: got '{value}'", f"{cls.__name__[:-6].lower()}.{field}: got '{value}'"))
    assert "Did you mean" in message
    assert f"'{suggestion}'" in message


def test_an_unknown_preset_gets_a_suggestion():
    with pytest.raises(UserError, match=r"preset: got 'digit-uvit'.*Did you mean 'digits-uvit'"):
        get_preset("digit-uvit")


class TestRunConfig:
    def test_label_dropout_needs_labels(self):
        with pytest.raises(UserError, match=r"diffusion\.label_dropout: got 0\.1, expected 0"):
            RunConfig(model=UViTConfig(num_classes=-1), diffusion=DiffusionConfig(label_dropout=0.1))

    def test_guidance_needs_label_dropout(self):
        with pytest.raises(UserError, match=r"sample\.guidance: got 2, .*--diffusion\.label-dropout"):
            RunConfig(model=UViTConfig(num_classes=10), sample=SampleConfig(guidance=2))

    @pytest.mark.parametrize(
        ("classes", "dropout", "null", "labels"), [(11, 0.1, 10, 10), (10, 0.0, None, 10), (-1, 0.0, None, 0)]
    )
    def test_the_null_class_is_the_last_label_and_cannot_be_asked_for(self, classes, dropout, null, labels):
        config = RunConfig(model=UViTConfig(num_classes=classes), diffusion=DiffusionConfig(label_dropout=dropout))
        assert config.null_label == null
        assert config.num_labels == labels


class TestRoundTrip:
    @pytest.mark.parametrize("preset", list_presets())
    def test_presets_survive_json(self, preset):
        config = get_preset(preset)
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config

    def test_paths_tuples_and_none_survive_json(self):
        config = RunConfig(
            model=UViTConfig(qk_scale=0.25, kappa=0.7, scaling="cs"),
            data=DataConfig(name="folder", path=Path("a") / "b"),
            train=TrainConfig(betas=(0.8, 0.99), seed=2**62 + 1, lr=1 / 3),
        )
        plain = json.loads(json.dumps(to_dict(config)))
        assert plain["data"]["path"] == str(Path("a") / "b")
        back = from_dict(RunConfig, plain)
        assert back == config
        assert isinstance(back.data.path, Path)
        assert isinstance(back.train.betas, tuple)

    def test_a_missing_field_takes_its_default(self):
        plain = to_dict(RunConfig())
        del plain["train"]["grad_clip"]
        assert from_dict(RunConfig, plain) == RunConfig()

    def test_an_unknown_field_is_named(self):
        plain = to_dict(RunConfig())
        plain["train"]["momentum"] = 0.9
        with pytest.raises(UserError, match=r"train\.momentum: a field this version"):
            from_dict(RunConfig, plain)


class TestChangedFields:
    def test_equal_configs_differ_nowhere(self):
        assert changed_fields(to_dict(RunConfig()), to_dict(RunConfig())) == []

    def test_each_difference_comes_with_old_and_new(self):
        old = RunConfig(train=TrainConfig(lr=1e-3))
        new = dataclasses.replace(old, train=TrainConfig(lr=2e-3, seed=5), data=DataConfig(path=Path("x")))
        assert changed_fields(to_dict(old), to_dict(new)) == [
            ("data.path", None, "x"),
            ("train.lr", 1e-3, 2e-3),
            ("train.seed", 0, 5),
        ]

    def test_a_field_that_one_side_lacks_counts_as_none(self):
        assert changed_fields({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == [("a.c", None, 2)]
        assert changed_fields({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}) == [("a.c", 2, None)]


def test_a_sampler_that_does_not_suit_the_schedule_is_refused_before_training():
    preset = get_preset("digits-uvit")
    with pytest.raises(UserError, match=r"sample\.sampler: got 'euler-maruyama'"):
        dataclasses.replace(
            preset,
            diffusion=dataclasses.replace(preset.diffusion, schedule="ddpm"),
            sample=dataclasses.replace(preset.sample, sampler="euler-maruyama"),
        )

"""Learning rate, parameter groups and EMA against their closed forms."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from scalelong_fast.models import UViT, model_config
from scalelong_fast.training import TrainConfig
from scalelong_fast.training.ema import EMA
from scalelong_fast.training.optim import create_optimizer, learning_rate, parameter_groups

SCALINGS = ["none", "uniform", "cs", "cs-reversed", "ls", "ls-individual", "learnable"]


class TestLearningRate:
    def test_warms_up_linearly_and_reaches_the_peak_with_the_last_warm_up_step(self):
        train = TrainConfig(lr=0.5, warmup_steps=4)
        assert [learning_rate(step, train) for step in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]

    def test_is_constant_without_warm_up_and_decay(self):
        train = TrainConfig(lr=3e-4)
        assert {learning_rate(step, train) for step in (0, 1, 999, 10**9)} == {3e-4}

    @pytest.mark.parametrize("warmup", [0, 10])
    def test_decays_along_a_cosine(self, warmup):
        train = TrainConfig(lr=1.0, warmup_steps=warmup, decay_steps=110, final_lr=0.1)
        for step in range(warmup, 111):
            angle = math.pi * (step - warmup) / (110 - warmup)
            assert learning_rate(step, train) == pytest.approx(0.55 + 0.45 * math.cos(angle), rel=1e-12)

    def test_stays_at_the_final_value(self):
        train = TrainConfig(lr=1.0, decay_steps=100, final_lr=0.25)
        assert learning_rate(100, train) == pytest.approx(0.25, rel=1e-12)
        assert learning_rate(10**6, train) == learning_rate(100, train)

    def test_does_not_depend_on_the_length_of_the_run(self):
        short = TrainConfig(lr=1e-3, warmup_steps=5, decay_steps=50, steps=20)
        long = dataclasses.replace(short, steps=10**6)
        assert [learning_rate(step, short) for step in range(60)] == [learning_rate(step, long) for step in range(60)]


def small_model(scaling="ls", **overrides):
    return UViT(model_config("uvit_digits", embed_dim=16, depth=4, num_heads=2, scaling=scaling, **overrides))


class TestParameterGroups:
    @pytest.mark.parametrize("decay_all", [False, True])
    @pytest.mark.parametrize("scaling", SCALINGS)
    def test_every_parameter_is_in_exactly_one_group(self, scaling, decay_all):
        model = small_model(scaling)
        grouped = [id(p) for group in parameter_groups(model, 0.1, decay_all) for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())

    @pytest.mark.parametrize("scaling", SCALINGS)
    def test_decays_the_matrices_of_linear_and_convolutional_layers_only(self, scaling):
        model = small_model(scaling, qkv_bias=True, mlp_time_embed=True)
        decay = {id(p): group["weight_decay"] for group in parameter_groups(model, 0.1) for p in group["params"]}
        for name, parameter in model.named_parameters():
            spared = name.endswith((".bias", "kappas")) or "norm" in name or name in ("pos_embed", "label_emb.weight")
            assert decay[id(parameter)] == (0.0 if spared else 0.1), name

    def test_free_coefficients_are_spared(self):
        model = small_model("learnable")
        spared = parameter_groups(model, 0.1)[1]
        assert spared["weight_decay"] == 0.0
        assert any(p is model.scaling.kappas for p in spared["params"])

    def test_compat_decays_everything(self):
        model = small_model("learnable")
        (group,) = create_optimizer(model, TrainConfig(weight_decay=0.3, compat=True)).param_groups
        assert group["weight_decay"] == 0.3
        assert len(group["params"]) == len(list(model.parameters()))

    def test_frozen_parameters_are_left_out(self):
        model = small_model()
        model.pos_embed.requires_grad_(False)
        assert all(p is not model.pos_embed for group in parameter_groups(model, 0.1) for p in group["params"])

    def test_the_optimizer_has_the_settings_of_the_config(self):
        train = TrainConfig(lr=1e-3, betas=(0.8, 0.95), weight_decay=0.2)
        optimizer = create_optimizer(small_model(), train)
        assert isinstance(optimizer, torch.optim.AdamW)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
        assert {(group["lr"], *group["betas"]) for group in optimizer.param_groups} == {(1e-3, 0.8, 0.95)}


class TestEMA:
    def test_follows_the_closed_form(self):
        d, values = 0.9, [torch.randn(3, 2, dtype=torch.float64) for _ in range(6)]
        model = nn.Linear(2, 3, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(values[0])
            ema = EMA(model, d)
            for value in values[1:]:
                model.weight.copy_(value)
                ema.update()
        expected = d**5 * values[0] + (1 - d) * sum(d ** (5 - k) * values[k] for k in range(1, 6))
        torch.testing.assert_close(ema.state_dict()["weight"], expected)

    def test_starts_from_the_present_weights_without_aliasing_them(self):
        model = nn.Linear(2, 2)
        start = model.weight.detach().clone()
        ema = EMA(model, 0.5)
        with torch.no_grad():
            model.weight.add_(1)
        assert torch.equal(ema.state_dict()["weight"], start)

    def test_decay_zero_is_the_weights_themselves(self):
        model = nn.Linear(2, 2)
        ema = EMA(model, 0.0)
        with torch.no_grad():
            model.weight.mul_(3)
        ema.update()
        assert torch.equal(ema.state_dict()["weight"], model.weight)

    def test_copies_into_another_model_and_back_into_another_average(self):
        source, target = nn.Linear(2, 2), nn.Linear(2, 2)
        ema = EMA(source, 0.5)
        assert ema.copy_to(target) is target
        assert torch.equal(target.weight, source.weight)
        assert target.weight.requires_grad
        other = EMA(nn.Linear(2, 2), 0.5)
        other.load_state_dict(ema.state_dict())
        assert torch.equal(other.state_dict()["bias"], source.bias)

    def test_refuses_the_averages_of_another_model(self):
        with pytest.raises(KeyError, match="bias"):
            EMA(nn.Linear(2, 2), 0.5).load_state_dict(EMA(nn.Linear(2, 2, bias=False), 0.5).state_dict())

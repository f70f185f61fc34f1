"""Counted operations against formulas, and the peak rates they are held against."""

import dataclasses

import pytest
import torch
from torch import nn

from scalelong_fast.models import UNetConfig, UViTConfig, build_model
from scalelong_fast.models.registry import model_config
from scalelong_fast.training.flops import (
    PEAKS,
    count_flops,
    flops_per_image,
    model_flops_utilisation,
    peak_flops,
)

UVIT = UViTConfig(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=4, num_heads=2, num_classes=-1)
UNET = UNetConfig(
    img_size=8,
    in_chans=1,
    model_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    num_heads=2,
    num_groups=4,
)


def by_hand(config):
    """FLOP of a U-ViT's step on one image, from the textbook: 2·m·n·k a product, the backward twice the forward."""
    tokens, dim = config.num_tokens, config.embed_dim
    block = 2 * tokens * dim * dim * (3 + 1 + 2 * config.mlp_ratio) + 2 * 2 * tokens * tokens * dim
    merges = config.depth // 2 * 2 * tokens * 2 * dim * dim
    ends = 2 * 2 * (tokens - config.extras) * dim * config.patch_size**2 * config.in_chans
    return 3 * ((config.depth + 1) * block + merges + ends)


@pytest.mark.parametrize("config", [UVIT, model_config("uvit_s2"), model_config("uvit_m4")], ids=["tiny", "s2", "m4"])
def test_a_uvit_is_counted_as_by_hand(config):
    assert flops_per_image(config) == pytest.approx(by_hand(config), rel=0.01)


@pytest.mark.parametrize("scaling", ["none", "cs", "ls", "ls-individual"])
@pytest.mark.parametrize("config", [UVIT, UNET], ids=["uvit", "unet"])
def test_the_fused_network_takes_the_operations_of_the_plain_one(config, scaling):
    plain, fused = (dataclasses.replace(config, scaling=scaling, fused=fused) for fused in (False, True))
    assert count_flops(build_model(fused)) == pytest.approx(count_flops(build_model(plain)), rel=0.001)
    assert flops_per_image(fused) == pytest.approx(flops_per_image(plain), rel=0.001)


@pytest.mark.parametrize("config", [UVIT, UNET], ids=["uvit", "unet"])
def test_what_is_recomputed_does_not_count(config):
    thrifty = dataclasses.replace(config, use_checkpoint=True)
    assert flops_per_image(thrifty) == flops_per_image(config)
    assert count_flops(build_model(thrifty)) > 1.2 * flops_per_image(config)


def test_conditions_are_counted():
    text = dataclasses.replace(UVIT, clip_dim=64, num_clip_token=5)
    assert flops_per_image(text) > flops_per_image(UVIT)
    assert flops_per_image(dataclasses.replace(UVIT, num_classes=10)) > flops_per_image(UVIT)  # one more token


def test_a_linear_layer_alone():
    class Lone(nn.Module):
        config, input_shape = UVIT, (1, 8, 8)

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 24)

        def forward(self, x, t, y):
            return self.linear(x)

    # The image wants no gradient: one product forward, one backward.
    assert count_flops(Lone()) == 2 * 2 * 8 * 8 * 24


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A40", 150),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA GH200 144G HBM3e", 990),
        ("NVIDIA H800", 989),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA RTX A6000", 155),
    ],
)
def test_peak_rates_by_the_name_that_cuda_gives(name, tera):
    assert peak_flops(name, torch.bfloat16) == tera * 1e12


def test_peak_rates_of_other_dtypes():
    assert peak_flops("NVIDIA A100-SXM4-80GB", None, tf32=True) == 156e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", None, tf32=False) == 19.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float16) == 312e12
    assert peak_flops("Tesla V100-SXM2-16GB", torch.float16) == 125e12
    assert peak_flops("Tesla V100-PCIE-32GB", torch.float16) == 112e12
    assert peak_flops("Tesla V100-SXM2-16GB", torch.bfloat16) is None
    assert all(peak.fp32 <= peak.tf32 <= peak.half for peak in PEAKS.values())


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA Z9000",
        "NVIDIA L400",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A40-48Q",
        torch.device("cpu"),
    ],
    ids=str,
)
def test_nothing_is_guessed_of_unknown_devices(device):
    assert peak_flops(device, torch.bfloat16) is None
    assert model_flops_utilisation(10, 5.0, peak_flops(device, torch.bfloat16)) is None


def test_utilisation():
    assert model_flops_utilisation(2_000_000, 100.0, 1e9, devices=2) == pytest.approx(0.1)

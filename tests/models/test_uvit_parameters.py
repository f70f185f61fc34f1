"""Parameters: names, counts of the presets, and initialisation."""

import math

import pytest
import torch
from torch import nn

from scalelong_fast.models import UViT, create_model, list_models, summarize

BLOCK = [
    "norm1.weight",
    "norm1.bias",
    "attn.qkv.weight",
    "attn.proj.weight",
    "attn.proj.bias",
    "norm2.weight",
    "norm2.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
]
SKIP_LINEAR = ["skip_linear.weight", "skip_linear.bias"]
CLASS_CONDITIONAL_DEPTH_4 = [
    "pos_embed",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "label_emb.weight",
    *(f"in_blocks.0.{leaf}" for leaf in BLOCK),
    *(f"in_blocks.1.{leaf}" for leaf in BLOCK),
    *(f"mid_block.{leaf}" for leaf in BLOCK),
    *(f"out_blocks.0.{leaf}" for leaf in BLOCK + SKIP_LINEAR),
    *(f"out_blocks.1.{leaf}" for leaf in BLOCK + SKIP_LINEAR),
    "norm.weight",
    "norm.bias",
    "decoder_pred.weight",
    "decoder_pred.bias",
    "final_layer.weight",
    "final_layer.bias",
]
GATES = {
    "ls": ["gate"],
    "ls-individual": ["gates.0", "gates.1"],
}


@pytest.mark.parametrize("scaling", ["none", "uniform", "cs", "cs-reversed", "ls", "ls-individual", "learnable"])
def test_names_of_the_state_dict(tiny, scaling):
    leaves = ["down.weight", "down.bias", "up.weight", "up.bias"]
    extra = [f"scaling.{gate}.{leaf}" for gate in GATES.get(scaling, []) for leaf in leaves]
    extra += ["scaling.kappas"] if scaling == "learnable" else []
    state = UViT(tiny("class", scaling=scaling)).state_dict()
    assert sorted(state) == sorted(CLASS_CONDITIONAL_DEPTH_4 + extra)


@pytest.mark.parametrize(
    ("name", "millions", "skips", "tokens", "shape", "condition"),
    [
        ("uvit_s2", 44.3, 6, 257, (3, 32, 32), "none"),
        ("uvit_s2_deep", 57.9, 8, 257, (3, 32, 32), "none"),
        ("uvit_s4_celeba64", 44.3, 6, 257, (3, 64, 64), "none"),
        ("uvit_m4", 130.9, 8, 258, (3, 64, 64), "1000 labels"),
        ("uvit_l4", 286.8, 10, 258, (3, 64, 64), "1000 labels"),
        ("uvit_h2", 500.8, 14, 258, (4, 32, 32), "1001 labels"),
        ("uvit_t2i_s2", 44.7, 6, 334, (4, 32, 32), "text"),
        ("uvit_t2i_s2_deep", 58.4, 8, 334, (4, 32, 32), "text"),
    ],
)
def test_presets_have_the_published_sizes(name, millions, skips, tokens, shape, condition):
    summary = summarize(name)
    assert round(summary.parameters / 1e6, 1) == millions
    assert (summary.name, summary.skips, summary.tokens) == (name, skips, tokens)
    assert (summary.input_shape, summary.condition) == (shape, condition)


def test_the_shared_gate_adds_less_than_a_thousandth():
    with torch.device("meta"):
        count = {s: sum(p.numel() for p in create_model("uvit_s2", s).parameters()) for s in ("none", "cs", "ls")}
    assert count["none"] == count["cs"]
    assert 0 < count["ls"] - count["none"] < count["none"] / 1000


def test_digits_preset_is_small_enough_for_a_cpu():
    summary = summarize("uvit_digits")
    assert summary.parameters < 1e6
    assert summary.input_shape == (1, 8, 8)
    assert set(list_models()) >= {"uvit_digits", "uvit_s2"}


def test_initialisation_of_the_backbone(tiny):
    model = UViT(tiny("text", embed_dim=128, mlp_time_embed=True, qkv_bias=True, scaling="none"))
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {"time_embed.0", "context_embed", "mid_block.attn.qkv", "out_blocks.1.skip_linear"} < layers.keys()
    for name, layer in layers.items():
        tolerance = 5 / math.sqrt(2 * layer.weight.numel())  # five standard errors of a standard deviation
        assert layer.weight.std().item() == pytest.approx(0.02, rel=tolerance), name
        assert layer.weight.mean().abs() < 5 * 0.02 / math.sqrt(layer.weight.numel()), name
        assert not layer.bias.any(), name
    norms = [layer for layer in model.modules() if isinstance(layer, nn.LayerNorm)]
    assert len(norms) == 2 * 5 + 1
    assert all((layer.weight == 1).all() and not layer.bias.any() for layer in norms)


def test_the_backbone_leaves_the_gates_their_own_initialisation(tiny):
    gate = UViT(tiny(img_size=32, reduction=1)).scaling.gate  # 257 tokens
    bound = 1 / math.sqrt(257)
    for values in (gate.down.weight, gate.down.bias, gate.up.weight, gate.up.bias):
        assert 0.95 * bound < values.abs().max() <= bound


@pytest.mark.parametrize("scaling", ["ls", "ls-individual"])
def test_initialising_again_keeps_the_promise_of_identity_gates(tiny, batch_for, scaling):
    config = tiny(scaling=scaling, init="identity")
    model = UViT(config)
    if hasattr(model, "reset_parameters"):
        model.reset_parameters()
    with torch.no_grad(), model.scaling.recording() as kappas:
        model(*batch_for(config))
    for kappa in kappas.values():
        torch.testing.assert_close(kappa, torch.full_like(kappa, 1 / (1 + math.exp(-6))))

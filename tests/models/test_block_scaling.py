"""Blocks whose output is scaled, and the calibration ``ie``, inside both networks."""

import dataclasses

import pytest
import torch

from scalelong_fast import create_model
from scalelong_fast.errors import UserError
from scalelong_fast.models import UNet, UNetConfig, UViT, UViTConfig, build_model
from scalelong_fast.models.unet_attention import AttentionBlock, SpatialTransformer
from scalelong_fast.models.unet_blocks import ResBlock
from scalelong_fast.scaling import IEGate, ReZero, StableTau
from scalelong_fast.training.optim import parameter_groups

SCALED = [{"block_scaling": "stable-tau", "block_tau": 0.3}, {"block_scaling": "rezero"}]
NETWORKS = ["uvit", "unet"]


@pytest.fixture
def config_of(tiny, tiny_unet):
    """``config_of("unet", kind, **overrides)``."""
    return lambda network, *args, **options: (tiny if network == "uvit" else tiny_unet)(*args, **options)


@pytest.fixture
def make(config_of, randomised):
    """``make("unet", kind, **overrides)``: a network in which every part shows, α too."""
    return lambda network, *args, **options: randomised(build_model(config_of(network, *args, **options)))


def loss_and_gradients(model, batch):
    model.zero_grad()
    out = model(*batch)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_equal(actual, expected):
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def factor(block):
    return block.block_scaling.tau if isinstance(block.block_scaling, StableTau) else block.block_scaling.alpha.item()


@pytest.mark.parametrize("options", SCALED, ids=str)
def test_block_of_a_uvit_is_the_one_written_by_hand(make, options):
    model = make("uvit", fused=False, **options)
    block, x, skip = model.out_blocks[0], torch.randn(2, 17, 32), torch.randn(2, 17, 32)
    h = torch.cat([x, skip], dim=-1) @ block.skip_linear.weight.T + block.skip_linear.bias
    h = h + factor(block) * block.attn(block.norm1(h))
    h = h + factor(block) * block.mlp(block.norm2(h))
    assert factor(block) != 0
    torch.testing.assert_close(block(x, skip), h)


@pytest.mark.parametrize("options", SCALED, ids=str)
def test_blocks_of_a_unet_are_the_ones_written_by_hand(make, options):
    model = make("unet", "text", fused=False, **options)
    x, emb, text = torch.randn(2, 16, 4, 4), torch.randn(2, 32), torch.randn(2, 5, 12)
    block, transformer = model.middle_block[0], model.middle_block[1]
    h = block.in_layers(x) + block.emb_layers(emb)[:, :, None, None]
    torch.testing.assert_close(block(x, emb), x + factor(block) * block.out_layers(h))
    assert isinstance(transformer, SpatialTransformer)
    tokens = transformer.proj_in(transformer.norm(x)).flatten(2).transpose(1, 2)
    for inner in transformer.transformer_blocks:
        tokens = inner(tokens, text)
    branch = transformer.proj_out(tokens.transpose(1, 2).unflatten(2, (4, 4)))
    torch.testing.assert_close(transformer(x, text), x + factor(transformer) * branch, rtol=1e-4, atol=1e-5)

    attention = make("unet", fused=False, **options).middle_block[1]
    assert isinstance(attention, AttentionBlock)
    scaled, attention.block_scaling = attention(x), None
    plain = attention(x)
    attention.block_scaling = StableTau(0.3) if options["block_scaling"] == "stable-tau" else None
    if attention.block_scaling is not None:
        torch.testing.assert_close(scaled, x + 0.3 * (plain - x))
    else:
        assert not torch.allclose(scaled, plain)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("options", [{"block_scaling": "stable-tau", "block_tau": 1.0}], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_tau_of_one_is_none_bit_for_bit(make, config_of, batch_for, network, options, fused):
    scaled = make(network, "class", fused=fused, **options)
    plain = build_model(config_of(network, "class", fused=fused))
    plain.load_state_dict(scaled.state_dict())
    batch = batch_for(plain.config)
    for got, wanted in zip(loss_and_gradients(scaled, batch), loss_and_gradients(plain, batch), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("options", [*SCALED, {"calibration": "ie"}], ids=str)
def test_fused_equals_plain(make, config_of, batch_for, network, kind, options):
    plain = make(network, kind, fused=False, **options)
    fused = build_model(config_of(network, kind, fused=True, **options))
    fused.load_state_dict(plain.state_dict())
    batch = batch_for(plain.config)
    assert_equal(loss_and_gradients(fused, batch), loss_and_gradients(plain, batch))


@pytest.mark.parametrize("network", NETWORKS)
def test_compiled_as_one_graph_equals_eager(make, batch_for, network):
    small = {"depth": 2} if network == "uvit" else {"channel_mult": (1,), "img_size": 4}
    model = make(network, fused=True, block_scaling="rezero", calibration="ie", **small)
    batch = batch_for(model.config, 2)
    expected = loss_and_gradients(model, batch)
    torch._dynamo.reset()
    assert_equal(loss_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), batch), expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("fused", [False, True])
def test_rezero_starts_with_blocks_that_do_nothing_and_each_of_them_learns(config_of, batch_for, network, fused):
    model = build_model(config_of(network, fused=fused, block_scaling="rezero"))
    with torch.no_grad():
        last = model.out[-1] if network == "unet" else model.decoder_pred
        last.weight.normal_()
    batch = batch_for(model.config)
    loss_and_gradients(model, batch)
    scales = [module for module in model.modules() if isinstance(module, ReZero)]
    blocks = [m for m in model.modules() if getattr(m, "block_scaling", None) is not None]
    assert len(scales) == len(blocks) == (5 if network == "uvit" else 12)
    assert all(scale.alpha.grad.abs().item() > 0 for scale in scales)
    with torch.no_grad():
        for scale in scales:
            scale.alpha.sub_(scale.alpha.grad.sign(), alpha=0.1)
    loss_and_gradients(model, batch)
    for block in blocks:
        branch = block.mlp.fc2 if network == "uvit" else block.out_layers[-1] if isinstance(block, ResBlock) else None
        branch = block.proj_out if branch is None else branch
        assert branch.weight.grad.abs().max() > 0


def test_a_unet_without_rezero_keeps_its_zero_branches(tiny_unet):
    for options in ({}, SCALED[0]):
        model = UNet(tiny_unet(**options))
        for block in (module for module in model.modules() if isinstance(module, ResBlock)):
            assert not block.out_layers[-1].weight.any()


@pytest.mark.parametrize(("network", "cls"), [("uvit", UViT), ("unet", UNet)])
@pytest.mark.parametrize("options", [*SCALED, {"calibration": "ie"}], ids=str)
def test_saved_and_loaded(make, batch_for, tmp_path, network, cls, options):
    model = make(network, **options).eval()
    model.save_pretrained(tmp_path)
    loaded, batch = cls.from_pretrained(tmp_path), batch_for(model.config)
    assert loaded.config == model.config
    assert torch.equal(loaded(*batch), model(*batch))


def test_scales_and_shifts_are_spared_from_weight_decay(config_of):
    model = build_model(config_of("uvit", block_scaling="rezero", calibration="ie"))
    decayed = {id(p) for group in parameter_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    gate = model.scaling.gate
    assert isinstance(gate, IEGate)
    assert not decayed & {id(p) for p in (gate.weight, gate.bias, model.mid_block.block_scaling.alpha)}


@pytest.mark.parametrize("name", ["uvit_digits", "unet_digits"])
def test_reached_by_create_model(name):
    model = create_model(name, block_scaling="stable_tau", block_tau=0.3, calibration="ie")
    assert model.config.block_scaling == "stable-tau"
    taus = [module.tau for module in model.modules() if isinstance(module, StableTau)]
    assert set(taus) == {0.3}
    assert isinstance(model.scaling.gate, IEGate)


@pytest.mark.parametrize("config", [UViTConfig(), UNetConfig()], ids=["uvit", "unet"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_scaling": "re-zero"}, r"block_scaling: got 're-zero'.*Did you mean 'rezero'"),
        ({"block_tau": 0}, r"block_tau: got 0, expected a finite number > 0"),
        ({"calibration": "es"}, r"calibration: got 'es'.*Did you mean"),
    ],
)
def test_bad_values_are_refused(config, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **change)

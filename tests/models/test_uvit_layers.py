"""Building blocks: time embedding, patches, attention backends, checkpointing."""

import sys
import types

import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.models import UViT
from scalelong_fast.models.attention import Attention
from scalelong_fast.models.layers import PatchEmbed, timestep_embedding, unpatchify


def test_time_embedding_has_cosines_first_and_spans_1_to_max_period():
    t = torch.tensor([0.0, 3.5])
    embedding = timestep_embedding(t, 6, max_period=1000.0)
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    angles = t[:, None] * frequencies
    torch.testing.assert_close(embedding, torch.cat([angles.cos(), angles.sin()], dim=1))
    assert embedding.dtype == torch.float32
    assert embedding[0].tolist() == [1, 1, 1, 0, 0, 0]


def test_time_embedding_of_odd_width_ends_in_a_zero_column():
    t = torch.tensor([1.0, 500.25, 999.0])
    odd = timestep_embedding(t, 7)
    assert odd.shape == (3, 7)
    assert torch.equal(odd[:, :6], timestep_embedding(t, 6))
    assert not odd[:, 6].any()


def test_a_model_of_odd_width_runs(tiny, batch_for):
    config = tiny(embed_dim=33, num_heads=3)
    assert UViT(config)(*batch_for(config)).shape == (3, 3, 8, 8)


def test_patch_embedding_is_the_strided_convolution_with_its_weight():
    embed, x = PatchEmbed(3, 2, 10).double(), torch.randn(2, 2, 12, 6, dtype=torch.float64)
    expected = embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), expected)


def test_unpatchify_puts_row_column_channel():
    side, p, channels = 3, 2, 5
    image = torch.randn(2, channels, side * p, side * p)
    tokens = [
        image[:, :, p * r : p * r + p, p * c : p * c + p].permute(0, 2, 3, 1).flatten(1)
        for r in range(side)
        for c in range(side)
    ]
    assert torch.equal(unpatchify(torch.stack(tokens, dim=1), channels), image)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_scale": 0.3}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_backends_agree(options, dtype, tolerance):
    x = torch.randn(2, 9, 24, dtype=dtype)
    sdpa = Attention(24, 3, backend="sdpa", **options).to(dtype)
    math = Attention(24, 3, backend="math", **options).to(dtype)
    with torch.no_grad():
        for parameter in sdpa.parameters():
            parameter.normal_(std=0.3)
    math.load_state_dict(sdpa.state_dict())
    torch.testing.assert_close(math(x), sdpa(x), rtol=tolerance, atol=tolerance)


def test_xformers_missing_is_told_with_the_mend(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(UserError, match=r"attention: got 'xformers'.*pip install \"scalelong_fast\[xformers\]\".*sdpa"):
        UViT(tiny(attention="xformers"))


def test_xformers_refuses_tensors_on_the_cpu(tiny, batch_for, monkeypatch):
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, None
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    config = tiny(attention="xformers")
    with pytest.raises(UserError, match="attention: got 'xformers', expected 'sdpa' or 'math' for tensors on the CPU"):
        UViT(config)(*batch_for(config))


@pytest.mark.parametrize("scaling", ["none", "ls", "learnable"])
def test_checkpointing_recomputes_and_gives_the_plain_gradients(tiny, batch_for, scaling):
    config = tiny("class", scaling=scaling)
    plain = UViT(config)
    thrifty = UViT(tiny("class", scaling=scaling, use_checkpoint=True))
    thrifty.load_state_dict(plain.state_dict())
    runs = []
    thrifty.mid_block.attn.register_forward_pre_hook(lambda *_: runs.append(1))
    batch = batch_for(config)
    for model in (plain, thrifty):
        model(*batch).square().mean().backward()
    assert len(runs) == 2
    for (name, ours), theirs in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_checkpointing_rests_while_sampling(tiny, batch_for):
    config = tiny(use_checkpoint=True)
    model = UViT(config)
    with torch.no_grad():
        assert not model(*batch_for(config)).requires_grad
